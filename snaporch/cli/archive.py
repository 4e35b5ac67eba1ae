"""``snaporch export``, ``export-disk``, ``import``: snapshots in one file."""

from __future__ import annotations

import os
import sys
from io import RawIOBase
from pathlib import Path
from typing import Annotated, Literal, cast

from cyclopts import Parameter

from snaporch.cli import progress
from snaporch.cli.session import Answer, Here, Session
from snaporch.errors import InvalidInput
from snaporch.model.archive import Exported

_STREAM = "-"
File = Annotated[str, Parameter(allow_leading_hyphen=True)]  # as otherwise `-` is an option that is not known


def _output(session: Session, file: str) -> str | RawIOBase:
    """Return what to write to: a path, or standard output, where then nothing else goes."""
    if file != _STREAM:
        if file.startswith("-"):
            raise InvalidInput(f"there is no option {file}; a file of this name is ./{file}")
        return os.path.abspath(file)
    if sys.stdout is None:
        raise InvalidInput("standard output is closed: name a file")
    if sys.stdout.isatty():
        raise InvalidInput("standard output is a terminal: name a file, or pipe the archive to a program")
    if session.as_json:
        raise InvalidInput("standard output is the archive's: leave out --json, or name a file")
    return cast("RawIOBase", sys.stdout.buffer)


def _answer(session: Session, done: Exported, file: str) -> Answer:
    what = " and ".join(filter(None, ["memory" if done.memory else "", ", ".join(done.disks)]))
    said = f"{done.domain} {done.name}: {what} in {done.file}"
    if file == _STREAM:
        session.say(f"snaporch: {said.removesuffix(' in -')} written")
        return Answer(done, lambda human: human.lines(()))
    return Answer(done, lambda human: human.line(f"{said}, {human.human_size(done.size)}"))


async def export(domain: str, name: str, file: File, /, *, session: Here) -> Answer:
    """Write a snapshot to one file, an archive that another root or host can take over with `import`.

    Parameters
    ----------
    domain
        The domain.
    name
        The snapshot.
    file
        The archive, a new file; `-` is standard output.
    """
    output = _output(session, file)
    session.about((domain,), name)
    async with session.open_here() as orchestrator, progress.shown(orchestrator, domain):
        done = await orchestrator.export(domain, name, output)
    return _answer(session, done, file)


async def export_disk(
    domain: str,
    name: str,
    target: str,
    file: File,
    /,
    *,
    format_: Annotated[Literal["qcow2", "raw"], Parameter(name="--format")] = "qcow2",
    session: Here,
) -> Answer:
    """Copy one disk of a snapshot, whole, to an image that needs no other.

    Parameters
    ----------
    domain
        The domain.
    name
        The snapshot.
    target
        The disk, for example vda.
    file
        The image, a new file; `-` is standard output.
    format_
        What the image is.
    """
    output = _output(session, file)
    session.about((domain,), name)
    async with session.open_here() as orchestrator, progress.shown(orchestrator, domain):
        done = await orchestrator.export_disk(domain, name, target, output, format_=format_)
    return _answer(session, done, file)


async def import_(
    file: Path,
    /,
    *,
    as_: Annotated[str, Parameter(name="--as")] = "",
    trust: bool = False,
    same_identity: bool = False,
    disks_only: bool = False,
    session: Here,
) -> Answer:
    """Make a new domain, with one snapshot, of an archive that `export` has written; `revert` then goes to it.

    Parameters
    ----------
    file
        The archive.
    as_
        The domain's name; by default the one that it had.
    trust
        Take over the emulator and the further QEMU options that the archive names; they run as they say.
    same_identity
        Keep the domain's UUID: for a domain that moves.
    disks_only
        Leave out the memory.
    """
    async with session.open_here(make=True) as orchestrator:
        done = await orchestrator.import_archive(
            file, name=as_, trust=trust, same_identity=same_identity, disks_only=disks_only
        )
    for words in done.dropped:
        session.say(f"snaporch: not taken over: {words}; `snaporch import --trust` takes it")
    said = f"{done.domain} is there, inactive, with {done.name}: `snaporch revert {done.domain} {done.name}`"
    return Answer(done, lambda human: human.line(said))
