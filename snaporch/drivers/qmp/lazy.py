"""A guest runs before its memory is there: snaporch's side of it. What is sent, and how, is in `pages`.

    why_not     QEMU itself tries whether it can; the index is made where it is missing
    begin       a page server sends the state of the devices: the guest can run
    finish      waits until QEMU has all pages; a server that was killed, or stands still, gets a successor

The guest waits for whatever is not there. It never gets a page that is not what was saved: at the worst it waits
until it is ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import LazyLoad, LoadsLazily, Progress
from snaporch.drivers.local.filework import remove
from snaporch.drivers.local.process import command_line, find_processes, kill, process_of
from snaporch.drivers.qmp import index, pages
from snaporch.drivers.qmp.protocol import QMP
from snaporch.errors import CommandRefused, DamagedSnapshot, HypervisorError, LoadFailed, OperationFailed
from snaporch.model.record import FileRecord

READY_SECONDS = 20.0  # for a server to start, and
INDEX_RATE = 20 * 2**20  # bytes of its index that it reads in a second, at the least
BEGIN_SECONDS = 60.0  # for the state of the devices
PAUSED_SECONDS = 30.0  # for QEMU to see that its server is gone
STILL_SECONDS = 10.0  # a server says something every half second, unless a read hangs, or it is stopped
ATTEMPTS = 5  # servers in a row that have sent nothing
LOOK_SECONDS = 0.02
_FD = "snaporch-pages"

_servers: dict[str, trio.Process] = {}  # by status file


class LoadsPages(LoadsLazily):
    """The trait of a QEMU machine."""

    qmp: QMP

    async def why_not_lazy(self, load: LazyLoad) -> str:
        """See LoadsLazily."""
        return await why_not(self.qmp, load)

    async def begin_lazily(self, load: LazyLoad) -> None:
        """See LoadsLazily."""
        await begin(self.qmp, load)

    async def finish_lazily(self, load: LazyLoad, progress: Progress) -> None:
        """See LoadsLazily."""
        await finish(self.qmp, load, progress)


class _NotStarted(OperationFailed):
    """A server has ended before it could begin."""


async def why_not(qmp: QMP, load: LazyLoad) -> str:
    """Return why a machine that waits for its memory cannot run before it is there, or an empty string.

    Raises:
        DamagedSnapshot: the memory file, which was read for its index, is not what was saved.
    """
    for each in await qmp.execute("query-memdev"):
        if each["share"]:
            return f"another process may have its RAM ({each.get('id', 'without a name')} is shared)"
    objects = await qmp.execute("qom-list", {"path": "/objects"})
    kinds = {each["type"] for each in objects if "memory-backend" in each["type"]}
    if other := sorted(kinds - {"child<memory-backend-ram>"}):
        return f"its RAM is not plain memory ({other[0][6:-1]})"
    if why := await _with_index(load):
        return why
    try:
        await _set_capabilities(qmp, "events", "postcopy-ram")
    except CommandRefused as error:
        await _set_capabilities(qmp, "events")
        return (
            f"QEMU cannot have pages come as they are needed ({error.description}); it needs /dev/userfaultfd, "
            "`sysctl vm.unprivileged_userfaultfd=1`, or CAP_SYS_PTRACE"
        )
    return ""


async def _with_index(load: LazyLoad) -> str:
    """See `_index`; where this is cancelled it ends soon, however large the file is."""
    stop, why, damaged = threading.Event(), "", None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_set_at_end, stop)
        try:
            why = await trio.to_thread.run_sync(_index, load.memory, load.index, stop)
        except DamagedSnapshot as error:
            damaged = error  # out of the nursery, which would wrap it in a group
        nursery.cancel_scope.cancel()
    if damaged is not None:
        raise damaged
    return why


async def _set_at_end(event: threading.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()


def _index(memory: FileRecord, path: str, stop: threading.Event) -> str:
    """Make the index where it is not there, or not of this file; return why there can be none.

    Raises:
        DamagedSnapshot: the memory file is not what was saved.
    """
    with suppress(OSError, ValueError, LookupError):
        found = index.load(path)
        if (found.size, found.checksum) == (memory.size, memory.checksum):
            return ""
    try:
        made = index.build(memory.path, memory.checksum, stop.is_set)
        remove(path)
        index.save(made, path)
    except index.OtherFile as error:
        raise DamagedSnapshot(str(error), memory.path) from None
    except index.NotUnderstood as error:
        return f"its memory file cannot be read by page: {error}"
    except OSError as error:
        return f"there is no index of its memory file: {error.strerror or error}"
    return ""


async def _set_capabilities(qmp: QMP, *on: str) -> None:
    capabilities = await qmp.execute("query-migrate-capabilities")
    wanted = [c | {"state": c["capability"] in on} for c in capabilities]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


@attrs.frozen
class _Said:
    """What a server's status file says.

    Attributes:
        state: of `pages`.
        done: bytes of pages that were sent.
        total: in all.
        beat: it grows.
        error: why it gave up.
    """

    state: str = pages.LOADING
    done: int = 0
    total: int = 0
    beat: int = 0
    error: str = ""


def _said(status: str) -> _Said:
    with suppress(OSError, ValueError):  # nothing yet, or just being written
        return _Said(**json.loads(Path(status).read_text()))
    return _Said()


def _make_status(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b" " * pages.BYTES)
    finally:
        os.close(fd)


async def _serve(qmp: QMP, load: LazyLoad, how: str) -> None:
    """Start a server, and give QEMU its end of the connection."""
    seconds = READY_SECONDS + os.path.getsize(load.index) / INDEX_RATE
    _make_status(load.status)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = await trio.lowlevel.open_process(
            [
                *(sys.executable, "-I", pages.__file__),
                *(load.memory.path, load.index, load.status, str(ours.fileno()), how),
            ],
            pass_fds=(ours.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _servers[load.status] = server
        ours.close()
        said = b""
        if server.stdout is not None:
            async with server.stdout as output:
                with trio.move_on_after(seconds):
                    said = bytes(await output.receive_some())
        if said.strip() != pages.READY:
            words = said.decode(errors="replace").strip().splitlines() or [_said(load.status).error]
            raise _NotStarted(
                f"the process that serves {load.memory.path} does not start: {words[-1] or 'it said nothing'}"
            )
        await qmp.execute("getfd", {"fdname": _FD}, fds=(theirs.fileno(),))


async def begin(qmp: QMP, load: LazyLoad) -> None:
    """Give a machine the state of its devices, and all that it asks for from then on: it is paused, at the point.

    Raises:
        LoadFailed: QEMU does not take it.
        OperationFailed: the memory file cannot be read.
    """
    await _serve(qmp, load, pages.BEGIN)
    await qmp.execute("migrate-incoming", {"uri": f"fd:{_FD}"})
    with _damage_first(load), trio.move_on_after(BEGIN_SECONDS):
        while (await qmp.execute("query-status"))["status"] != "paused":
            _check(load)
            await _check_migration(qmp)
            await trio.sleep(LOOK_SECONDS / 10)
        return
    raise LoadFailed(f"{qmp.label}: QEMU did not take the state of the devices within {BEGIN_SECONDS:g} s")


def _check(load: LazyLoad) -> _Said:
    """Return what the server says; raise what has made it give up."""
    said = _said(load.status)
    if said.state == pages.DAMAGED:
        raise DamagedSnapshot(said.error, load.memory.path)
    if said.state == pages.FAILED:
        raise OperationFailed(said.error)
    return said


@contextmanager
def _damage_first(load: LazyLoad) -> Iterator[None]:
    """Say that the file is damaged where that is why QEMU does not answer: it waits for a page itself."""
    try:
        yield
    except HypervisorError:
        if _said(load.status).state == pages.DAMAGED:
            _check(load)
        raise


async def _check_migration(qmp: QMP) -> str:
    info: dict[str, Any] = await qmp.execute("query-migrate")
    if (status := str(info.get("status", "none"))) in {"failed", "cancelled"}:
        words = info.get("error-desc", "no reason given")
        raise LoadFailed(f"{qmp.label}: QEMU could not load the memory: {words}")
    return status


async def finish(qmp: QMP, load: LazyLoad, progress: Progress) -> None:
    """Return when all memory is there.

    Raises:
        OperationFailed: the memory file is not what was saved, or cannot be read.
        HypervisorError: QEMU has no use for it any more.
    """
    with _damage_first(load):
        await _all_sent(qmp, load, progress)
    total = _said(load.status).total
    progress(total, total)
    await _set_capabilities(qmp, "events")
    await end(load.status)


async def _all_sent(qmp: QMP, load: LazyLoad, progress: Progress) -> None:
    most, beat, heard, attempts = -1, -1, trio.current_time(), 0
    while await _check_migration(qmp) != "completed":
        said = _check(load)
        progress(said.done, said.total)
        if said.beat != beat:
            beat, heard = said.beat, trio.current_time()
        if said.done > most:
            most, attempts = said.done, 0
        still = trio.current_time() - heard > STILL_SECONDS
        if still or not _lives(load.status):
            if attempts >= ATTEMPTS:
                raise OperationFailed(f"the process that serves {load.memory.path} was killed {attempts} times")
            attempts += 1
            await _replace(qmp, load)
            beat, heard = -1, trio.current_time()
        await trio.sleep(LOOK_SECONDS)


def _lives(status: str) -> bool:
    server = _servers.get(status)
    return server is not None and server.poll() is None


async def _replace(qmp: QMP, load: LazyLoad) -> None:
    """Have another server go on, where one was killed, or stands still."""
    await _kill(load.status)
    with trio.move_on_after(PAUSED_SECONDS) as scope:
        while (status := await _check_migration(qmp)) != "postcopy-paused":
            if status == "completed":
                return
            await trio.sleep(LOOK_SECONDS)
    if scope.cancelled_caught:
        raise HypervisorError(
            f"{qmp.label}: QEMU has not seen within {PAUSED_SECONDS:g} s that its pages stay away"
        )
    with suppress(_NotStarted):  # it gets a successor, too
        await _serve(qmp, load, pages.RESUME)
        await qmp.execute("migrate-recover", {"uri": f"fd:{_FD}"})


async def _kill(status: str) -> None:
    if (server := _servers.pop(status, None)) is not None:
        server.kill()
        await server.wait()
    name = os.path.basename(pages.__file__)
    for pid in find_processes(status):  # of a snaporch that was killed
        found = process_of(pid)
        if found is not None and any(os.path.basename(word) == name for word in command_line(pid)):
            await kill(found)


async def end(status: str) -> None:
    """End the server of a status file, wherever it came from, and remove the file; there may be none."""
    if os.path.exists(status):
        await _kill(status)
        with suppress(FileNotFoundError):
            os.unlink(status)
