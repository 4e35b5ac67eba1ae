"""Archives: a snapshot goes to another root in one file; nothing of a hostile or a damaged one gets anywhere."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from snaporch.catalog import Change
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.engine.run import Operation
from snaporch.errors import DamagedSnapshot, InvalidInput, OperationFailed, Refused, TargetExists, Unsupported
from snaporch.model.convert import dumps
from snaporch.model.domain import DomainState
from snaporch.model.record import OperationKind
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot
from snaporch.operations.made import MadePlan
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator
from tests.live.world import NAME, MakeWorld, World

pytestmark = pytest.mark.live

INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))


@asynccontextmanager
async def other_root(world: World) -> AsyncIterator[Orchestrator]:
    """Open another root, as another host would have it."""
    driver = QemuDriver(storage=LocalStorage(world.qemu.img))
    async with open_orchestrator(world.directory / "other", drivers={"qemu": driver}) as orch:
        yield orch


def there(world: World) -> set[str]:
    """Return what is in the other root, but for its own files."""
    return {path.name for path in (world.directory / "other").iterdir()} - {
        "catalog.sqlite3",
        "catalog.sqlite3-shm",
        "catalog.sqlite3-wal",
        "locks",
        "reserve.bin",
    }


async def test_a_running_guest_moves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its memory and all disks, from files of their own and from inside the images; the first one runs on."""
    await world.create("outside")
    await world.create("inside", flags=CreateFlag(0), disks=INSIDE)
    for name in ("outside", "inside"):
        archive = world.directory / f"{name}.snaporch"
        async with world.unchanged():
            done = await world.orch.export(NAME, name, archive)
            assert (done.size, done.memory, done.disks) == (archive.stat().st_size, True, ("vda", "vdb"))
            with tarfile.open(archive) as tar:
                names = ["manifest.json", "memory", "kernel", "disks/vda.qcow2", "disks/vdb.qcow2"]
                assert tar.getnames() == names
            moved = archive.rename(world.directory.parent / archive.name)
        async with other_root(world) as orch:
            with monkeypatch.context() as patched:
                patched.setattr("snaporch.drivers.local.filework.checksum", _read_again)
                got = await orch.import_archive(moved, name=name, trust=True)
            assert (got.domain, got.name, got.memory, got.dropped) == (name, name, True, ())
            assert (await orch.domain_info(name)).state is DomainState.INACTIVE
            assert (await orch.verify(name, name)).ok
            await orch.revert(name, name)
            try:
                log = world.directory / f"other/{name}/serial.log"
                await World(world.directory, world.qemu, orch, world.definition, log).check_consistent()
                first = await catalog_of(orch).domain(name)
                assert first.uuid != (await catalog_of(world.orch).domain(NAME)).uuid
                assert not await orch.fsck(name, repair=True)  # its kernel and its log are needed, too
                assert Path(first.definition.kernel).exists()
            finally:
                await orch.destroy(name)  # noqa: ASYNC102 - a test that is cancelled has lost its world, too
        moved.unlink()
    await world.check_runs()


def _read_again(path: str, **_: object) -> None:
    raise AssertionError(f"{path} was read when it was unpacked")


async def test_disks_alone(world: World) -> None:
    """To a stream, as an image of their own, and from an archive whose memory is left out."""
    await world.create("point")
    at_point = await _raw(world, (await world.orch.show(NAME, "point")).images["vda"][0].path)
    await world.orch.export_disk(NAME, "point", "vda", world.directory / "vda.img", format_="raw")
    assert (world.directory / "vda.img").read_bytes() == at_point
    stream = io.BytesIO()
    done = await world.orch.export_disk(NAME, "point", "vdb", stream)
    assert (done.file, done.size) == ("-", len(stream.getvalue()))
    assert stream.getvalue().startswith(b"QFI\xfb")
    archive = world.directory / "point.snaporch"
    await world.orch.export(NAME, "point", archive)
    async with other_root(world) as orch:
        got = await orch.import_archive(archive, disks_only=True)
        assert got.dropped == (f"emulator = {json.dumps(world.qemu.emulator)}",)
        assert (await orch.show(NAME, "point")).memory is None
        assert await _raw(world, (await orch.domain_info(NAME)).disks[0].active) == at_point


async def _raw(world: World, path: str) -> bytes:
    copy = world.directory / "copy.raw"
    command = [world.qemu.img, "convert", "-U", "-f", "qcow2", "-O", "raw", path, str(copy)]
    await trio.run_process(command)
    data = copy.read_bytes()
    copy.unlink()
    return data


async def test_nothing_is_overwritten_and_nothing_is_left(world: World) -> None:
    """Of an export that is refused, that fails, or that is cancelled."""
    await world.create("point")
    taken = world.directory / "taken"
    taken.write_text("mine")
    for call, error in (
        (world.orch.export(NAME, "point", taken), TargetExists),
        (world.orch.export(NAME, "point", world.directory / "no/where"), InvalidInput),
        (world.orch.export(NAME, "point", world.root / "tokens.toml"), InvalidInput),
        (world.orch.export_disk(NAME, "point", "vdx", world.directory / "x"), InvalidInput),
    ):
        async with world.unchanged():
            with pytest.raises(error):
                await call
    assert taken.read_text() == "mine"
    async with world.unchanged("its reader goes away"):
        with pytest.raises(OperationFailed):
            await world.orch.export(NAME, "point", _Broken())
    async with world.unchanged("cancelled"):
        with trio.CancelScope() as scope:
            await world.orch.export(NAME, "point", _Broken(scope.cancel))
        assert scope.cancelled_caught
    await world.check_runs()


class _Broken(io.RawIOBase):
    """A stream that fails after its first block."""

    def __init__(self, action: Callable[[], None] | None = None) -> None:
        self.action = action
        self.written = 0

    def write(self, data: Any, /) -> int:
        """See RawIOBase."""
        self.written += len(data)
        if self.written > 2**20:
            if self.action is None:
                raise BrokenPipeError(32, "Broken pipe")
            trio.from_thread.run_sync(self.action)
        return len(data)


async def test_memory_that_cannot_load_here(make_world: MakeWorld) -> None:
    """Another machine, or words that are not trusted: refused with what to do, and nothing is left."""
    world = await make_world(extra_args=("-device", "virtio-rng-pci"))
    await world.create("point")
    archive = world.directory / "point.snaporch"
    await world.orch.export(NAME, "point", archive)
    async with other_root(world) as orch:
        with pytest.raises(InvalidInput, match="--trust"):
            await orch.import_archive(archive)
        changed = edited(archive, lambda manifest: manifest["hypervisor"].update(machine="pc-q35-2.4"))
        with pytest.raises(Unsupported, match="--disks-only"):
            await orch.import_archive(changed, trust=True)
        without = edited(archive, lambda manifest: manifest["definition"].update(extra_args=[]))
        with pytest.raises(Refused, match="virtio-rng"):
            await orch.import_archive(without, trust=True)
        assert there(world) == set()
        assert await orch.domains() == ()
        uuid = (await catalog_of(world.orch).domain(NAME)).uuid
        await orch.import_archive(archive, trust=True, same_identity=True)
        assert (await catalog_of(orch).domain(NAME)).uuid == uuid
        with pytest.raises(TargetExists, match="--as"):
            await orch.import_archive(archive, trust=True)
        with pytest.raises(TargetExists, match="--same-identity"):
            await orch.import_archive(archive, trust=True, same_identity=True, name="twin")


def edited(archive: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Return an archive like another one, with another manifest."""
    path = archive.with_name(f"edited-{archive.name}")
    with tarfile.open(archive) as tar, tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for member in tar:
            data = tar.extractfile(member)
            assert data is not None
            content = data.read()
            if member.name == "manifest.json":
                manifest = json.loads(content)
                edit(manifest)
                content = json.dumps(manifest).encode()
                member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def _backed(world: World, path: Path) -> bytes:
    image = path / "backed.qcow2"
    secret = path / "secret"
    secret.write_bytes(bytes(16 * 2**20))
    command = [world.qemu.img, "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(image)]
    subprocess.run(command, check=True)
    return image.read_bytes()


async def test_hostile(world: World, tmp_path: Path) -> None:
    """What leads out of the archive, lies about itself, or is cut short: refused, and nothing is left."""
    await world.orch.destroy(NAME)
    await world.create("point", flags=CreateFlag.DISK_ONLY)
    good = tmp_path / "good"
    await world.orch.export(NAME, "point", good)
    with tarfile.open(good) as tar:
        parts = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
    manifest = json.loads(parts["manifest.json"])
    manifest["definition"]["emulator"] = "/tmp/evil"  # noqa: S108 - dropped
    backed = _backed(world, tmp_path)

    def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(content), kind, link
        return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)

    def whole(document: Any = manifest, **files: bytes) -> bytes:
        contents = {**parts, "manifest.json": json.dumps(document).encode()}
        contents |= {name.replace("__", "/") + ".qcow2": content for name, content in files.items()}
        return b"".join(member(name, content) for name, content in contents.items()) + bytes(1024)

    def told(target: str, content: bytes) -> dict[str, Any]:
        import xxhash  # noqa: PLC0415

        disks = [dict(disk) for disk in manifest["disks"]]
        disk = next(disk for disk in disks if disk["target"] == target)
        disk |= {"size": len(content), "checksum": f"xxh3-128:{xxhash.xxh3_128(content).hexdigest()}"}
        return {**manifest, "disks": disks}

    head = member("manifest.json", json.dumps(manifest).encode())
    long = member("manifest.json", b"[" * 100_000)
    pax = member("././@PaxHeader", b"30 path=../../../etc/passwd\n", tarfile.XHDTYPE)
    hostile = {
        "a way out": head + member("../../evil", b"x"),
        "a link": head + member("disks/vda.qcow2", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        "a header that extends another": head + pax + whole()[len(head) :],
        "deep JSON": long,
        "no JSON": member("manifest.json", b"\xff\xfe"),
        "not a tar": b"hello" * 1000,
        "empty": b"",
        "cut short": whole()[:-200_000],
        "another byte": whole(disks__vda=parts["disks/vda.qcow2"][:-1] + b"x"),
        "more in it": whole()[:-1024] + member("more", b"x") + bytes(1024),
        "a backing file": whole(told("vda", backed), disks__vda=backed),
        "not a qcow2": whole(told("vda", b"raw" * 1000), disks__vda=b"raw" * 1000),
        "a newer format": whole({**manifest, "format": 99}),
        "an unknown key": whole({**manifest, "hooks": {"after": "rm -rf /"}}),
        "an id": whole({**manifest, "uuid": "../x"}),
        "a path": whole({**manifest, "definition": {**manifest["definition"], "serial": "/etc/passwd"}}),
        "a domain's name": whole({**manifest, "definition": {**manifest["definition"], "name": "../locks"}}),
        "a name of the root's": whole({**manifest, "definition": {**manifest["definition"], "name": "locks"}}),
        "a word of QEMU's": whole(
            {**manifest, "definition": {**manifest["definition"], "machine": "q35,kernel=/x"}}
        ),
        "a wrong size": whole({**manifest, "disks": [{**disk, "virtual_size": 1} for disk in manifest["disks"]]}),
    }
    async with other_root(world) as orch:
        for what, content in hostile.items():
            path = tmp_path / "hostile"
            path.write_bytes(content)
            with pytest.raises((InvalidInput, DamagedSnapshot)) as caught:
                await orch.import_archive(path)
            assert "\n" not in str(caught.value), what
            assert there(world) == set(), what
        path.write_bytes(whole())
        got = await orch.import_archive(path)
        assert got.dropped == ('emulator = "/tmp/evil"',)
        assert [record.state for record in await orch.operations(outcome="running")] == []


async def test_snaporch_dies(world: World) -> None:
    """While an archive is written, or taken over: the next start removes what was made, and nothing else."""
    await world.orch.destroy(NAME)
    catalog = catalog_of(world.orch)
    place, mine = world.root / "new", world.directory / "mine"
    for kind, domain in ((OperationKind.EXPORT, NAME), (OperationKind.IMPORT, "new")):
        before = world.files()
        place.mkdir(mode=0o700, exist_ok=True)
        files = (str(place / "vda.1"), str(world.directory / "web.1.part"), str(place / "never-made"))
        for path in files[:2]:
            Path(path).write_text("half")
        mine.write_text("mine")
        operation = Operation(kind, domain, "point")
        plan = MadePlan("qemu", files, str(place / "run-12345678"))
        await catalog.write(Change(operation=operation.record(), begins=True, plan=dumps(plan)))
        ended = await world.orch.recover()
        assert [(record.kind, record.state) for record in ended] == [(kind, "rolled-back")]
        mine.unlink()
        assert world.files() == before
    assert not place.exists()
