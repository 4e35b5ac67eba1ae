"""Long proofs in dom0, for `scripts/proof xen`: what each case came to is a line of JSON on standard output.

python3 -m tests.xen.in_dom0.proof points COUNT     checkpoints of each kind under writes, each gone back to
python3 -m tests.xen.in_dom0.proof crash            snaporch, its helper, libxl's, the disks' QEMU are killed
python3 -m tests.xen.in_dom0.proof odd              a full disk, a file that is cut short, guests that go down
python3 -m tests.xen.in_dom0.proof pause COUNT      the guest's silence beside that of `xl save -c`
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from snaporch import CreateFlag, DomainSnapshot, DomainState, RevertFlag, SnaporchError
from snaporch.drivers.xen.stream import XenStream
from snaporch.engine.steps import CREATE, Step
from snaporch.model.request import Strategy
from snaporch.operations.create import Participant
from tests.xen.in_dom0.world import LOGS, NAME, World, destroy_all, open_world

KINDS = {"live": CreateFlag.LIVE, "not live": CreateFlag(0)}
WRITES: dict[str, Any] = {"rate": 20, "dirty": 2}  # numbers and MiB a second, of a guest that is emulated
DEEP = 12  # points in one world: each leaves the disks an image deeper
VICTIMS = ("snaporch", "helper", "disks' QEMU")
DOWN_SECONDS = 120.0


def say(**what: Any) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


@asynccontextmanager
async def judged(**case: Any) -> AsyncIterator[dict[str, Any]]:
    """Tell what a case came to: what the body adds, and whether anything was wrong."""
    found, began = dict(case), time.monotonic()
    try:
        yield found
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - each is an outcome, and the next case goes on
        found |= {"right": False, "words": f"{type(error).__name__}: {error}"[:600]}
    say(**{"right": True} | found, seconds=round(time.monotonic() - began, 1))
    if not found.get("right", True):
        await destroy_all()


# --- points


async def _point(world: World, found: dict[str, Any], name: str, flags: CreateFlag) -> None:
    (first, *_) = await world.reports(1)
    record = await world.orch.create(NAME, DomainSnapshot(name), flags)
    found |= {"paused": record.timings.pause, "create": record.timings.total}
    found["memory"] = record.memory.size if record.memory is not None else 0
    far = await world.check_consistent()
    since = world.positions()
    back = await world.orch.revert(NAME, name)
    found |= {"revert": back.total_seconds, "outage": back.outage_seconds}
    (again, *_) = await world.wait_report(lambda reports: reports[0].seq < far.seq, since)
    assert first.seq <= again.seq, f"it is at {again.seq}, and was at {first.seq} before the point"
    await world.check_consistent()
    await world.check_told()
    await world.check_alone()


async def points(count: int, kinds: list[str]) -> None:
    """Take checkpoints under writes, go back to each, and have the guest judge what it then is."""
    for number in range(count):
        if number % DEEP == 0:
            await destroy_all()
        for kind in kinds:
            async with judged(kind=kind, number=number) as found, open_world(**WRITES) as world:
                await _point(world, found, f"{kind.replace(' ', '-')}{number}", KINDS[kind])


# --- crashes


@contextmanager
def before_step(step: Step, action: Callable[[Participant], Awaitable[None]]) -> Iterator[None]:
    """Have something done before a step of a create is performed the first time."""
    original = getattr(Participant, step)
    done: list[bool] = []

    async def wrapped(self: Participant, *arguments: Any) -> Any:
        if not done:
            done.append(True)
            await action(self)
        return await original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Participant, step, wrapped)
        yield


async def _kill(victim: str, participant: Participant) -> None:
    machine: Any = participant.machine
    pid = {
        "snaporch": os.getpid(),
        "helper": machine.helper._program.process.pid,
        "disks' QEMU": machine.domain.qemu,
    }[victim]
    os.kill(pid, signal.SIGKILL)
    await trio.sleep(0.5)


async def _create(step: Step, victim: str) -> str:
    """Create while somebody is killed; return what it said."""

    async def kill(participant: Participant) -> None:
        await _kill(victim, participant)

    async with open_world() as world:
        with before_step(step, kill):
            try:
                await world.orch.create(NAME, DomainSnapshot("cut"), CreateFlag.LIVE)
            except SnaporchError as error:
                return f"{type(error).__name__}: {error}"
    return "complete"


def _create_and_die(step: Step) -> str:
    if not (child := os.fork()):
        try:
            trio.run(_create, step, "snaporch")
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "killed" if status == -signal.SIGKILL else f"exit status {status}"


async def _prepare() -> dict[str, str]:
    """Have a guest that runs, with a checkpoint `good` and without `cut`."""
    async with open_world() as world:
        names = [record.name for record in await world.orch.list(NAME)]
        if "good" not in names:
            await world.orch.create(NAME, DomainSnapshot("good"), CreateFlag.LIVE)
        if "cut" in names:
            await world.orch.delete(NAME, "cut")
        return await world.images()


async def _check_after(found: dict[str, Any], before: dict[str, str], victim: str) -> None:
    async with open_world(ready=False) as world:
        if victim == "disks' QEMU":
            try:
                info = await world.orch.domain_info(NAME)
                found["told"] = str(info.state)
                await world.orch.create(NAME, DomainSnapshot("next"))
            except SnaporchError as error:
                found["told"] = f"{type(error).__name__}: {error}"[:300]
            await world.orch.revert(NAME, "good", RevertFlag.FORCE)
        names = [record.name for record in await world.orch.list(NAME)]
        found["outcome"] = "complete" if "cut" in names else "undone"
        assert await world.state() is DomainState.RUNNING
        if victim != "disks' QEMU" and "cut" not in names:
            assert await world.images() == before, "the disks are not on the images that they were on"
        await world.check_consistent()
        await world.check_told()
        await world.check_alone()


def crash(wanted: list[str]) -> None:
    """Kill one of all who take part before each step of a live create."""
    steps = [step for phase in CREATE[Strategy.PRECOPY] for step in phase.steps]
    for victim in [each for each in VICTIMS if each in wanted] or VICTIMS:
        for step in steps:

            async def case(step: Step = step, victim: str = victim) -> None:
                async with judged(step=step, victim=victim) as found:
                    before = await _prepare()
                    found["said"] = (await _create(step, victim))[:300]
                    await _check_after(found, before, victim)

            if victim == "snaporch":
                _crash_of_ours(step)
            else:
                trio.run(case)
    trio.run(_save_helper)


def _crash_of_ours(step: Step) -> None:
    before = trio.run(_prepare)
    said = _create_and_die(step)  # not below a running loop: a process is forked

    async def case() -> None:
        async with judged(step=step, victim="snaporch", said=said) as found:
            await _check_after(found, before, "snaporch")

    trio.run(case)


def children(pid: int) -> list[int]:
    """Return the processes that one has started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


@contextmanager
def in_the_stream(action: Callable[[XenStream], Awaitable[None]]) -> Iterator[None]:
    """Have something done when a part of the memory is in the file."""
    original = XenStream._watch

    async def watch(self: XenStream, progress: Any) -> None:
        while os.stat(self.plan.path).st_size < 16 << 20:  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(0.02)
        await action(self)
        await original(self, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XenStream, "_watch", watch)
        yield


async def _save_helper() -> None:
    async def kill(stream: XenStream) -> None:
        for pid in children(stream.helper._program.process.pid):
            os.kill(pid, signal.SIGKILL)
        await trio.lowlevel.checkpoint()

    for kind, flags in KINDS.items():
        async with judged(step="in the stream", victim="libxl-save-helper", kind=kind) as found:
            before = await _prepare()
            async with open_world() as world:
                with in_the_stream(kill):
                    found["said"] = await said(world.orch.create(NAME, DomainSnapshot("cut"), flags))
            await _check_after(found, before, "")


async def said(call: Awaitable[object]) -> str:
    """Return what an operation says that does not work, or that it is complete."""
    try:
        await call
    except SnaporchError as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "complete"


# --- odd cases


async def odd() -> None:
    """Files and guests that do what nobody wants."""
    for kind, flags in KINDS.items():
        async with judged(case="full disk", kind=kind) as found:
            await _full_disk(found, flags)
        for how in ("reboot", "poweroff"):
            async with judged(case=how, kind=kind) as found:
                await _goes_down(found, flags, how)
    async with judged(case="memory file cut short") as found:
        await _prepare()
        async with open_world() as world:
            record = await world.orch.create(NAME, DomainSnapshot("short"), CreateFlag.LIVE)
            assert record.memory is not None
            os.truncate(record.memory.path, record.memory.size // 2)
            found["said"] = await said(world.orch.revert(NAME, "short"))
            assert found["said"] != "complete"
            found["forced"] = await said(world.orch.revert(NAME, "short", RevertFlag.FORCE))
            assert found["forced"] != "complete"
            await world.check_consistent()
            await world.check_alone()


async def _full_disk(found: dict[str, Any], flags: CreateFlag) -> None:
    before = await _prepare()
    place = Path("/guest/small")
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=170m,mode=700", "tmpfs", str(place)], check=True)

    async def fill(_participant: Participant) -> None:
        with suppress(OSError), (place / "filler").open("wb") as file:
            file.write(bytes(100 << 20))
        await trio.lowlevel.checkpoint()

    try:
        async with open_world() as world:
            with before_step(Step.START_STREAM, fill):
                asked = DomainSnapshot("cut", memory_file=f"{place}/memory")
                found["said"] = await said(world.orch.create(NAME, asked, flags))
            assert found["said"] != "complete"
            assert [path.name for path in place.iterdir()] == ["filler"]
        await _check_after(found, before, "")
    finally:
        subprocess.run(["umount", str(place)], check=True)


async def _goes_down(found: dict[str, Any], flags: CreateFlag, how: str) -> None:
    """Have the guest reboot or power off while its memory is saved."""
    await _prepare()

    async def down(stream: XenStream) -> None:
        path = f"/local/domain/{stream.domid}/control/shutdown"
        subprocess.run(["xenstore-write", path, how], check=True)
        await trio.lowlevel.checkpoint()

    async with open_world() as world:
        with in_the_stream(down):
            found["said"] = await said(world.orch.create(NAME, DomainSnapshot("cut"), flags))
        with trio.move_on_after(DOWN_SECONDS):
            while await world.state() is not DomainState.INACTIVE:  # noqa: ASYNC110 - nothing tells us
                await trio.sleep(1)
        found["state"] = str(await world.state())
        found["snapshots"] = [record.name for record in await world.orch.list(NAME)]
        await world.ready()
        await world.check_consistent()
        await world.check_alone()
        if "cut" in found["snapshots"]:
            await world.orch.revert(NAME, "cut")
            await world.check_consistent()


# --- the pause


async def _silence(stop: trio.Event, longest: list[float]) -> None:
    """Watch the guest's console: its longest silence in seconds."""
    sizes: dict[Path, int] = {}
    spoke = time.monotonic()
    while not stop.is_set():
        now = {path: path.stat().st_size for path in LOGS.glob(f"guest-{NAME}*.log")}
        if now != sizes:
            longest[0] = max(longest[0], time.monotonic() - spoke) if sizes else 0.0
            sizes, spoke = now, time.monotonic()
        await trio.sleep(0.02)


async def pause(count: int) -> None:
    """Compare the guest's longest silence: `xl save -c`, which knows no disks, and a create of each kind."""
    for number in range(count):
        for how in ("xl save -c", *KINDS):
            async with judged(how=how, number=number) as found, open_world(**WRITES) as world:
                stop, longest = trio.Event(), [0.0]
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_silence, stop, longest)
                    await world.reports(3)
                    if how in KINDS:
                        record = await world.orch.create(NAME, DomainSnapshot(f"p{number}{how[0]}"), KINDS[how])
                        found |= {"paused": record.timings.pause, "whole": record.timings.total}
                    else:
                        began = time.monotonic()
                        await trio.run_process(["xl", "save", "-c", NAME, "/guest/xl.save"])
                        found["whole"] = time.monotonic() - began
                        Path("/guest/xl.save").unlink()
                    await world.reports(3)
                    stop.set()
                found["silence"] = round(longest[0], 3)
                await world.check_consistent()


def main() -> None:
    """Do what the command line asks for."""
    verb, *arguments = sys.argv[1:]
    if verb == "points":
        trio.run(points, int(arguments[0]), arguments[1:] or list(KINDS))
    elif verb == "crash":
        crash(arguments)
    elif verb == "odd":
        trio.run(odd)
    else:
        trio.run(pause, int(arguments[0]))


if __name__ == "__main__":
    main()
