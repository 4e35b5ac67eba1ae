"""Work on files as another user: what that user may not do is not done, whatever is in the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from snaporch.catalog import Change
from snaporch.drivers.local import durable, filework, qemu_img, servant, trace
from snaporch.drivers.local.as_user import User, as_user, only_roots
from snaporch.drivers.local.confine import Confinement
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.process import LocalProcess, started
from snaporch.drivers.local.users_storage import UsersStorage
from snaporch.drivers.qmp.process import QemuProcess
from snaporch.engine.run import Operation
from snaporch.engine.states import Signal
from snaporch.errors import DamagedSnapshot, Forbidden, OperationFailed, Refused, Unsupported
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.record import FileRecord, OperationKind
from snaporch.model.request import MergeOptions
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from snaporch.operations.disks import reattached
from snaporch.orchestrator import catalog_of, open_orchestrator

NOBODY = 65534
USER = User(NOBODY, NOBODY, ())

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work as another user")


def state(path: Path) -> tuple[int, int, int, int, bytes]:
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode, status.st_mtime_ns, path.read_bytes()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of nobody's, with a secret of root's beside it."""
    home = Path(tempfile.mkdtemp(prefix="snaporch-as-user-"))
    home.chmod(0o755)
    (home / "secret").write_text("root's")
    (home / "secret").chmod(0o600)
    (home / "secrets").mkdir(mode=0o700)
    (home / "secrets/vda.qcow2").write_text("root's own")
    (home / "secrets/vda.qcow2").chmod(0o600)
    theirs = home / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, NOBODY, NOBODY)
    yield theirs
    shutil.rmtree(home)


@pytest.fixture
def storage(tmp_path: Path) -> UsersStorage:
    own = tmp_path / "root/guest"
    own.mkdir(parents=True, mode=0o700)
    return UsersStorage(user=USER, own=str(own))


def image(path: Path, owner: int = NOBODY, *more: str) -> DeviceDisk:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *more, str(path), "16M"], check=True)
    os.chown(path, owner, owner)
    path.chmod(0o600)
    return DeviceDisk("vda", str(path))


def test_who_it_is() -> None:
    """The process has the user's ids and groups alone, no rights to get others, and nobody may look into it."""
    call = as_user(User(NOBODY, NOBODY, (100, 101))).call
    status = call(filework.read_text, "/proc/self/status")
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in status.splitlines()}
    assert set(found["Uid"]) | set(found["Gid"]) == {"65534"}
    assert found["Groups"] == ["100", "101"]
    assert {int(found[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert found["NoNewPrivs"] == ["1"]
    done = subprocess.run(
        ["cat", f"/proc/{found['Pid'][0]}/environ"], user=NOBODY, capture_output=True, check=False
    )
    assert done.returncode


def test_errors_are_told(place: Path) -> None:
    """What it may not do, and what goes wrong there, comes out as if it had been done here."""
    call = as_user(USER).call
    with pytest.raises(PermissionError) as refused:
        call(filework.read_text, str(place.parent / "secret"))
    assert refused.value.filename == str(place.parent / "secret")
    with pytest.raises(FileExistsError):
        call(filework.make_file, str(place))
    (place / "no-image").write_text("nothing")
    with pytest.raises(DamagedSnapshot) as damaged:
        call(trace.trace, str(place / "no-image"), "qcow2")
    assert damaged.value.path == str(place / "no-image")
    with pytest.raises(Refused, match="cannot look at"):
        call(trace.trace, str(place / "nothing"), "raw")


def test_it_is_killed(place: Path) -> None:
    """The user may end the process: while it works that call fails; the next has another one."""
    call = as_user(User(NOBODY, NOBODY, (102,))).call
    pid = int(call(filework.read_text, "/proc/self/stat").split()[0])
    subprocess.run(["kill", "-KILL", str(pid)], user=NOBODY, check=True)
    while started(pid) is not None:
        time.sleep(0.001)
    assert call(filework.exists, str(place))
    os.mkfifo(place / "fifo", 0o666)
    pid = int(call(filework.read_text, "/proc/self/stat").split()[0])
    failed = []

    def hangs() -> None:
        with pytest.raises(OperationFailed, match="as nobody has ended") as raised:
            call(filework.read_text, str(place / "fifo"))
        failed.append(raised.value)

    thread = threading.Thread(target=hangs)
    thread.start()
    assert call(filework.exists, str(place))  # one that hangs keeps no other from its work
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert failed


def test_nobody_waits_any_more(place: Path) -> None:
    """Whoever has asked is killed before the process has begun: nothing is done, as recovery may be over."""
    place.chmod(0o777)
    ours, theirs = socket.socketpair()
    request = {"do": f"{filework.__name__}:make_directory", "arguments": [str(place / "made")], "options": {}}
    with ours:
        ours.sendall(json.dumps(request).encode() + b"\n")
    words = [sys.executable, "-I", servant.__file__, str(NOBODY), str(NOBODY), ""]
    with theirs:
        done = subprocess.run(words, stdin=theirs.fileno(), capture_output=True, check=True)
    assert not done.stderr
    assert not (place / "made").exists()


async def test_it_is_stopped(place: Path, storage: UsersStorage) -> None:
    """The user may stop the process: whoever waits for it can be cancelled, and the next call has another one."""
    storage.user = User(NOBODY, NOBODY, (104,))
    base = image(place / "vda.qcow2")
    calls: list[Callable[[], Awaitable[object]]] = [
        partial(storage.mark, base.path, "/root"),
        partial(storage.seal, base.path),
    ]
    for call in calls:
        pid = int(as_user(storage.user).call(filework.read_text, "/proc/self/stat").split()[0])
        subprocess.run(["kill", "-STOP", str(pid)], user=NOBODY, check=True)
        with trio.move_on_after(0.3) as scope:
            await call()
        assert scope.cancelled_caught
        assert not Path(f"/proc/{pid}").exists()
        await call()


async def test_a_pipe_in_its_place(place: Path, storage: UsersStorage) -> None:
    """What waits at a pipe for ever, where an image was, is not waited for."""
    path = str(place / "vda.qcow2")
    os.mkfifo(path)
    os.chown(path, NOBODY, NOBODY)
    record = FileRecord(path, 0, "xxh3-128:0")
    with trio.fail_after(30):
        for call in (
            storage.seal(path),
            storage.check(record, thorough=True),
            storage.inside(path),
            storage.seal_inside(path, "point"),
            storage.trace(path, "qcow2"),
            storage.chain(path, "qcow2"),
            storage.make_overlay(path, DeviceDisk("vda", path), 2**20),
        ):
            with pytest.raises((OSError, Refused, OperationFailed)):
                await call
        await storage.mark(path, "/root")
        await storage.write_back([path])
    assert not as_user(USER).call(filework.is_encrypted, path)
    with pytest.raises(OSError, match="Invalid argument"):
        as_user(USER).call(durable.sync_path, path)


async def test_it_cannot_be_told(place: Path, storage: UsersStorage) -> None:
    """Where the user may not look nothing is said to be missing."""
    with pytest.raises(Refused, match=r"cannot look at .*/secrets/nothing: Permission denied"):
        await storage.exists(f"{place.parent}/secrets/nothing")
    assert not await storage.exists(f"{place}/nothing")
    assert storage.is_own(storage.own)
    assert not storage.is_own(f"{storage.own}-other")


@pytest.mark.parametrize(
    "says",
    ["x", "[]", "{}", '[{"filename": 3}]', "[" * 9999, '{"filename": "/a", "format": "raw", "virtual-size": "b"}'],
)
async def test_qemu_img_says_anything(
    place: Path, storage: UsersStorage, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user may have the program, which runs as that user, say what it never says, and without end."""
    (place / "says").write_text(says)
    program = place / "qemu-img"
    program.write_text(f"#!/bin/sh\ncat {place}/says\n")
    program.chmod(0o755)
    storage.qemu_img = str(program)
    base = image(place / "vda.qcow2")
    for call in (storage.inspect(base.path, "qcow2"), storage.read_cost(base.path, "qcow2")):
        with pytest.raises(Refused):
            await call
    monkeypatch.setattr(qemu_img, "_MOST_BYTES", 10)
    program.write_text("#!/bin/sh\nhead -c 1000000 /dev/zero\n")
    assert len(await storage._qemu_img("info")) == 10


async def test_whose_files_they_are(place: Path, tmp_path: Path) -> None:
    """What was made with one user's rights is never gone on with with others: by no definition, nor as another."""
    base = image(place / "vda.qcow2")
    surroundings = {"uid": NOBODY, "gid": NOBODY, "groups": []}
    process = QemuProcess(LocalProcess(2**22 + 1, 1), "/q", attached=True, argv=("q",), surroundings=surroundings)
    record = DomainRecord(DomainDefinition("web", disks=(base,)), template=process.handle("qemu"))
    async with open_orchestrator(tmp_path / "root") as orch:
        catalog = catalog_of(orch)
        await catalog.write(Change(domains=(record,)))
        await orch.create("web", DomainSnapshot("point"), CreateFlag.DISK_ONLY)
        theirs = await catalog.domain("web")
        (over,) = theirs.active.values()
        assert os.stat(over.path).st_uid == NOBODY
        for disk in (base, over):
            with pytest.raises(Refused, match="with the rights of the user nobody"):
                await orch.define(DomainDefinition("web", disks=(disk,)))
        ours = attrs.evolve(theirs, template=None)
        with pytest.raises(Refused, match="with the rights of the user nobody"):
            await reattached(orch._context, theirs, ours)
        assert await catalog.domain("web") == theirs
        await catalog.write(Change(domains=(ours,)))
        with pytest.raises(Refused, match="with those of the user nobody"):
            await orch.revert("web", "point")
        await catalog.write(Change(domains=(theirs,)))
        await orch.delete("web", "point")
        operation = Operation(OperationKind.CREATE, "web", "other")
        operation.machine.send(Signal.PREPARE)
        await catalog.write(Change(operation=operation.record(), begins=True, plan="[]"))
        for call in (orch.define(DomainDefinition("web", disks=(base,))), orch.undefine("web")):
            with pytest.raises(Refused, match="create other was cut short"):
                await call
        await catalog.write(Change(operation=operation.record(ended=True)))
        await orch.define(DomainDefinition("web", disks=(base,)))


@pytest.mark.parametrize(
    "answer", [b"", b"x\n", b"[]\n", b'{"value": 3}\n', b'{"error": "SystemExit"}\n', b"[" * 99999]
)
def test_nonsense(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came from there would be an error of that one call."""
    liar = as_user(User(NOBODY, NOBODY, (103,)))
    program = f"import os, sys; sys.stdin.readline(); os.write(0, {answer!r})"
    script = Path(tempfile.mkstemp(suffix=".py")[1])
    script.write_text(program)
    monkeypatch.setattr(servant, "__file__", str(script))
    with pytest.raises(OperationFailed):
        liar.call(trace.trace, "/", "raw")
    script.unlink()


def test_whose_directory(place: Path, tmp_path: Path) -> None:
    assert only_roots("/etc")
    assert only_roots(str(tmp_path))
    for path in ("/tmp", str(place), str(place / "below"), "/nowhere/at/all"):  # noqa: S108 - of all
        assert not only_roots(path)
    place.chmod(0o777)
    os.chown(place, 0, 0)
    assert not only_roots(str(place))


async def test_overlays(place: Path, storage: UsersStorage) -> None:
    """An overlay is the image's owner's and group's, 0600, or 0660 where QEMU gets at it through the group."""
    base = image(place / "vda.qcow2")
    assert storage.owner(base.path) == (NOBODY, NOBODY)
    over = str(place / "over.qcow2")
    await storage.make_overlay(over, base, 16 * 2**20, storage.owner(base.path))
    status = os.stat(over)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, NOBODY, 0o600)
    assert [disk.path for disk in await storage.chain(over, "qcow2")] == [over, base.path]
    with pytest.raises(FileExistsError):
        await storage.make_overlay(over, base, 16 * 2**20, storage.owner(base.path))
    await storage.commit_image(over, base.path, options=MergeOptions(), progress=lambda *_: None)
    await storage.remove(over)
    assert not os.path.exists(over)


async def test_overlays_in_a_directory_of_roots(storage: UsersStorage, place: Path) -> None:
    """Where nobody but root makes files, root makes them, and gives them away by what is open, not by a name."""
    pool = place.parent / "pool"
    pool.mkdir(mode=0o711)
    base = image(pool / "vda.qcow2", 0)
    os.chown(base.path, 0, NOBODY)
    os.chmod(base.path, 0o660)
    over = str(pool / "over.qcow2")
    await storage.make_overlay(over, base, 16 * 2**20, storage.owner(base.path))
    status = os.stat(over)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, NOBODY, 0o660)
    await storage.remove(over)
    assert not os.path.exists(over)
    os.chown(base.path, 0, 0)
    with pytest.raises(Unsupported, match="not in its group root"):
        storage.owner(base.path)


async def test_memory_stays_here(place: Path, storage: UsersStorage) -> None:
    """Memory is root's, in a directory that is root's alone; nowhere else."""
    path = f"{storage.own}/one.mem"
    await storage.check_memory_place(path)
    await storage.make_file(path)
    status = os.stat(path)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)
    record = await storage.seal(path)
    await storage.check(record, thorough=True)
    for other in (f"{place}/one.mem", "/root/one.mem", f"{storage.own}/../one.mem"):
        with pytest.raises(Unsupported, match="memory"):
            await storage.check_memory_place(other)
    await storage.remove(path)


async def test_an_image_is_never_here(storage: UsersStorage) -> None:
    """A hypervisor that says its image is in the domain's own directory: nobody looks into that for it."""
    path = f"{storage.own}/one.mem"
    await storage.make_file(path)
    for call in (storage.trace(path, "raw"), storage.virtual_size(path, "raw"), storage.inside(path)):
        with pytest.raises(Refused, match="Permission denied"):
            await call
    with pytest.raises(Unsupported, match="as nobody"):
        storage.owner(path)
    with pytest.raises(PermissionError):
        await storage.mark(path, "/root")


@pytest.mark.parametrize("what", ["image", "directory"])
async def test_in_its_place_is_a_link(place: Path, storage: UsersStorage, what: str) -> None:
    """The image, or its directory, is a link to what is root's by the time that work begins."""
    home = place.parent
    base, over = image(place / "vda.qcow2"), str(place / "new.qcow2")
    (home / "secrets").chmod(0o755)  # that it cannot be looked into is not what protects it
    os.chown(home, NOBODY, NOBODY)
    secrets = {path: state(path) for path in (home / "secret", home / "secrets/vda.qcow2")}
    owner = storage.owner(base.path)
    if what == "image":
        os.unlink(base.path)
        os.symlink(home / "secret", base.path)
    else:
        shutil.rmtree(place)
        os.symlink(home / "secrets", place)
    for call in (
        storage.trace(base.path, "qcow2"),
        storage.trace(base.path, "raw"),
        storage.chain(base.path, "qcow2"),
        storage.check_image(base.path, "qcow2"),
        storage.virtual_size(base.path, "raw"),
        storage.seal(base.path),
        storage.commit_overlay(base.path),
        storage.commit_image(base.path, base.path, options=MergeOptions(), progress=lambda *_: None),
        storage.rebase(base.path, None, content=False),
        storage.rebase(base.path, None, content=True),
        storage.inside(base.path),
        storage.save_inside(base.path, "point"),
    ):
        with pytest.raises((OSError, Refused, OperationFailed)):
            await call
    await storage.mark(base.path, "/root")
    await storage.write_back([base.path])
    if what == "directory":
        for call in (
            storage.make_overlay(over, base, 2**20, owner),
            storage.make_file(over),
            storage.remove(base.path),
        ):
            with pytest.raises((OSError, OperationFailed)):
                await call
    else:
        with pytest.raises(Unsupported, match="root's"):
            storage.owner(base.path)
        await storage.remove(base.path)  # the link, which is the user's
    assert {path: state(path) for path in secrets} == secrets
    assert not os.path.exists(home / "secrets/new.qcow2")


async def test_exchanged_all_the_time(place: Path, storage: UsersStorage) -> None:
    """A directory that is now the user's, now a link to root's: nothing of root's is made, changed or removed."""
    home = place.parent
    (home / "secrets/new.qcow2").write_text("root's, too")
    before = {path: state(path) for path in (home / "secrets").iterdir()}
    swap = (
        "import os,sys\np=sys.argv[1]\nwhile True:\n os.rename(p,p+'.d'); os.symlink(p+'/../secrets',p+'.l')\n"
        " os.rename(p+'.l',p); os.unlink(p); os.rename(p+'.d',p)"
    )
    os.chown(home, NOBODY, NOBODY)
    base = image(place / "vda.qcow2")
    attacker = subprocess.Popen(["python3", "-c", swap, str(place)], user=NOBODY)
    try:
        for _ in range(20):
            for call in (
                storage.make_overlay(f"{place}/new.qcow2", base, 2**20, (NOBODY, NOBODY)),
                storage.remove(f"{place}/new.qcow2"),
                storage.remove(f"{place}/vda.qcow2"),
            ):
                try:
                    await call
                except (OSError, Refused, OperationFailed):
                    await trio.lowlevel.checkpoint()
        assert attacker.poll() is None, "it went on to the end"
    finally:
        attacker.kill()
        attacker.wait()
    assert {path: state(path) for path in (home / "secrets").iterdir()} == before


async def test_a_hostile_image(place: Path, storage: UsersStorage) -> None:
    """An image whose header leads to what is root's: only what the user can read is read."""
    secret = place.parent / "secret"
    before = state(secret)
    evil = image(place / "evil.qcow2", NOBODY, "-u", "-b", str(secret), "-F", "raw")
    for call in (
        storage.trace(evil.path, "qcow2"),
        storage.chain(evil.path, "qcow2"),
        storage.inspect(evil.path, "qcow2"),
        storage.commit_overlay(evil.path),
        storage.rebase(evil.path, None, content=True),
    ):
        with pytest.raises((Refused, OperationFailed), match=r"Permission denied|Could not open"):
            await call
    assert state(secret) == before


async def test_in_a_service(place: Path, storage: UsersStorage, tmp_path: Path) -> None:
    """An image leads to where the service may look, and where the user may: not to one of the two only."""
    base = image(place / "vda.qcow2")
    over = image(place / "over.qcow2", NOBODY, "-b", base.path, "-F", "qcow2")
    away = image(place.parent / "away.qcow2")
    out = image(place / "out.qcow2", NOBODY, "-b", away.path, "-F", "qcow2")
    nothing_else = partial(frozenset[str])
    storage.confinement = Confinement(
        str(tmp_path / "root"), lambda: [str(place)], lambda: frozenset({NOBODY}), lambda _: nothing_else()
    )
    assert len(await storage.chain(over.path, "qcow2")) == 2
    with pytest.raises(Forbidden, match="outside the directories"):
        await storage.chain(out.path, "qcow2")
    untyped = image(place / "untyped.qcow2", NOBODY, "-u", "-b", "json:{}", "-F", "qcow2")
    with pytest.raises(Forbidden, match="follows nothing else"):
        await storage.chain(untyped.path, "qcow2")


async def test_no_copies(place: Path, storage: UsersStorage) -> None:
    base = image(place / "vda.qcow2")
    assert "nobody" in storage.no_copies
    with pytest.raises(Unsupported, match="no copies"):
        await storage.extract_disk(base.path, "point", f"{storage.own}/copy")
    assert LocalStorage().no_copies == ""


def test_requests_are_json() -> None:
    """What functions take and return, JSON can say: paths that are not UTF-8, too."""
    assert json.loads(json.dumps("\udcff")) == "\udcff"
    assert not as_user(USER).call(filework.exists, "/\udcff")
