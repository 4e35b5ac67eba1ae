"""``snaporch domain``: the domains themselves."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from cyclopts import App

from snaporch.cli.session import Answer, Here
from snaporch.errors import HypervisorError, InvalidInput, Refused, TargetExists
from snaporch.model import documents
from snaporch.model.domain import DomainInfo
from snaporch.model.limits import SHUTDOWN_SECONDS
from snaporch.model.names import check_socket
from snaporch.model.rfc import DeleteFlag

app = App(name="domain", help="Define, start, stop and look at domains.")


def _state(info: DomainInfo) -> Answer:
    return Answer(documents.domain(info), lambda human: human.line(f"{info.name} is {info.state}"))


@app.command
async def define(file: Path, /, *, session: Here) -> Answer:
    """Make a domain known, from its definition in a TOML file; an inactive one gets the new definition."""
    async with session.open(make=True) as orchestrator:
        record = await orchestrator.define(file)
        return _state(await orchestrator.domain_info(record.name))


@app.command
async def undefine(name: str, /, *, snapshots: bool = False, discard: bool = False, session: Here) -> Answer:
    """Forget an inactive domain that has no snapshots; its images stay.

    Parameters
    ----------
    name
        The domain.
    snapshots
        First delete all of its snapshots; what the disks hold now stays.
    discard
        Of a clone: remove what its guest has written since it was cloned, too.
    """
    async with session.open() as orchestrator:
        if snapshots:
            if await orchestrator.is_active(name):
                raise Refused(f"{name} is running: shut it down first; no snapshot was deleted")
            for first in (await orchestrator.tree(name)).get(None, ()):
                await orchestrator.delete(name, first, DeleteFlag.CHILDREN)
        await orchestrator.undefine(name, discard=discard)
    said = (
        f"{name} is forgotten, and its images are removed" if discard else f"{name} is forgotten; its images stay"
    )
    return Answer({"name": name, "undefined": True}, lambda human: human.line(said))


@app.command
async def start(name: str, /, *, paused: bool = False, session: Here) -> Answer:
    """Start an inactive domain; it runs on when this command is done.

    Parameters
    ----------
    name
        The domain.
    paused
        Stand before the first instruction.
    """
    async with session.open() as orchestrator:
        return _state(await orchestrator.start(name, paused=paused))


@app.command
async def shutdown(
    name: str, /, *, timeout: float = SHUTDOWN_SECONDS, force_after: float | None = None, session: Here
) -> Answer:
    """Ask the guest to power off, and wait until it has.

    Parameters
    ----------
    name
        The domain.
    timeout
        Seconds to wait; a guest that has not powered off by then runs on, and the exit status is 1.
    force_after
        Seconds after which the domain is ended as by `destroy` instead.
    """
    seconds = timeout if force_after is None else force_after
    if not 0 < seconds < float("inf"):
        raise InvalidInput("--timeout, --force-after: seconds, more than 0")
    async with session.open() as orchestrator:
        try:
            return _state(await orchestrator.shutdown(name, timeout=seconds))
        except HypervisorError:
            if force_after is None:
                raise
        return _state(await orchestrator.destroy(name))


@app.command
async def logs(name: str, /, *, lines: int = 50, session: Here) -> Answer:
    """Show the end of what a domain's hypervisor has logged.

    Parameters
    ----------
    name
        The domain.
    lines
        So many lines, the last.
    """
    if lines < 1:
        raise InvalidInput(f"--lines {lines}: at least 1")
    async with session.look() as orchestrator:
        await orchestrator.domain_info(name)
        found = [path for path in sorted((orchestrator.root / name).glob("*.log")) if path.is_file()]
    ends = {str(path): deque(path.read_text(errors="replace").splitlines(), lines) for path in found}
    documents_ = [{"file": file, "lines": list(end)} for file, end in ends.items()]
    text = [line for file, end in ends.items() for line in (f"{file}:", *end)]
    return Answer(documents_, lambda human: human.lines(text or [f"{name} has logged nothing"]))


@app.command
async def destroy(name: str, /, *, session: Here) -> Answer:
    """End a domain at once, as pulling the plug does."""
    async with session.open() as orchestrator:
        return _state(await orchestrator.destroy(name))


@app.command
async def pause(name: str, /, *, session: Here) -> Answer:
    """Stop the CPUs of a running domain."""
    async with session.open() as orchestrator:
        return _state(await orchestrator.pause(name))


@app.command
async def resume(name: str, /, *, session: Here) -> Answer:
    """Let the CPUs of a paused domain run."""
    async with session.open() as orchestrator:
        return _state(await orchestrator.resume(name))


@app.command
async def reset(name: str, /, *, session: Here) -> Answer:
    """Boot the guest of a running domain anew, as the reset button does: what it has not written yet is lost."""
    async with session.open() as orchestrator:
        return _state(await orchestrator.reset(name))


@app.command
async def reboot(name: str, /, *, timeout: float = SHUTDOWN_SECONDS, session: Here) -> Answer:
    """Ask the guest to power off, wait until it has, and start it on the same disks.

    Parameters
    ----------
    name
        The domain.
    timeout
        Seconds to wait; a guest that has not powered off by then runs on, and the exit status is 1.
    """
    if not 0 < timeout < float("inf"):
        raise InvalidInput("--timeout: seconds, more than 0")
    async with session.open() as orchestrator:
        return _state(await orchestrator.reboot(name, timeout=timeout))


@app.command
async def screenshot(name: str, file: Path, /, *, session: Here) -> Answer:
    """Take a picture of the screen of a running domain.

    Parameters
    ----------
    name
        The domain.
    file
        Where it goes, as a PNG; there must be nothing.
    """
    async with session.open() as orchestrator:
        picture = await orchestrator.screenshot(name)
    try:
        with file.open("xb") as made:
            made.write(picture)
    except FileExistsError:
        raise TargetExists(f"{file} is there already; name another file") from None
    document = {"domain": name, "file": str(file), "bytes": len(picture)}
    return Answer(document, lambda human: human.line(f"{file}: {len(picture):,} bytes"))


@app.command
async def tag(name: str, /, *tags: str, session: Here) -> Answer:
    """Give a domain these tags, in place of those that it has; batches select domains by them."""
    async with session.open() as orchestrator:
        info = await orchestrator.tag(name, tags)
    said = ", ".join(info.tags) or "none"
    return Answer(documents.domain(info), lambda human: human.line(f"{info.name} has tags: {said}"))


@app.command
async def depth(name: str, images: int, /, *, session: Here) -> Answer:
    """Keep a domain's chains short: flatten them onto their bases when a create makes one too long.

    Parameters
    ----------
    name
        The domain.
    images
        How many images a chain may have; 0: as many as there are.
    """
    async with session.open() as orchestrator:
        info = await orchestrator.limit_depth(name, images)
    said = f"at {info.max_depth} images or fewer" if info.max_depth else "as long as they become"
    return Answer(documents.domain(info), lambda human: human.line(f"{info.name} keeps its chains {said}"))


@app.command
async def attach(
    name: str,
    /,
    *,
    qmp: Path | None = None,
    driver: str = "",
    uri: str = "",
    of: str = "",
    records: bool = True,
    session: Here,
) -> Answer:
    """Take charge of a domain that something else started.

    Parameters
    ----------
    name
        The name that it is to have here.
    qmp
        Its QMP socket (QEMU: -qmp unix:SOCKET,server=on,wait=off).
    driver
        The driver of the hypervisor that runs it; by default qemu.
    uri
        Of the manager that has it, where the driver has managers.
    of
        Its name there, where that is another one.
    records
        Put its snapshots into its manager's list too (libvirt: `virsh snapshot-list`). While they are there
        `virsh undefine` and live migration refuse the domain.
    """
    if not (qmp or driver or uri or of):
        raise InvalidInput(
            f"{name}: say how to reach it: --qmp SOCKET for a QEMU, --driver DRIVER for another hypervisor"
        )
    socket = "" if qmp is None else os.path.abspath(check_socket(str(qmp)))
    async with session.open(make=True) as orchestrator:
        info = await orchestrator.attach(name, socket, driver=driver or "qemu", uri=uri, of=of, records=records)
    return Answer(documents.domain(info), lambda human: human.attached(info))


@app.command
async def sync(name: str, /, *, write_records: bool = False, remove_records: bool = False, session: Here) -> Answer:
    """Follow what others have done to a domain and its snapshots, and repair its manager's list of them.

    Parameters
    ----------
    name
        The domain.
    write_records
        Put its snapshots into its manager's list from now on.
    remove_records
        Take its snapshots out of that list, and leave them out from now on.
    """
    if write_records and remove_records:
        raise InvalidInput("--write-records and --remove-records exclude each other")
    chosen = write_records if write_records or remove_records else None
    async with session.open() as orchestrator:
        report = await orchestrator.sync(name, records=chosen)
    return Answer(report, lambda human: human.synced(report))


@app.command
async def discover(*, driver: str = "", session: Here) -> Answer:
    """List what could be attached to, and what stands in the way.

    Parameters
    ----------
    driver
        Only by this driver: qemu or libvirt.
    """
    async with session.look() as orchestrator:
        found = await orchestrator.discover(driver)
    return Answer(found, lambda human: human.discovered(found))


@app.command(name="list")
async def list_(*, names: bool = False, session: Here) -> Answer:
    """List all domains.

    Parameters
    ----------
    names
        Only the names, one a line.
    """
    async with session.look() as orchestrator:
        infos = await orchestrator.domains()
        lost = await orchestrator.unreadable(kind="domain")
    if names:
        known = [info.name for info in infos]
        return Answer(known, lambda human: human.lines(known))
    return Answer(documents.domains(infos, lost), lambda human: human.domains(infos, lost))


@app.command
async def show(name: str, /, *, session: Here) -> Answer:
    """Show a domain: its state, its disks with their chains, its current snapshot."""
    async with session.look() as orchestrator:
        info = await orchestrator.domain_info(name)
    return Answer(documents.domain(info), lambda human: human.domain(info))
