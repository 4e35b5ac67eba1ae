"""A TPM for QEMU: swtpm, one for each QEMU, and the directory that it keeps the TPM's state in.

A pair of connected sockets is made before both, each gets its end, and nobody else has one: when its QEMU is gone,
whatever has ended it, swtpm sees that and ends as well. It outlives snaporch as QEMU does.

A running TPM's state goes with the machine's memory: QEMU has swtpm give it, and another swtpm take it, whatever
that one's directory has. A machine that boots goes on with what is in the directory. What is saved of one that does
not run is the one file there that survives without power; swtpm writes a new one each time, which then takes the
name.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import trio

from snaporch.drivers.base import Driver, Launch
from snaporch.drivers.local import process
from snaporch.drivers.local.durable import sync_parent
from snaporch.drivers.qmp.process import last_words
from snaporch.errors import HypervisorError, Refused, Unsupported

LOG = "swtpm.log"
"""The name of the file that the swtpms of a TPM append their words to, in its directory."""

STATE = "tpm2-00.permall"
_LOCK = ".lock"  # swtpm has it open, and locked, for as long as it runs
END_SECONDS = 5.0  # of a swtpm whose QEMU is gone; a few milliseconds, when nobody else works on the host
LOOK_SECONDS = 0.01

_children: set[int] = set()


def missing() -> str:
    """Return why no TPM can be started here, or an empty string."""
    return "" if shutil.which("swtpm") else "swtpm is not installed (Debian: apt install swtpm)"


@attrs.define
class Link:
    """The connection of a QEMU with its swtpm.

    Attributes:
        directory: of the TPM's state.
    """

    directory: str
    _ends: tuple[socket.socket, socket.socket] = attrs.field(factory=socket.socketpair)
    _since: int = 0
    _swtpm: process.LocalProcess | None = None

    @property
    def qemu(self) -> int:
        """The descriptor for QEMU to inherit."""
        return self._ends[0].fileno()

    def start(self) -> None:
        """Start swtpm; QEMU has been started. If this fails, QEMU ends by itself: nobody is at the other end.

        Raises:
            HypervisorError: it cannot be started.
        """
        try:
            self._since = self._log.stat().st_size if self._log.exists() else 0
            place = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                pid = _spawn(self._ends[1].fileno(), place, self._log)
            finally:
                os.close(place)
        except OSError as error:
            raise HypervisorError(f"swtpm cannot be started on {self.directory}: {error.strerror}") from None
        finally:
            self.close()
        _children.add(pid)
        self._swtpm = process.process_of(pid)

    async def end(self) -> None:
        """End swtpm, whose QEMU is gone: if the two have not spoken, it does not notice."""
        if self._swtpm is not None:
            await process.kill(self._swtpm)

    @property
    def _log(self) -> Path:
        return Path(self.directory, LOG)

    def words(self) -> str:
        """Return what swtpm has said since it was started; it says nothing as long as all is well."""
        words = last_words(self._log, self._since)
        return f"swtpm: {words}" if words else ""

    def check(self) -> None:
        """Refuse a TPM that has not come up, with which QEMU starts a machine all the same.

        Raises:
            HypervisorError: so it is.
        """
        if words := self.words():
            raise HypervisorError(words)

    def close(self) -> None:
        """Have neither end any longer: each of the two sees when the other one ends."""
        for end in self._ends:
            end.close()


def _spawn(end: int, place: int, log: Path) -> int:
    # The directory by its descriptor: swtpm takes a comma in a path for the end of it.
    words = ["swtpm", "socket", "--tpm2", "--terminate"]
    words += ["--ctrl", f"type=unixio,clientfd={end}", "--tpmstate", f"dir=/proc/self/fd/{place},mode=0600"]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.posix_spawnp(
        words[0],
        words,
        os.environ,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in (end, place)),  # onto itself: inherited
        ],
    )


@asynccontextmanager
async def linked(launch: Launch) -> AsyncIterator[Link | None]:
    """Yield a connection for a machine that is to have a TPM, else None.

    Raises:
        Unsupported: there is no swtpm.
    """
    if not launch.tpm:
        yield None
        return
    if why := missing():
        raise Unsupported(f"{launch.definition.name}: {why}")
    await ended(launch.tpm)  # the last one's may not have seen yet that its QEMU is gone
    link = Link(launch.tpm)
    try:
        yield link
    finally:
        link.close()


async def ended(directory: str) -> None:
    """Return when no swtpm has a directory any more; the QEMU of one that has is gone.

    One whose QEMU was gone before the two had spoken does not end by itself.
    """
    _reap()
    lock = os.path.realpath(f"{directory}/{_LOCK}")
    if not os.path.exists(lock):
        return
    with trio.move_on_after(END_SECONDS):
        while await trio.to_thread.run_sync(process.writers, [lock]):  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(LOOK_SECONDS)
        _reap()
        return
    for pid, _ in await trio.to_thread.run_sync(process.writers, [lock]):
        if (found := process.process_of(pid)) is not None:
            await process.kill(found)


def _reap() -> None:
    """Collect those that were started here and have ended."""
    for pid in tuple(_children):
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                _children.discard(pid)
        except ChildProcessError:
            _children.discard(pid)


def make(directory: str, copy: str) -> None:
    """See Driver.make_tpm."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if copy and os.stat(copy).st_size:
        copied(copy, f"{directory}/{STATE}.new", durable=True)
        os.replace(f"{directory}/{STATE}.new", f"{directory}/{STATE}")
        sync_parent(f"{directory}/{STATE}")
    sync_parent(directory)


def copied(path: str, to: str, *, durable: bool) -> tuple[int, ...]:
    """Copy a file, whose name another may take meanwhile; return which one it was."""
    with suppress(FileNotFoundError):
        os.unlink(to)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(path, "rb") as state, open(os.open(to, flags, 0o600), "wb") as new:
        shutil.copyfileobj(state, new)
        new.flush()
        if durable:
            os.fsync(new.fileno())
        return _identity(os.fstat(state.fileno()))


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def identity(directory: str) -> tuple[int, ...]:
    """See Driver.tpm_identity."""
    return _identity(os.stat(f"{directory}/{STATE}"))


def is_new(directory: str) -> bool:
    """Return whether a TPM has never been started."""
    return not os.listdir(directory)


def check(directory: str) -> None:
    """See Driver.check_tpm."""
    if not os.path.isdir(directory) or (STATE not in os.listdir(directory) and not is_new(directory)):
        raise Refused(f"the state of its TPM is not there: {directory}/{STATE}")


def remove(directory: str) -> None:
    """Remove a directory and what swtpm has left in it; nothing else, should there be something."""
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if name in {_LOCK, LOG} or name.startswith(("tpm2-00.", "TMP")):
                os.unlink(f"{directory}/{name}")
        with suppress(OSError):  # there is something else, which is somebody's
            os.rmdir(directory)
        sync_parent(directory)


class Tpms(Driver):
    """The part of QEMU's driver that has to do with TPMs of domains."""

    __slots__ = ()

    def need_tpm(self, name: str) -> None:
        """See Driver."""
        if why := missing():
            raise Unsupported(f"{name}: {why}")

    async def make_tpm(self, directory: str, copy: str = "") -> None:
        """See Driver."""
        await self.storage.make_directory(os.path.dirname(directory))
        await trio.to_thread.run_sync(make, directory, copy)

    async def check_tpm(self, directory: str) -> None:
        """See Driver."""
        await ended(directory)
        check(directory)

    async def copy_tpm(self, directory: str, path: str, *, runs: bool) -> tuple[int, ...]:
        """See Driver."""
        if not runs:
            await self.check_tpm(directory)
            if is_new(directory):  # nothing is what it holds
                await self.storage.make_file(path)
                return ()
        return await trio.to_thread.run_sync(partial(copied, f"{directory}/{STATE}", path, durable=False))

    async def tpm_identity(self, directory: str) -> tuple[int, ...]:
        """See Driver."""
        return await trio.to_thread.run_sync(identity, directory)

    async def remove_tpm(self, directory: str) -> None:
        """See Driver."""
        await ended(directory)
        await trio.to_thread.run_sync(remove, directory)
