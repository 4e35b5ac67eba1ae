"""Kinds of images, and what can be done with each: one table, by which verbs are refused. No I/O.

What is in the table is refused, before anything is touched, in the words of the table; everything else is done. An
image may be of several kinds at once. docs/reference/images.md has the table, and a test compares the two.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping

import attrs


class Verb(enum.StrEnum):
    """What is done with an image."""

    START = "start"
    CREATE = "create"
    INTERNAL = "create --internal"
    REVERT = "revert"
    VERIFY = "verify --boot"
    MERGE = "delete, flatten"


class Kind(enum.StrEnum):
    """What an image is, or has."""

    QCOW2 = "qcow2"
    RAW = "raw file"
    BLOCK = "block device"
    INSIDE = "snapshots of others inside"
    BITMAPS = "dirty bitmaps"
    ENCRYPTED = "encrypted"
    SPLIT = "external data file"
    FULL = "as many snapshots inside as it counts"
    UNTYPED = "backing file without a format"
    FOREIGN = "other format"
    SLICED = "offset or size in a raw file"
    FILTERED = "filter over the image"
    TEMPORARY = "temporary (-snapshot)"
    REMOTE = "no file of this host (nbd, ssh, http, vvfat)"


_WRITTEN = {Verb.CREATE, Verb.INTERNAL}
_NO_ROOM = "only inside a qcow2 image is there room for a snapshot"
_BITMAPS = (
    "it has dirty bitmaps ({detail}), which would miss what is written to an overlay: an incremental backup would "
    "lack that; remove them (`qemu-img bitmap --remove`, while it runs `block-dirty-bitmap-remove`), and let the "
    "next backup be a full one"
)
_CLEAR = {*_WRITTEN, Verb.REVERT, Verb.VERIFY, Verb.MERGE}
_ENCRYPTED = "it is encrypted ({detail}), and an overlay would hold in clear text what the guest writes"
_SPLIT = "its data is in a second file ({detail}), which no snapshot would hold and no checksum would cover"
_FULL = "it has no room for one more snapshot inside: its clusters are counted in too few bits ({detail})"
_UNTYPED = (
    "it does not say what format its backing file has, so that it would be guessed; say it: "
    "`qemu-img rebase -u -F FORMAT -b {detail} IMAGE`"
)
_FOREIGN = "its format is {detail}: only qcow2 and raw images are known"
_SLICED = "it is a part of a file ({detail}), which an overlay's header cannot name"
_FILTERED = "the guest reads it through {detail}, which a revert could not put in place again"
_TEMPORARY = "QEMU keeps it in a temporary file that has no name: start the guest without -snapshot"
_REMOTE = "it is no file of this host that can be looked at ({detail})"

TABLE: Mapping[Kind, Mapping[Verb, str]] = {
    Kind.QCOW2: {},
    Kind.RAW: {Verb.INTERNAL: _NO_ROOM},
    Kind.BLOCK: {Verb.INTERNAL: _NO_ROOM},
    Kind.INSIDE: {Verb.MERGE: "it has {detail} inside, which is not snaporch's"},
    Kind.BITMAPS: dict.fromkeys((*_WRITTEN, Verb.MERGE), _BITMAPS),
    Kind.ENCRYPTED: dict.fromkeys(_CLEAR, _ENCRYPTED),
    Kind.SPLIT: dict.fromkeys((*_WRITTEN, Verb.MERGE), _SPLIT),
    Kind.FULL: {Verb.INTERNAL: _FULL},
    Kind.UNTYPED: dict.fromkeys((Verb.START, *_WRITTEN, Verb.MERGE), _UNTYPED),
    Kind.FOREIGN: dict.fromkeys((*_WRITTEN, Verb.MERGE), _FOREIGN),
    Kind.SLICED: dict.fromkeys(_WRITTEN, _SLICED),
    Kind.FILTERED: dict.fromkeys(_WRITTEN, _FILTERED),
    Kind.TEMPORARY: dict.fromkeys(_WRITTEN, _TEMPORARY),
    Kind.REMOTE: dict.fromkeys((*_WRITTEN, Verb.MERGE), _REMOTE),
}
_ONLY_ACTIVE = frozenset({Kind.BITMAPS, Kind.RAW, Kind.BLOCK, Kind.FULL})
"""Kinds that matter where an image is written to, and not below that."""


@attrs.frozen
class Traced:
    """A file that a reader of an image reads, as it is at this moment.

    Attributes:
        path: the name by which it was reached; for what is no file of this host, what names it.
        identity: what it is, whatever its name: device and inode of a file, numbers of a block device. It holds
            until the next boot or mount, so it is looked up anew each time.
        kinds: each with its details.
        same: it has the same bytes as what was reached before it: the file of a loop device.
    """

    path: str
    identity: str
    kinds: Mapping[Kind, str] = attrs.field(factory=dict)
    same: bool = False

    def refused(self, verb: Verb, *, below: bool = False) -> str:
        """Return why a verb is refused, or an empty string; `below`: another image of the chain is over it."""
        for kind, detail in self.kinds.items():
            if verb in TABLE[kind] and not (below and kind in _ONLY_ACTIVE):
                return f"{self.path}: {TABLE[kind][verb].format(detail=detail)}"
        return ""


def refusal(verb: Verb, chain: Iterable[Traced]) -> str:
    """Return why a verb is refused for a chain, the active image first, or an empty string."""
    found = (link.refused(verb, below=number > 0) for number, link in enumerate(chain))
    return next(filter(None, found), "")


def _rows() -> Iterator[str]:
    notes: dict[str, int] = {}
    yield "| image | " + " | ".join(Verb) + " |"
    yield "|---|" + "---|" * len(Verb)
    for kind, refused in TABLE.items():
        cells = [
            f"refused [{notes.setdefault(refused[verb], len(notes) + 1)}]" if verb in refused else "done"
            for verb in Verb
        ]
        yield f"| {kind} | {' | '.join(cells)} |"
    yield ""
    for words, number in notes.items():
        yield f"{number}. {words.format(detail='…')}"


def table() -> str:
    """Return the table in Markdown, with the words of each refusal; docs/reference/images.md holds it."""
    return "\n".join(_rows()) + "\n"
