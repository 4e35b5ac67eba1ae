"""Paths and images of requests, on real files: what is the root's own, elsewhere, or others' to move."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio

from snaporch import CreateFlag, DeviceDisk, DiskSnapshot, DomainDefinition, DomainSnapshot, open_orchestrator
from snaporch.drivers.local import look, walk
from snaporch.drivers.local.lineage import Unread, lineage
from snaporch.errors import Forbidden, InvalidInput, Refused
from snaporch.orchestrator import Orchestrator
from snaporch.service.app import make_app
from snaporch.service.config import Config
from snaporch.service.service import open_service
from tests.service.conftest import ROOT_PEER, peer

OWN = (
    "plans/x.toml",
    "service.toml",
    "tokens.json",
    "tokens.json.new",
    "catalog.sqlite3",
    "catalog.sqlite3-journal",
    "locks/x.lock",
    "Plans/x.toml",
    "other/x.qcow2",
    "d/run-0a1b2c3d/qmp.sock",
    "d/run-0a1b2c3d4e5/query.sock",
    "d/run-0a1b2c3d4e5/file",
    "d/qemu.log",
    "d",
    "x.qcow2",
    "d/../plans/x.toml",
    "d/run-0a1b2c3d/../../plans/x.toml",
)


@attrs.frozen
class Place:
    """A service on real files, whose images may be in one directory."""

    orch: Orchestrator
    http: httpx2.AsyncClient
    images: Path
    root: Path

    def image(self, name: str, *options: str, size: str = "1M") -> str:
        """Make a qcow2 image and return its path."""
        path = str(self.images / name)
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *options, path, size], check=True)
        return path

    async def define(self, path: str, format_: str = "qcow2", **more: Any) -> httpx2.Response:
        """Ask for a domain with one disk."""
        disk = {"target": "vda", "path": path, "format": format_}
        return await self.http.post("/v1/domains", json={"name": "d", "disks": [disk]} | more)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    images = tmp_path / "images"
    images.mkdir(mode=0o755)
    async with (
        open_orchestrator(tmp_path / "root", realtime=False) as orch,
        open_service(orch, Config(directories=(str(images),))) as service,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=make_app(service)), base_url="http://x") as http,
    ):
        with peer(ROOT_PEER):
            yield Place(orch, http, images, orch.root)


@pytest.mark.parametrize(
    "name",
    [
        *("plans", "locks", "LOCKS", "service.toml", "service.sock", "tokens.json", "catalog.sqlite3-wal"),
        *("hooks.toml", "Hooks.TOML", "hooks.toml.bak"),
    ],
)
async def test_names_of_the_root(place: Place, name: str) -> None:
    """No domain is called as something that the root keeps: its directory would be that."""
    with pytest.raises(InvalidInput, match="cannot be called"):
        await place.orch.define(DomainDefinition(name))
    with pytest.raises(InvalidInput, match="cannot be called"):
        await place.orch.attach(name, "/nowhere")
    asked = await place.http.post("/v1/domains/d/snapshots/s/clone", json={"new": name})  # which an operator may
    assert asked.status_code == 422


async def test_an_image_that_a_definition_names(place: Place, tmp_path: Path) -> None:
    """Root defines a domain with its image anywhere: the overlays over that are followed, and nothing else is."""
    mine, other = tmp_path / "mine.qcow2", tmp_path / "other.qcow2"
    for path in (mine, other):
        Path(place.image(path.name)).rename(path)
    await place.orch.define(DomainDefinition("d", disks=(DeviceDisk("vda", str(mine)),)))
    await place.orch.create("d", DomainSnapshot("s"), CreateFlag.DISK_ONLY)
    assert (await place.http.get("/v1/domains/d")).json()["problem"] == ""
    await place.orch.revert("d", "s")
    for base in (other, mine):  # nor by a definition that comes in: it would read another domain's disk
        refused = await place.define(place.image(f"on-{base.name}", "-b", str(base), "-F", "qcow2"))
        assert refused.status_code == 403


async def test_an_image_that_is_exchanged(place: Place, tmp_path: Path) -> None:
    """Whoever may write to a domain's image does not come to another domain's by it: by no file and no link."""
    mine, other = place.image("mine.qcow2"), tmp_path / "other.qcow2"
    Path(place.image("other.qcow2")).rename(other)
    await place.orch.define(DomainDefinition("o", disks=(DeviceDisk("vda", str(other)),)))
    await place.orch.create("o", DomainSnapshot("s"), CreateFlag.DISK_ONLY)
    (status,) = (await place.orch.domain_info("o")).disks
    clone = tmp_path / "clone.qcow2"
    Path(place.image("clone.qcow2", "-b", str(other), "-F", "qcow2")).rename(clone)
    await place.orch.define(DomainDefinition("c", disks=(DeviceDisk("vda", str(clone)),)))
    assert (await place.http.get("/v1/domains/c")).json()["problem"] == ""  # it was defined so
    assert (await place.define(mine)).status_code == 200
    good = Path(mine).read_bytes()
    for there in (str(other), status.active):
        exchanged = place.image("exchanged.qcow2", "-b", there, "-F", "qcow2")
        for link in (None, exchanged, there):
            Path(mine).unlink()
            if link is None:
                Path(mine).write_bytes(Path(exchanged).read_bytes())
            else:
                Path(mine).symlink_to(link)
            shown = (await place.http.get("/v1/domains/d")).json()
            assert "is outside the directories" in shown["problem"], (there, link)
            assert (await place.http.post("/v1/domains/d/start")).status_code in {403, 409}  # or: who reads it
            taken = await place.http.post("/v1/domains/d/snapshots?wait=9", json={"snapshot": {"memory": False}})
            assert taken.status_code == 403, taken.text
    Path(mine).unlink()
    Path(mine).write_bytes(good)
    assert (await place.http.get("/v1/domains/d")).json()["problem"] == ""


async def test_the_roots_own_paths(place: Place) -> None:
    """In the root a path is below the domain's directory and none of snaporch's own, however it is spelled."""
    (place.root / "plans").mkdir()
    (place.root / "d").mkdir()
    (place.root / "service.toml").touch()
    (place.images / "way").symlink_to(place.root)
    (place.images / "name").hardlink_to(place.root / "service.toml")
    paths = [str(place.root / own) for own in OWN]
    paths += [str(place.images / "way" / own) for own in OWN[:3]] + [str(place.images / "name")]
    paths += [f"/proc/self/root{place.root}/plans/x.toml", f"{place.root}//./plans/x.toml"]
    for path in paths:
        for key in ("serial", "kernel"):
            asked: Any = {key: path}
            with pytest.raises(InvalidInput):
                await place.orch.define(DomainDefinition("d", **asked))
            assert (await place.http.post("/v1/domains", json={"name": "d", key: path})).status_code in {403, 422}
        assert (await place.define(path)).status_code in {403, 422}, path
    Path(place.image("x.qcow2")).rename(place.root / "d" / "x.qcow2")
    assert (await place.define(str(place.root / "d" / "x.qcow2"))).status_code == 200


async def test_the_roots_own_files_by_another_name(place: Place) -> None:
    """No name that a link or a mount gives to a file or directory of the root leads there."""
    (place.root / "plans").mkdir(exist_ok=True)
    for name in ("hooks.toml", "certificate.pem", "plans/x.toml"):
        (place.root / name).touch()
    (place.images / "linked").hardlink_to(place.root / "hooks.toml")
    (place.images / "pem").hardlink_to(place.root / "certificate.pem")
    mounted = [("file", "hooks.toml"), ("directory", "plans"), ("all", ".")]
    (place.images / "file").touch()
    for name in ("directory", "all"):
        (place.images / name).mkdir()
    try:
        for name, what in mounted:
            subprocess.run(["mount", "--bind", str(place.root / what), str(place.images / name)], check=True)
        for name in (
            "linked",
            "pem",
            "file",
            "directory/new.toml",
            "directory/x.toml",
            "all/hooks.toml",
            "all/new.toml",
        ):
            path = str(place.images / name)
            with pytest.raises(InvalidInput):
                await place.orch.define(DomainDefinition("d", serial=path))
            answer = await place.http.post("/v1/domains", json={"name": "d", "serial": path})
            assert answer.status_code == 422, (name, answer.text)
    finally:
        for name, _ in mounted:
            subprocess.run(["umount", str(place.images / name)], check=False)
    assert (
        await place.http.post("/v1/domains", json={"name": "d", "serial": str(place.images / "s")})
    ).status_code == 200


async def test_a_variable_store_is_an_image(place: Place, tmp_path: Path) -> None:
    """What `[nvram]` names is confined as a disk is: the path, and every link below it."""
    outside = tmp_path / "outside.raw"
    outside.write_bytes(bytes(2**20))
    bad = [
        str(outside),
        str(place.root / "plans" / "x.toml"),
        place.image("vars.qcow2", "-b", str(outside), "-F", "raw"),
        place.image("shadow.qcow2", "-b", "/etc/shadow", "-F", "raw"),
    ]
    for path in bad:
        store = {"path": path, "format": "qcow2" if path.endswith("qcow2") else "raw"}
        answer = await place.http.post("/v1/domains", json={"name": "d", "firmware": "uefi", "nvram": store})
        assert answer.status_code in {403, 422}, (path, answer.text)
        assert "outside the directories" in answer.text or "in the root" in answer.text, answer.text


async def test_the_roots_own_paths_in_a_create(place: Place) -> None:
    """Neither an overlay nor a memory file is made at one of the root's own names, nor in its plans."""
    (place.root / "plans").mkdir()
    await place.orch.define(DomainDefinition("d", disks=(DeviceDisk("vda", place.image("a.qcow2")),)))
    before = sorted(place.root.rglob("*"))
    for name in OWN:
        path = str(place.root / name)
        overlay = DiskSnapshot(DeviceDisk("vda"), external_sn=DeviceDisk("vda", path))
        with pytest.raises(Refused):
            await place.orch.create("d", DomainSnapshot("s", disks=(overlay,)), CreateFlag.DISK_ONLY)
        body = {"snapshot": {"memory": False, "disks": [{"disk": {"target": "vda"}, "external_sn": {}}]}}
        body["snapshot"]["disks"][0]["external_sn"] = {"target": "vda", "path": path}  # type: ignore[index]
        assert (await place.http.post("/v1/domains/d/snapshots?wait=9", json=body)).status_code in {403, 409, 422}
    assert [path for path in sorted(place.root.rglob("*")) if path not in before and "locks" not in str(path)] == []
    own = DiskSnapshot(DeviceDisk("vda"), external_sn=DeviceDisk("vda", str(place.root / "d" / "mine.qcow2")))
    await place.orch.create("d", DomainSnapshot("run-1", disks=(own,)), CreateFlag.DISK_ONLY)


async def test_every_link_is_confined(place: Place, tmp_path: Path) -> None:
    """What backs an image, and where its data is, is where a service may look, or is not followed at all."""
    outside = tmp_path / "outside.raw"
    outside.write_bytes(bytes(2**20))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        url = f"nbd://127.0.0.1:{server.getsockname()[1]}/x"
        bad = [
            place.image("shadow.qcow2", "-b", "/etc/shadow", "-F", "raw"),
            place.image("json.qcow2", "-b", 'json:{"driver":"file","filename":"/etc/shadow"}', "-F", "raw"),
            place.image("nbd.qcow2", "-b", url, "-F", "raw"),
            place.image("file.qcow2", "-b", "file:/etc/shadow", "-F", "raw"),
            place.image("vmdk.qcow2", "-b", str(place.images / "x.vmdk"), "-F", "vmdk"),
            place.image("dots.qcow2", "-b", "../outside.raw", "-F", "raw"),
            place.image("data.qcow2", "-o", f"data_file={outside}"),
            place.image("control.qcow2", "-b", str(place.root / "catalog.sqlite3"), "-F", "raw"),
        ]
        (place.images / "link.raw").symlink_to(outside)
        bad.append(place.image("linked.qcow2", "-b", "link.raw", "-F", "raw"))
        bad.append(place.image("deep.qcow2", "-b", bad[0], "-F", "qcow2"))
        for path in bad:
            answer = await place.define(path)
            assert answer.status_code in {403, 422}, (path, answer.text)
        good = place.image("good.qcow2", "-b", place.image("base.qcow2"), "-F", "qcow2")
        assert (await place.define(good)).status_code == 200
        for path in bad:  # it is exchanged later, by whoever may write there
            Path(good).write_bytes(Path(path).read_bytes())
            shown = (await place.http.get("/v1/domains/d")).json()
            assert shown["disks"][0]["chain"] == [good]
            assert (await place.http.post("/v1/domains/d/start")).status_code in {403, 409, 422}
            taken = await place.http.post("/v1/domains/d/snapshots?wait=9", json={"snapshot": {"memory": False}})
            assert taken.status_code in {403, 409, 422}
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()


async def test_a_raw_disk_stays_raw(place: Place) -> None:
    """A guest that writes an image's header to its raw disk has written bytes: nothing is read after it."""
    header = Path(place.image("header.qcow2", "-b", "/etc/shadow", "-F", "raw")).read_bytes()
    disk = place.images / "disk.raw"
    disk.write_bytes(bytes(len(header)))
    assert (await place.define(str(disk), "raw")).status_code == 200
    disk.write_bytes(header)
    await place.orch.create("d", DomainSnapshot("s"), CreateFlag.DISK_ONLY)
    (status,) = (await place.orch.domain_info("d")).disks
    assert status.chain[1:] == (str(disk),)
    assert [(link.format, link.virtual_size) for link in lineage(status.active, "qcow2")][1:] == [
        ("raw", len(header))
    ]


def test_lineage_says_what_it_cannot_read(tmp_path: Path) -> None:
    """An image that leads to itself, is a FIFO, is no image or does not say what it is backed by is refused."""
    path = tmp_path / "a.qcow2"
    make = ["qemu-img", "create", "-q", "-u", "-f", "qcow2"]
    subprocess.run([*make, "-b", "./a.qcow2", "-F", "qcow2", path, "1M"], check=True)
    with pytest.raises(Refused, match="itself"):
        lineage(str(path), "qcow2")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for format_ in ("raw", "qcow2"):
        with pytest.raises(Refused, match="neither a file"):
            lineage(str(fifo), format_)
    whole = path.read_bytes()
    for content in (b"", b"QFI\xfb", whole[:40], whole[:20] + b"\xff" * 80, b"\0" * 4096):
        path.write_bytes(content)
        with pytest.raises(Refused, match="no qcow2 image"):
            lineage(str(path), "qcow2")
    path.write_bytes(whole.replace(b"\xe2\x79\x2a\xca", b"\xe2\x79\x2a\xcb"))  # another extension: no format
    with pytest.raises(Unread, match="of no format"):
        lineage(str(path), "qcow2")


@pytest.mark.parametrize(
    "definition",
    [
        {"machine": "pc,initrd=/etc/shadow"},
        {"machine": "pc,kernel=/x,initrd=/y"},
        {"machine": "pc,smm=off,firmware=x"},
        {"machine": "-x"},
        {"accel": "tcg,x=y"},
        {"append": "a\nb"},
        {"initrd": "{images}/x,/etc/shadow"},
        {"initrd": "{images}/x /etc/shadow"},
        {"memory": 10**30},
        {"vcpus": 10**30},
        {"driver": "nothing"},
    ],
)
async def test_words_that_mean_more(place: Place, definition: dict[str, Any]) -> None:
    """What becomes part of a command line says there what it says in the definition, and nothing else."""
    words = {k: v.format(images=place.images) if isinstance(v, str) else v for k, v in definition.items()}
    answer = await place.http.post("/v1/domains", json={"name": "d"} | words)
    assert answer.status_code == 422, answer.text
    for good in ("q35", "pc-q35-7.2", "pc,smm=off,vmport=on"):
        assert (await place.http.post("/v1/domains", json={"name": "d", "machine": good})).status_code == 200


def test_a_way_that_others_could_move(tmp_path: Path) -> None:
    """A path is refused that leads through what somebody else may change, and through links to such places."""
    own, shared, theirs = tmp_path / "own", tmp_path / "shared", tmp_path / "theirs"
    for directory in (own, shared, theirs):
        directory.mkdir(mode=0o755)
    trusted = {os.geteuid()}
    shared.chmod(0o777)
    (own / "link").symlink_to("../shared/x")
    (own / "there").symlink_to(own / "file")
    (own / "loop").symlink_to("loop")
    assert walk.resolve(f"{own}/.//../own/there", trusted) == str(own / "file")
    assert walk.resolve(f"{own}/new/x", trusted) == str(own / "new" / "x")
    with pytest.raises(Forbidden, match="does not exist"):
        walk.resolve(f"{own}/new/../there", trusted)
    assert walk.resolve("/../..", trusted) == "/"
    for path in (shared / "x", own / "link", own / "loop"):
        with pytest.raises(Forbidden):
            walk.resolve(str(path), trusted)
    shared.chmod(0o1777)
    assert walk.resolve(str(own / "link"), trusted) == str(shared / "x")
    if os.geteuid() == 0:
        os.chown(theirs, 65534, -1)
        (shared / "planted").mkdir()
        os.chown(shared / "planted", 65534, -1)
        for path in (theirs / "x", shared / "planted"):
            with pytest.raises(Forbidden, match="owners"):
                walk.resolve(str(path), trusted)
            assert walk.resolve(str(path), {65534}) == str(path)


async def test_a_disk_that_never_answers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain with a FIFO for a disk says so; one on a dead mount, too, in time; no other waits."""
    (place.images / "fifo").write_bytes(bytes(512))
    await place.orch.define(DomainDefinition("f", disks=(DeviceDisk("vda", str(place.images / "fifo"), "raw"),)))
    (place.images / "fifo").unlink()
    os.mkfifo(place.images / "fifo")
    dead, over = place.images / "dead", trio.Event()
    dead.mkdir()
    held = trio.lowlevel.current_trio_token()

    disks = [DeviceDisk("vda", place.image(f"dead/{number}.qcow2")) for number in range(8)]

    def hang(path: str, *_: object) -> Any:
        if "dead" in path:
            trio.from_thread.run(over.wait, trio_token=held)
        return lineage(path, *_)  # type: ignore[arg-type]

    for number, disk in enumerate(disks):
        await place.orch.define(DomainDefinition(f"dead{number}", disks=(disk,)))
    monkeypatch.setattr("snaporch.drivers.local.confine.lineage", hang)
    monkeypatch.setattr(look, "LOOK_SECONDS", 2.0)
    assert (await place.define(place.image("good.qcow2"))).status_code == 200
    try:
        for _ in range(2):
            began = time.monotonic()
            found = (await place.http.get("/v1/domains")).json()["items"]
            sizes = {each["name"]: each["disks"][0]["virtual_size"] for each in found}
            assert sizes == {f"dead{n}": 0 for n in range(8)} | {"d": 2**20, "f": 0}
            problems = {each["name"]: each["problem"] for each in found}
            assert "has not answered" in problems["dead7"]
            assert "neither a file" in problems["f"]
            assert problems["d"] == ""
        assert time.monotonic() - began < 60
        assert len(look._places[str(dead)].begun) == look.THREADS
    finally:
        over.set()


@pytest.fixture
def dead_mount() -> Iterator[Callable[[Path], None]]:
    """Give a function that makes a directory a mount which never answers: nobody reads its FUSE device."""
    libc, device = ctypes.CDLL(None, use_errno=True), os.open("/dev/fuse", os.O_RDWR)
    mounted: list[Path] = []

    def mount(directory: Path) -> None:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        assert libc.mount(b"dead", os.fsencode(directory), b"fuse", 0, options) == 0, ctypes.get_errno()
        mounted.append(directory)

    yield mount
    os.close(device)  # whoever waits for an answer has one now
    for directory in mounted:
        assert libc.umount2(os.fsencode(directory), 2) == 0


async def test_a_dead_mount_holds_nobody_else_up(
    place: Place, dead_mount: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done with other domains, for which all images are looked at, goes on; only merges are refused."""
    monkeypatch.setattr(look, "LOOK_SECONDS", 2.0)
    dead = place.images / "dead"
    dead.mkdir()
    for number in range(look.THREADS):
        disk = DeviceDisk("vda", place.image(f"dead/{number}.qcow2"))
        await place.orch.define(DomainDefinition(f"dead{number}", disks=(disk,)))
    dead_mount(dead)
    with trio.fail_after(120):  # it would be for ever
        found = (await place.http.get("/v1/domains")).json()["items"]  # side by side; then it is known to be dead
        assert all("has not answered" in each["problem"] for each in found)
        assert (await place.define(place.image("good.qcow2"))).status_code == 200
        for name in ("s1", "s2"):
            await place.orch.create("d", DomainSnapshot(name), CreateFlag.DISK_ONLY)
        with pytest.raises(Refused, match=r"cannot be seen what others read.*has not answered"):
            await place.orch.delete("d", "s1")
        with pytest.raises(Refused, match="has not answered"):
            await place.orch.define(DomainDefinition("e", disks=(DeviceDisk("vda", str(dead / "0.qcow2")),)))
        assert [record.name for record in await place.orch.list("d")] == ["s1", "s2"]
