"""Programs of the user's, run before and after; no shell, and each with a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import attrs
import structlog
import trio

from snaporch.errors import InvalidInput, OperationFailed
from snaporch.model.convert import structured
from snaporch.model.hook import Hook, RootHooks
from snaporch.model.record import RevertRecord

_log = structlog.get_logger("snaporch")

NAME = "hooks.toml"
WORDS = 500  # of what a hook that fails has said last
_GRACE = 5.0


class HookFailed(OperationFailed):
    """A hook could not be started, took too long, or ended with another status than 0."""


def load_hooks(root: Path) -> RootHooks:
    """Return the hooks of a root; without its file there are none.

    Nobody but the root's user can write there: no definition and no request brings a program along.

    Raises:
        InvalidInput: the file cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    path = root / NAME
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return RootHooks()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path}: {error}") from None
    return structured(data, RootHooks, str(path))


async def after_revert(hooks: RootHooks, root: Path, record: RevertRecord) -> RevertRecord:
    """Run what is to be run for a domain that has gone back, and return the record with what went wrong there.

    The revert is complete, so that nothing undoes it, and no cancellation ends a hook: its deadline does.
    """
    variables = {"ROOT": str(root), "STAGE": "after_revert", "DOMAIN": record.domain, "SNAPSHOT": record.name}
    if record.clock_behind_seconds is not None:
        variables["CLOCK_BEHIND"] = f"{record.clock_behind_seconds:.3f}"
    problems: list[str] = []
    for hook in hooks.after_revert:
        if not hook.domains or any(fnmatchcase(record.domain, glob) for glob in hook.domains):
            with trio.CancelScope(shield=True):
                try:
                    await run_hooks([hook], variables)
                except HookFailed as error:
                    _log.warning("the revert is complete, and a hook after it failed", error=str(error))
                    problems.append(str(error))
    return attrs.evolve(record, problems=tuple(problems))


async def run_hooks(hooks: Iterable[Hook], variables: Mapping[str, str]) -> None:
    """Run hooks, one after the other, each in a session of its own.

    Args:
        hooks: what to run.
        variables: for their environments, as ``SNAPORCH_NAME``.

    Raises:
        HookFailed: one failed; those behind it were not begun.
    """
    environment = os.environ | {f"SNAPORCH_{name}": value for name, value in variables.items()}
    for hook in hooks:
        await _run(hook, environment)


async def _run(hook: Hook, environment: Mapping[str, str]) -> None:
    name = " ".join(hook.command)
    with trio.move_on_after(hook.deadline) as scope:
        try:
            done = await trio.run_process(
                hook.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                start_new_session=True,
                deliver_cancel=_end_session,
            )
        except OSError as error:
            raise HookFailed(f"hook {name!r} does not start: {error.strerror}") from None
    if scope.cancelled_caught:
        raise HookFailed(f"hook {name!r} took longer than {hook.deadline:g} s and was ended")
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-WORDS:]
        raise HookFailed(f"hook {name!r} ended with status {done.returncode}" + (f": {said}" if said else ""))


async def _end_session(process: trio.Process) -> None:
    """End a hook and all that it has started: politely, then by force."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with trio.move_on_after(_GRACE, shield=True):
            await process.wait()
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # none is left
