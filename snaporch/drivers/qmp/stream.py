"""Guest memory from QEMU's migration to a sealed file.

    QEMU migration thread -> pipe -> sink process (O_DIRECT, checksum) -> memory file

Rules (the reasons are in docs/explanation/point.md):

1. Every capability is set explicitly before a stream, and the earlier values are put back after it: a
   capability that another client has left on ruins the next stream silently.
2. Status ``active`` is not the point. With background-snapshot the point is complete when the first page has been
   sent; `armed` says why.
3. A migration that was ordered and not answered may run: `abort` ends whatever is there.
4. The pipe is emptied until QEMU is through with it, whatever else fails; a read end stays open in QEMU itself, so
   that even with snaporch and the sink both killed it meets a full pipe and never a broken one.
5. QEMU before 9.0 must never have a background migration cancelled or failed: it keeps RAM write-protected, and the
   guest freezes at its next write. There a stream is ended by letting it run out.
6. QEMU before 10.0 must not have a precopy cancelled that is just coming to its end: its thread stops the guest,
   makes the images inactive, finds itself cancelled, and lets the guest run; QEMU aborts at the guest's next write.
   So the guest is stopped by snaporch for that moment, and an end that has begun is waited for.
7. A stream that has begun while the guest ran has its point within our stop only if its status, asked after
   ``stop`` has answered, still is ``setup``. If not, QEMU may let the guest run by itself until it is cancelled.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch.drivers.base import Progress, Stream, StreamPlan
from snaporch.drivers.local.durable import identity
from snaporch.drivers.local.filework import remove
from snaporch.drivers.local.hugepages import collapse
from snaporch.drivers.local.process import command_line, find_processes, kill, process_of, wait_gone
from snaporch.drivers.qmp import sink
from snaporch.drivers.qmp.flash import stores, written
from snaporch.drivers.qmp.given_up import STANDS, take_back
from snaporch.drivers.qmp.protocol import QMP
from snaporch.drivers.qmp.subscription import Subscription
from snaporch.errors import (
    CommandRefused,
    ConnectionGone,
    DeadlineExceeded,
    HypervisorError,
    OperationFailed,
    OutcomeUnknown,
)
from snaporch.model.record import FileRecord
from snaporch.model.request import Strategy

UNLIMITED = 0  # as max-bandwidth; QEMU's own default is 128 MiB/s
PIPE_SIZES = (16 * 2**20, 2**20)  # root may have any; /proc/sys/fs/pipe-max-size is mostly 1 MiB
READY_SECONDS = 20.0  # for the sink to start
SINK_SECONDS = 60.0  # after its pipe has ended the sink has at most its ring and one fsync to write
HUGE_PAGES_SECONDS = 2.0  # for what the guest is still to get back of them when the file is written
PROGRESS_SECONDS = 0.1
FINALIZE_SECONDS = 0.001  # a guest is paused
ARM_SECONDS = 60.0  # cold pages take 100 ms a GiB
DOWNTIME_MS = 300  # precopy: the pause that QEMU aims at; its own default
_OVER = frozenset({"completed", "failed", "cancelled", "none"})


def _make_pipe() -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    for size in PIPE_SIZES:
        with suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, size)
            break
    return read, write


def _kept_pipe(pid: int) -> int | None:
    """Open the read end that a process keeps of the pipe it streams to; known by its size."""
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None  # the process is gone
    for entry in entries:
        with suppress(OSError):
            if os.readlink(entry).startswith("pipe:"):
                fd = os.open(entry, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) in PIPE_SIZES:
                    return fd
                os.close(fd)
    return None


def _result_of(path: str) -> Path:
    return Path(f"{path}.sink")


async def end_sinks(path: str) -> None:
    """Kill every sink that writes to `path`, and remove what it would leave beside that."""
    for pid in _sinks(path):
        if (found := process_of(pid)) is not None:
            await kill(found)
    result = _result_of(path)
    try:
        sink.unfinished(result).unlink(missing_ok=True)  # of which the result is made
        await trio.to_thread.run_sync(remove, str(result))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a name that cannot be is not there
            raise


def _sinks(path: str) -> list[int]:
    """Return the processes that write a memory file: also one that an installation elsewhere has started.

    After an upgrade the program is at another place, and the sinks of before it are still at work.
    """
    name = os.path.basename(sink.__file__)
    return [
        pid for pid in find_processes(path) if any(os.path.basename(word) == name for word in command_line(pid))
    ]


def foreseen(ram: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes that were sent, and that will have been sent in the end; 0 of these: nobody knows yet.

    A page that is all zero takes next to nothing. Of what is left, as many pages are taken to be so as of what was
    looked at.

    Args:
        ram: what ``query-migrate`` says of it.
    """
    total, left, sent = (ram.get(key, 0) for key in ("total", "remaining", "transferred"))
    looked = total - left
    if sent <= 0 or looked <= 0:
        return max(0, sent), 0
    return sent, sent + round(left * min(1.0, sent / looked))


@attrs.frozen
class Source:
    """The QEMU that a stream comes from.

    Attributes:
        qmp: to it.
        pid: its process.
        events: MIGRATION, delivered since before the stream was opened.
        cancellable: a background stream can be cancelled.
        standing: what is no background stream is cancelled only while the guest is stopped (rule 6).
    """

    qmp: QMP
    pid: int
    events: Subscription
    cancellable: bool
    standing: bool = True


class QemuStream(Stream):
    """A `Stream` of a QEMU machine; see there."""

    def __init__(self, source: Source, plan: StreamPlan) -> None:
        self._qmp = source.qmp
        self._pid = source.pid
        self._events = source.events
        self._plan = plan
        self._background = plan.strategy is Strategy.BACKGROUND
        self._cancellable = source.cancellable or not self._background
        self._standing = source.standing and not self._background
        name = f"snaporch-{os.path.basename(plan.path)}"
        self._fds = {"write": f"{name}-w", "read": f"{name}-r"}
        self._result = _result_of(plan.path)
        self._sink: trio.Process | None = None
        self._read = -1
        self._rate = -1
        self._stores: frozenset[str] = frozenset()  # before the point
        self._setup: float | None = None

    async def open(self) -> None:
        """See Stream."""
        self._stores = frozenset(stores(await self._qmp.execute("query-block")))
        self._read, write = _make_pipe()
        try:
            await self._start_sink()
            if prologue := self._prologue():
                await trio.to_thread.run_sync(os.write, write, prologue)
            await self._qmp.execute("getfd", {"fdname": self._fds["write"]}, fds=(write,))
            await self._qmp.execute("getfd", {"fdname": self._fds["read"]}, fds=(self._read,))
        finally:
            os.close(write)
        await self._set_capabilities()

    def _prologue(self) -> bytes:
        """Return what goes into the file before the stream: where others are to find it as a file of theirs."""
        return b""

    @property
    def _index(self) -> str:
        return self._plan.index or sink.NONE

    async def _start_sink(self) -> None:
        # QEMU keeps to a bandwidth by itself but in background streams, where its limit would hold up the guest's
        # write faults in a busy loop; there the pipe is emptied more slowly instead.
        self._rate = sink.shared()
        sink.set_rate(self._rate, self._plan.bandwidth if self._background else 0)
        sink.reserve(self._result)
        self._sink = await trio.lowlevel.open_process(
            [sys.executable, "-I", sink.__file__, self._plan.path, str(self._result), str(self._rate), self._index],
            pass_fds=(self._rate,),
            stdin=self._read,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # Its interpreter has started before the guest is paused: on a small host that would take a CPU from QEMU.
        said = b""
        if self._sink.stdout is not None:
            async with self._sink.stdout as output:
                with trio.move_on_after(READY_SECONDS):
                    said = bytes(await output.receive_some())
        if said.strip() != sink.READY:
            words = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise OperationFailed(f"the process that writes {self._plan.path} does not start: {words[-1]}")

    async def _set_capabilities(self) -> None:
        capabilities = self._plan.settings["capabilities"]
        wanted = {"events"} | ({"background-snapshot"} if self._background else set())
        await self._qmp.execute(
            "migrate-set-capabilities",
            {"capabilities": [c | {"state": c["capability"] in wanted} for c in capabilities]},
        )
        bandwidth = UNLIMITED if self._background else self._plan.bandwidth
        await self._qmp.execute(
            "migrate-set-parameters", {"max-bandwidth": bandwidth, "downtime-limit": DOWNTIME_MS}
        )

    async def start(self) -> None:
        """See Stream."""
        await self._qmp.execute("migrate", {"uri": f"fd:{self._fds['write']}"})

    async def start_early(self, seconds: float) -> bool:
        """See Stream, and rule 7."""
        await self.start()
        await trio.sleep(seconds)
        await self._qmp.execute("stop")
        if await self._status() != "setup":
            await self._begin_anew()
            return False
        if (status := (await self._run_state())["status"]) != "paused":
            raise HypervisorError(f"{self._qmp.label}: the guest does not run: its state is {status!r}")
        return True

    async def _begin_anew(self) -> None:
        """End a stream whose point may be before the guest was stopped, let the guest run, and open another one."""
        await self.hold(0)  # a migration that waits for room in the pipe cannot be cancelled
        await self._end_migration()
        await self._qmp.execute("cont")
        await self._end_sink()
        await self._close()
        with suppress(trio.WouldBlock):
            while True:
                self._events.receive_nowait()
        os.truncate(self._plan.path, 0)
        if self._plan.index:  # of a stream that had come to its end; the next sink makes none where one is
            await trio.to_thread.run_sync(remove, self._plan.index)
        await self.open()

    def setup_seconds(self) -> float | None:
        """See Stream."""
        return self._setup

    async def armed(self) -> None:
        """Return when the first page has been sent.

        QEMU's bg_migration_thread saves the device state and write-protects RAM under the big lock, and sends
        pages only after; the counters of sent pages start at zero with each migration. So a non-zero counter is
        after the protection, whichever thread asks. ``active`` comes before all that: docs/explanation/point.md.
        """
        with trio.move_on_after(ARM_SECONDS):
            while (await self._events.receive()).data.get("status") == "setup":
                pass  # QEMU reads every page of RAM now; asking would only hold it up
            while True:
                info = await self._query()
                ram = info.get("ram", {})
                if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 or info["status"] == "completed":
                    self._setup = info["setup-time"] / 1000 if "setup-time" in info else None
                    return
        raise DeadlineExceeded(f"{self._qmp.label}: QEMU did not take the point within {ARM_SECONDS:g} s")

    async def limit(self, bandwidth: int) -> None:
        """See Stream."""
        if not self._background:
            await self._qmp.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
        elif self._rate >= 0:
            sink.set_rate(self._rate, bandwidth)

    async def hold(self, seconds: float) -> None:
        """See Stream."""
        if self._background and self._rate >= 0:
            sink.hold(self._rate, seconds)

    async def _query(self) -> dict[str, Any]:
        """Return query-migrate's answer; raises when the migration has failed."""
        info: dict[str, Any] = await self._qmp.execute("query-migrate")
        if info.get("status") in {"failed", "cancelled", "cancelling"}:
            words = info.get("error-desc") or f"migration {info['status']}"
            raise HypervisorError(f"{self._qmp.label}: the memory stream failed: {words}")
        return info

    async def finished(self, progress: Progress) -> None:
        """See Stream."""
        while (info := await self._query())["status"] != "completed":
            self._check_sink()
            progress(*foreseen(info.get("ram", {})))
            await self._check_stores()
            with trio.move_on_after(PROGRESS_SECONDS):
                await self._events.receive()
        await self._check_stores()
        if not self._background:
            await self._finalized()
        total = info["ram"]["transferred"]
        progress(total, total)

    async def _check_stores(self) -> None:
        """Raise when the guest has written to its firmware's variables since the point, see `flash`."""
        if self._background and await written(self._qmp, self._stores):
            raise HypervisorError(
                f"{self._qmp.label}: the guest wrote to its firmware's variables while its memory was saved, which "
                "would then be of another instant; try again, or leave out --live"
            )

    async def _finalized(self) -> None:
        """Wait until a migration that is over has left the guest's run state to others.

        That is a moment later than it says so: QEMU's migration thread takes the big lock in between
        (migration_iteration_finish), and until then ``cont`` is refused.
        """
        while (await self._run_state())["status"] == "finish-migrate":  # noqa: ASYNC110 - no event
            await trio.sleep(FINALIZE_SECONDS)

    async def _run_state(self) -> dict[str, Any]:
        state: dict[str, Any] = await self._qmp.execute("query-status")
        return state

    def _sink_lives(self) -> bool:
        """Return whether somebody writes the file: our sink, or one that a crash of snaporch has left to itself."""
        if self._sink is not None:
            return self._sink.poll() is None
        return bool(_sinks(self._plan.path))

    async def _sink_ended(self) -> None:
        if self._sink is not None:
            await self._sink.wait()
        for pid in _sinks(self._plan.path):
            if (found := process_of(pid)) is not None:
                await wait_gone(found)

    def _check_sink(self) -> None:
        """Raise when the sink has failed or was killed."""
        lives = self._sink_lives()  # asked first: it leaves its result before it ends
        if self._result.exists():
            self._result_or_error()
        elif not lives:
            raise OperationFailed(f"the process that writes {self._plan.path} was killed")

    def _result_or_error(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._result.read_text())
        if answer["errno"] is not None:
            raise OSError(answer["errno"], answer["error"], self._plan.path)
        return answer

    async def seal(self) -> FileRecord:
        """See Stream."""
        await self._give_back()
        await self._close()
        stop = threading.Event()
        try:
            async with trio.open_nursery() as nursery:
                if self._background:
                    nursery.start_soon(self._regain_huge_pages, stop)
                with trio.move_on_after(SINK_SECONDS):
                    await self._sink_ended()
                nursery.cancel_scope.deadline = trio.current_time() + HUGE_PAGES_SECONDS
        finally:
            stop.set()
        if not self._result.exists():
            raise OperationFailed(f"the process that writes {self._plan.path} ended without a result")
        answer = self._result_or_error()
        return FileRecord(self._plan.path, answer["size"], answer["checksum"], identity(self._plan.path))

    async def _regain_huge_pages(self, stop: threading.Event) -> None:
        await trio.to_thread.run_sync(collapse, self._pid, stop, abandon_on_cancel=True)

    async def forget(self) -> None:
        """See Stream."""
        await trio.to_thread.run_sync(remove, str(self._result))

    async def _give_back(self) -> None:
        """Leave QEMU as it was: its settings, and the images that a save of a guest that stands has it give up."""
        await self._restore_settings()
        if (await self._run_state())["status"] == STANDS:
            await self._take_back()

    async def _take_back(self) -> None:
        with suppress(CommandRefused):  # another process has one of them: the next verb says what that means
            await take_back(self._qmp)

    async def _restore_settings(self) -> None:
        settings = self._plan.settings
        await self._qmp.execute("migrate-set-capabilities", {"capabilities": settings["capabilities"]})
        await self._qmp.execute("migrate-set-parameters", settings["parameters"])

    def _close_ours(self) -> None:
        for fd in (self._read, self._rate):
            if fd >= 0:
                os.close(fd)
        self._read = self._rate = -1

    async def _close(self) -> None:
        """Close the pipe's ends, ours and QEMU's."""
        self._close_ours()
        for name in self._fds.values():
            with suppress(CommandRefused):  # the write end is gone once `migrate` has taken it
                await self._qmp.execute("closefd", {"fdname": name})

    async def abort(self) -> None:
        """See Stream."""
        await self._end_sink()
        try:
            await self._drain_and_end()
            await self._give_back()
            await self._close()
        except ConnectionGone:
            return  # with QEMU gone there is nothing of it to end
        except OutcomeUnknown as error:
            if error.seconds is not None:  # it hangs, and may stream on when it no longer does
                raise
        finally:
            self._close_ours()

    async def _drain_and_end(self) -> None:
        failure: ConnectionGone | OutcomeUnknown | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            try:
                await self._end_migration()
            except (ConnectionGone, OutcomeUnknown) as error:
                failure = error  # out of the nursery, which would wrap it in a group
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _end_sink(self) -> None:
        """End the sink: ours, or one that a crash of snaporch has left."""
        if self._sink is not None:
            self._sink.kill()
            await self._sink.wait()
        await end_sinks(self._plan.path)

    async def _drain(self) -> None:
        """Empty the pipe: by our end, or after a crash by the one that QEMU keeps."""
        read = os.dup(self._read) if self._read >= 0 else _kept_pipe(self._pid)
        if read is not None:
            async with trio.lowlevel.FdStream(read) as pipe:
                async for _ in pipe:
                    pass

    async def _status(self) -> str:
        return str((await self._qmp.execute("query-migrate")).get("status", "none"))

    async def _end_migration(self) -> None:
        stopped = False
        if await self._status() not in _OVER and self._cancellable:
            if stopped := self._standing and (await self._run_state())["running"]:
                await self._qmp.execute("stop")
            if not self._standing or (await self._run_state())["status"] != "finish-migrate":
                await self._qmp.execute("migrate_cancel")
        while await self._status() not in _OVER:
            with trio.move_on_after(PROGRESS_SECONDS):
                await self._events.receive()
        await self._finalized()
        if stopped:
            await self._qmp.execute("cont")
