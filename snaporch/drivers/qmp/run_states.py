"""The run states of a QEMU guest, and what each verb does in each of them: done, or refused and why.

One table for all verbs, which ask it before they touch anything. Verbs that are not in it do not depend on what the
guest does: ``attach``, ``destroy``, ``verify``, and all that only look.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import attrs

from snaporch.drivers.base import GuestVerb

__all__ = ["GONE", "RUN_STATES", "RunState", "refusal", "table"]


@attrs.frozen
class RunState:
    """One run state.

    Attributes:
        words: what the guest does, and what to do about that: why a verb is refused.
        done: the verbs that are done.
    """

    words: str
    done: frozenset[GuestVerb] = frozenset()


def _state(words: str, done: Collection[GuestVerb] = ()) -> RunState:
    return RunState(words, frozenset(done))


_ALL = frozenset(GuestVerb)
_STILL = _ALL - {GuestVerb.QUIESCE, GuestVerb.SHUTDOWN}  # nobody inside would answer
_ANEW = {GuestVerb.RESUME, GuestVerb.RESET}
_STANDS = {GuestVerb.REVERT, GuestVerb.MERGE}  # its CPUs stand, and its images are its own

GONE = "postmigrate, without its images"  # no word of QEMU's, which has one for this and for a guest that was saved

RUN_STATES: Mapping[str, RunState] = {
    "running": _state("the guest runs", _ALL),
    "paused": _state("the guest is paused; let it run first (`domain resume`)", _STILL),
    "prelaunch": _state(
        "the guest has not begun to run; let it run first (`domain resume`)",
        _ALL - {GuestVerb.QUIESCE, GuestVerb.SHUTDOWN},
    ),
    "postmigrate": _state(
        "the guest has not run since its last checkpoint, and this QEMU cannot save its memory again before that: "
        "let it run (`domain resume`)",
        {*_STANDS, GuestVerb.PAUSE, GuestVerb.RESUME},
    ),
    GONE: _state(
        "its guest is gone from here: another program has migrated it, and may have it run elsewhere. Work with it "
        "there, and end what is left here (`domain destroy`). One that was only saved goes on by `cont` at QEMU's "
        "monitor"
    ),
    "suspended": _state("the guest sleeps (ACPI S3); wake it first (system_wakeup)", _STANDS),
    "shutdown": _state(
        "the guest has powered off; boot it anew (`domain reset`) or end it (`domain destroy`)",
        {*_STANDS, GuestVerb.RESET},
    ),
    "watchdog": _state(
        "a watchdog has stopped the guest; let it run (`domain resume`) or boot it anew (`domain reset`)",
        {*_STANDS, *_ANEW},
    ),
    "guest-panicked": _state(
        "the guest has panicked; boot it anew (`domain reset`) or end it (`domain destroy`)", {*_STANDS, *_ANEW}
    ),
    "io-error": _state(
        "a disk has failed and the guest waits; mend that (make room), and let it run (`domain resume`)",
        {*_STANDS, *_ANEW},
    ),
    "internal-error": _state(
        "QEMU has met an error in the guest and cannot go on with it; boot it anew (`domain reset`) or end it "
        "(`domain destroy`)",
        {*_STANDS, GuestVerb.RESET},
    ),
    "debug": _state("a debugger has stopped the guest; let it go on there first", _STANDS),
    "inmigrate": _state("it waits for memory from elsewhere: there is none yet"),
    "finish-migrate": _state("somebody else is migrating it; wait for the end of that"),
    "restore-vm": _state("a point is being loaded; wait for the end of that"),
    "save-vm": _state("somebody else is saving it; wait for the end of that"),
    "colo": _state("it is one of a pair (COLO)"),
}
_UNKNOWN = "its run state {status!r} is not one that snaporch knows"


def refusal(status: str, verb: GuestVerb) -> str:
    """Return why a verb is refused to a guest in a run state, or an empty string: it is done."""
    state = RUN_STATES.get(status)
    if state is None:
        return _UNKNOWN.format(status=status)
    return "" if verb in state.done else state.words


def table() -> str:
    """Return the table for docs/reference/run-states.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| run state | " + " | ".join(f"`{verb}`" for verb in GuestVerb) + " | why not |"
    yield "| --- |" + " --- |" * len(GuestVerb) + " --- |"
    for name, state in RUN_STATES.items():
        cells = " | ".join("done" if verb in state.done else "refused" for verb in GuestVerb)
        yield f"| `{name}` | {cells} | {state.words if state.done != _ALL else ''} |"
