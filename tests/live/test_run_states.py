"""The states that a guest of QEMU gets into by itself: each verb is refused, and it stays in them, or is done."""

from __future__ import annotations

import resource
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from snaporch.drivers.qmp import open_qmp
from snaporch.errors import Refused
from snaporch.model.rfc import CreateFlag, DomainSnapshot, RevertFlag
from snaporch.orchestrator import open_orchestrator
from tests.live.lab import NAME, SECONDS, Lab, lab

pytestmark = pytest.mark.live

# What the guest would write to a port, written by QEMU's monitor; the firmware has put power management there.
SLEEP, OFF, PANIC, HANG = "o/w 0x604 0x2400", "o/w 0x604 0x2000", "o/b 0x505 1", "o/b 0x443 15"
DEVICES = ("-device", "pvpanic", "-device", "ib700", "-action", "watchdog=pause,panic=pause,shutdown=pause")


__all__ = ["lab"]  # the fixture


async def ask(lab: Lab, command: str, **arguments: object) -> object:
    async with open_qmp(lab.socket, label=NAME) as qmp:
        return await qmp.execute(command, arguments)


async def status(lab: Lab) -> str:
    found = await ask(lab, "query-status")
    assert isinstance(found, dict)
    return str(found["status"])


async def wait_until(lab: Lab, state: str) -> None:
    with trio.fail_after(SECONDS):
        while await status(lab) != state:  # noqa: ASYNC110 - nothing tells us
            await trio.sleep(0.05)


async def get_into(lab: Lab, state: str, monitor: str) -> None:
    """Write to a port until the guest is in a state: at first its firmware has not come so far."""
    with trio.fail_after(SECONDS):
        while await status(lab) != state:
            await ask(lab, "human-monitor-command", **{"command-line": monitor})
            await trio.sleep(0.1)


async def check_refused(lab: Lab, words: str, *verbs: Callable[[], Awaitable[object]]) -> None:
    """Assert that verbs are refused with the reason, and that the guest stays in its state, on its images."""
    before, shape = await status(lab), await lab.shape()
    for verb in verbs:
        with pytest.raises(Refused, match=words):
            await verb()
        assert (await status(lab), await lab.shape()) == (before, shape)


async def test_states_that_a_guest_gets_into(lab: Lab) -> None:
    await lab.start(*("-drive", f"if=virtio,file={lab.image('a.qcow2')}"), *DEVICES)
    await lab.attach()
    await lab.create()
    orch = lab.orch

    async def pause() -> object:
        return await orch.pause(NAME)

    async def resume() -> object:
        return await orch.resume(NAME)

    async def shutdown() -> object:
        return await orch.shutdown(NAME)

    async def reset() -> object:
        return await orch.reset(NAME)

    async def create() -> object:
        return await orch.create(NAME, DomainSnapshot("c2"))

    await resume()
    await get_into(lab, "suspended", SLEEP)
    await check_refused(lab, "the guest sleeps", create, pause, resume, shutdown, reset)
    await ask(lab, "system_wakeup")
    await wait_until(lab, "running")
    await get_into(lab, "guest-panicked", PANIC)
    await check_refused(lab, "has panicked", create, pause, shutdown)
    await reset()
    assert await status(lab) == "running"
    await get_into(lab, "guest-panicked", PANIC)
    await resume()
    await get_into(lab, "watchdog", HANG)
    await check_refused(lab, "a watchdog", create, pause, shutdown)
    await reset()
    assert await status(lab) == "running"
    await get_into(lab, "watchdog", HANG)
    await resume()
    await get_into(lab, "shutdown", OFF)
    await check_refused(lab, "has powered off", create, pause, resume, shutdown)
    await orch.delete(NAME, "c1")
    assert await status(lab) == "shutdown"
    await reset()
    assert await status(lab) == "running"


async def test_back_from_sleep(lab: Lab) -> None:
    """A guest that sleeps can be taken back; the one that is there then sleeps and wakes as the first one did."""
    await lab.start(*("-drive", f"if=virtio,file={lab.image('a.qcow2')}"))
    await lab.attach()
    await lab.orch.resume(NAME)
    await get_into(lab, "suspended", SLEEP)
    await ask(lab, "system_wakeup")
    await lab.create()
    await get_into(lab, "suspended", SLEEP)
    await lab.revert(flags=RevertFlag.RUNNING)
    assert await status(lab) == "running"
    await get_into(lab, "suspended", SLEEP)
    await ask(lab, "system_wakeup")
    await wait_until(lab, "running")


async def test_a_disk_that_fails(lab: Lab, kernel: Path) -> None:
    """The guest waits, and so it stays until that is mended and it is let run; then a checkpoint is taken."""
    limited = ("sh", "-c", 'trap "" XFSZ; ulimit -S -f 4096; exec "$@"', "x")
    guest = ("-kernel", str(kernel), "-append", "bulk=8 span=8 ram=1", "-serial", "null")
    disk = f"if=none,id=d0,file={lab.image('a.qcow2')},werror=stop"
    await lab.start(*guest, "-drive", disk, "-device", "virtio-blk-pci,drive=d0,werror=stop", prefix=limited)
    await lab.attach()
    await lab.orch.resume(NAME)
    await wait_until(lab, "io-error")

    async def create() -> object:
        return await lab.orch.create(NAME, DomainSnapshot("c1"))

    async def pause() -> object:
        return await lab.orch.pause(NAME)

    await check_refused(lab, "a disk has failed", create, pause)
    pid = (await lab.orch.domain_info(NAME)).pid
    assert pid is not None
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    await lab.orch.resume(NAME)
    assert await status(lab) == "running"
    await lab.create()


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
async def test_a_guest_that_has_migrated_away(lab: Lab, format_: str) -> None:
    """After a save of ours it goes on here; once it runs elsewhere, nothing is done with what is left of it."""
    image, incoming = lab.image("a.img", format_), lab.place / "incoming.sock"
    guest = ("-drive", f"if=virtio,file={image},format={format_}")
    await lab.start(*guest)
    await lab.attach()
    await lab.orch.create(NAME, DomainSnapshot("c1"))
    assert await status(lab) == "postmigrate"
    await lab.orch.resume(NAME)
    await lab.orch.pause(NAME)
    await lab.create("c2")
    (disk,) = (await lab.shape()).disks
    place, lab.place = lab.place, lab.place / "elsewhere"
    lab.place.mkdir()
    there = ("-drive", f"if=virtio,file={disk.chain[0]},format=qcow2")
    await lab.start(*there, "-incoming", f"unix:{incoming}")
    lab.place = place
    await lab.orch.resume(NAME)
    await ask(lab, "migrate", uri=f"unix:{incoming}")
    await wait_until(lab, "postmigrate")

    async def create() -> object:
        return await lab.orch.create(NAME, DomainSnapshot("c3"))

    async def disks() -> object:
        return await lab.orch.create(NAME, DomainSnapshot("c3"), CreateFlag.DISK_ONLY)

    async def named(verb: Callable[[str], Awaitable[object]]) -> object:
        return await verb(NAME)

    async def revert() -> object:
        return await lab.orch.revert(NAME, "c1")

    async def delete() -> object:
        return await lab.orch.delete(NAME, "c1")

    orch = lab.orch
    verbs = [partial(named, verb) for verb in (orch.pause, orch.resume, orch.shutdown, orch.reset, orch.flatten)]
    await check_refused(lab, "its guest is gone from here", *verbs, create, disks, revert, delete)
    async with open_orchestrator(lab.place / "second") as second:
        with pytest.raises(Refused, match="its guest is gone from here"):
            await second.attach(NAME, str(lab.socket))
    assert (await orch.verify(NAME, "c1")).ok
