"""The demo's guest: where it comes from, and the way to its serial port."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import trio

from snaporch.errors import SnaporchError, Unsupported
from snaporch.guest.build import GuestBuildError, build_linux, build_tiny
from snaporch.guest.report import Report, parse

WORKLOAD = "rate=50 dirty=20 ram={mib}"  # patterns in so many MiB of its memory, which it checks again and again
POLL_SECONDS = 0.05

Say = Callable[[str], None]


class DemoFailed(SnaporchError):
    """The guest is not what it was at the point.

    Attributes:
        errors: what the guest itself found.
    """

    def __init__(self, what: str, errors: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.errors = tuple(errors)


@attrs.frozen
class Boot:
    """The guest to boot."""

    name: str
    kernel: Path
    initrd: Path | None
    append: str


@attrs.frozen
class Guest:
    """The way to the guest's serial port.

    Commands go in through a FIFO, which any number of QEMUs can have open, as two do in a revert; what the guest
    says is in a log to which each of them appends.
    """

    directory: Path

    @property
    def log(self) -> Path:
        """What the guest has said."""
        return self.directory / "serial.log"

    def make(self) -> tuple[str, ...]:
        """Make the FIFO and return QEMU's arguments for the port."""
        os.mkfifo(self.directory / "serial.in", 0o600)
        (self.directory / "serial.out").symlink_to(os.devnull)
        path, log = (str(each).replace(",", ",,") for each in (self.directory / "serial", self.log))
        return (
            "-chardev",
            f"pipe,id=demo,path={path},logfile={log},logappend=on",
            "-serial",
            "chardev:demo",
        )

    def send(self, command: str) -> None:
        """Type a line."""
        fd = os.open(self.directory / "serial.in", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "w") as port:
            port.write(f"{command}\n")

    def text(self, start: int = 0) -> str:
        """Return what it has said from an offset on."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[start:].decode(errors="replace")

    def said(self) -> int:
        """Return how much it has said: an offset for `text`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def last(self) -> Report:
        """Return its last report."""
        return parse(self.text())[-1]

    async def until(
        self, what: str, holds: Callable[[list[Report]], bool], *, seconds: float, start: int = 0
    ) -> None:
        """Wait until its reports from an offset on are as wanted."""
        with trio.move_on_after(seconds) as scope:
            while not holds(parse(self.text(start))):  # noqa: ASYNC110 - another process writes the file
                await trio.sleep(POLL_SECONDS)
        if scope.cancelled_caught:
            tail = self.text(start).strip().splitlines()[-1:] or ["nothing"]
            raise DemoFailed(f"the guest did not {what} within {seconds:g} s; it last said: {tail[0]}")


async def find_guest(say: Say, *, tiny: bool) -> Boot:
    """Return the guest, built if it is not in the cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snaporch/guest"
    cache = Path(os.environ.get("SNAPORCH_GUEST_CACHE") or home)
    if not tiny:
        say("Building the Linux guest, or finding it built ...")
        try:
            linux = await trio.to_thread.run_sync(build_linux, cache)
        except GuestBuildError as error:
            say(f"Not with Linux: {' '.join(str(error).split())}. With the tiny guest instead.")
        else:
            words = " ".join(f"snaporch.{word}" for word in WORKLOAD.format(mib=64).split())
            return Boot("linux", linux.kernel, linux.initrd, f"console=ttyS0 quiet panic=0 {words}")
    try:
        return Boot("tiny", await trio.to_thread.run_sync(build_tiny, cache), None, WORKLOAD.format(mib=16))
    except GuestBuildError as error:
        raise Unsupported(f"no guest for the demo: {error}") from None
