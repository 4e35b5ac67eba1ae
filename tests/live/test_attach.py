"""QEMUs that something else started, in the styles that people start them in: attached to, saved, reverted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.drivers.qmp import open_qmp
from snaporch.drivers.qmp.stream import QemuStream
from snaporch.errors import HypervisorError, OperationFailed, Refused, TargetExists, Unsupported
from snaporch.model.domain import DomainState
from snaporch.model.request import Strategy
from snaporch.model.rfc import RevertFlag
from snaporch.model.way import Way
from tests.live.world import MIB, NAME, RAM_MIB, MakeWorld, Qemu, World, make_image

pytestmark = pytest.mark.live


def nested(image: str, node: str) -> list[str]:
    """One -blockdev in JSON, its file inside."""
    options = {"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": image}}
    return ["-blockdev", json.dumps(options), "-device", f"virtio-blk-pci,drive={node},id={node}-dev"]


def separate(image: str, node: str) -> list[str]:
    """The file as a node of its own, and keys with dots."""
    return [
        *("-blockdev", f"driver=file,node-name={node}-file,filename={image}"),
        *("-blockdev", f"driver=qcow2,node-name={node},file={node}-file,discard=unmap"),
        *("-device", f"virtio-blk-pci,drive={node}"),
    ]


def dotted(image: str, node: str) -> list[str]:
    """One -blockdev in keys with dots."""
    text = f"driver=qcow2,node-name={node},file.driver=file,file.filename={image}"
    return ["-blockdev", text, "-device", f"virtio-blk-pci,drive={node}"]


def drive(image: str, _: str) -> list[str]:
    """A -drive with a device of its own and generated node names."""
    return ["-drive", f"if=virtio,file={image}"]


def drive_and_device(image: str, node: str) -> list[str]:
    """A -drive for a -device."""
    return ["-drive", f"if=none,id={node},format=qcow2,file={image}", "-device", f"virtio-blk-pci,drive={node}"]


@attrs.frozen
class Style:
    """How one QEMU is started; `{d}` stands for its directory.

    Attributes:
        disk: each disk.
        relative: paths are relative to a working directory of its own.
        monitor: the control socket.
        more: further arguments.
        machine: its type.
    """

    disk: Callable[[str, str], list[str]]
    relative: bool = False
    monitor: tuple[str, ...] = ("-qmp", "unix:{d}/qmp.sock,server=on,wait=off")
    more: tuple[str, ...] = ()
    machine: str = "q35"


MON = ("-chardev", "socket,id=mon0,path={d}/qmp.sock,server=on,wait=off", "-mon", "chardev=mon0,mode=control")
STYLES = {
    "blockdev-nested": Style(nested),
    "blockdev-separate": Style(separate, monitor=MON),
    "blockdev-dotted-relative": Style(dotted, relative=True),
    "drive": Style(drive),
    "drive-relative-daemonize": Style(drive, relative=True, more=("-daemonize", "-pidfile", "{d}/pid")),
    "drive-and-device": Style(drive_and_device, monitor=MON),
    "hda": Style(drive, more=("-hda", "{d}/old.qcow2"), machine="pc"),
}


def command(qemu: Qemu, kernel: Path, place: Path, style: Style) -> list[str]:
    """Return the command line of a style."""
    d = "." if style.relative else str(place)
    words = [qemu.emulator, "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "96", "-M", style.machine]
    words += ["-kernel", str(kernel), "-append", f"rate=200 dirty=20 ram={RAM_MIB}"]
    words += ["-serial", f"file:{d}/serial.log"]
    for node in ("one", "two"):
        words += style.disk(f"{d}/{node}.qcow2", node)
    return words + [word.format(d=d) for word in (*style.monitor, *style.more)]


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to be collected when they have ended."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def place(tmp_path: Path, qemu: Qemu) -> Iterator[Path]:
    """The directory of what is none of ours, with images."""
    for name in ("one", "two", "old", "spare"):
        make_image(qemu, tmp_path / f"{name}.qcow2")
    yield tmp_path
    for path in tmp_path.glob("*.qcow2"):
        path.unlink()


@pytest.fixture
def attached(
    spawned: list[subprocess.Popen[bytes]], make_world: MakeWorld, kernel: Path, place: Path
) -> Callable[[Style], Awaitable[World]]:
    """A function that starts a QEMU as others do, and attaches to it."""
    return partial(_attached, spawned, make_world, kernel, place)


async def _attached(
    spawned: list[subprocess.Popen[bytes]], make_world: MakeWorld, kernel: Path, place: Path, style: Style
) -> World:
    world = await make_world(start=False)
    words = command(world.qemu, kernel, place, style)
    process = subprocess.Popen(words, cwd=place, stdin=subprocess.DEVNULL, start_new_session=True)
    spawned.append(process)
    if "-daemonize" in words:
        assert process.wait(20) == 0
    await world.wait_report(lambda report: report.seq > 2, since=0)
    info = await world.orch.attach(NAME, str(place / "qmp.sock"))
    assert info.state is DomainState.RUNNING
    return world


@pytest.mark.parametrize("style", STYLES)
async def test_styles(attached: Callable[[Style], Awaitable[World]], place: Path, style: str) -> None:
    """A QEMU of this style is checkpointed and reverted; its socket and its log are where they were."""
    world = await attached(STYLES[style])
    disks = {Path(disk.active).name for disk in (await world.orch.domain_info(NAME)).disks}
    assert {"one.qcow2", "two.qcow2"} <= disks
    assert all(Path(disk.active).is_absolute() for disk in (await world.orch.domain_info(NAME)).disks)
    record = await world.create("a")
    assert {Path(chain[0].path).name for chain in record.images.values()} == disks
    await world.check_runs()
    await world.create("b")
    said = world.text()[:500]
    for name in ("a", "b"):
        pid = await world.pid()
        if style == "drive-relative-daemonize" and name == "a":
            # It has left the directory, so it could not reopen its images read-only when they were frozen: the new
            # QEMU gets no lock on them beside it, and only as for a background snapshot can it be kept in a file.
            if world.qemu.old:
                with pytest.raises(Unsupported, match=r"cannot be kept until it is: .* cannot open .* anew"):
                    await world.revert(name)
                await world.check_runs()
                assert (await world.revert(name, RevertFlag.FORCE)).way is Way.DISPLACE
            else:
                assert (await world.revert(name)).way is Way.PROVEN
        else:
            await world.revert(name)
        assert await world.pid() != pid
        await world.check_consistent()
        assert world.text().startswith(said), "the guest's log was truncated"
        async with open_qmp(place / "qmp.sock", label="foreign") as client:
            assert client.peer_pid == await world.pid()
            assert (await client.execute("query-status"))["running"]
    await world.check_no_orphans()
    assert (place / "one.qcow2").exists()


async def stops(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise HypervisorError("it is not armed")


async def nodes(place: Path) -> list[tuple[str, str]]:
    """Return what QEMU has open, and under which names."""
    async with open_qmp(place / "qmp.sock", label="foreign") as client:
        return sorted((node["node-name"], node["file"]) for node in await client.execute("query-named-block-nodes"))


@pytest.mark.parametrize("style", ["blockdev-nested", "drive", "drive-relative-daemonize"])
async def test_rolled_back(
    attached: Callable[[Style], Awaitable[World]], place: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    """A create that fails in its pause leaves all as it was, an image too that somebody has opened for later."""
    world = await attached(STYLES[style])
    async with open_qmp(place / "qmp.sock", label="foreign") as client:
        file = {"driver": "file", "filename": str(place / "spare.qcow2")}
        await client.execute("blockdev-add", {"driver": "qcow2", "node-name": "spare-image", "file": file})
    before, info = await nodes(place), await world.orch.domain_info(NAME)
    monkeypatch.setattr(QemuStream, "armed", stops)
    with pytest.raises(OperationFailed):
        await world.create("point")
    assert await nodes(place) == before
    assert await world.orch.domain_info(NAME) == info
    assert not world.images()
    await world.check_runs()


async def test_it_has_left_its_directory(attached: Callable[[Style], Awaitable[World]]) -> None:
    """A QEMU that cannot open its images anew cannot let go of them: that is refused, or done without."""
    world = await attached(STYLES["drive-relative-daemonize"])
    with pytest.raises(Unsupported, match=r"cannot open .* anew.*absolute paths"):
        await world.create("moved", Strategy.PRECOPY)
    if world.qemu.old:
        with pytest.raises(Unsupported, match="absolute paths"):
            await world.create("paused", Strategy.PAUSED)
    else:
        await world.create("paused", Strategy.PAUSED)
    await world.check_runs()


async def test_refused(attached: Callable[[Style], Awaitable[World]], place: Path) -> None:
    """What cannot be attached to: a name that runs, and a socket where nobody listens."""
    world = await attached(STYLES["drive"])
    with pytest.raises(TargetExists):
        await world.orch.attach(NAME, str(place / "qmp.sock"))
    with pytest.raises(Refused, match=r"other.*domain discover"):
        await world.orch.attach("other", str(place / "nothing.sock"))
    record = await world.create("a")
    assert record.memory is not None
    assert record.memory.size < 96 * MIB * 1.02
    await world.check_runs()
