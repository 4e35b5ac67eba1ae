"""Others know an attached QEMU by the path of its socket: the next ones of that domain are found there, too."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from snaporch.drivers.local import filework
from snaporch.drivers.qmp import open_qmp
from snaporch.model.rfc import RevertFlag
from tests.live.lab import NAME, Lab, lab

pytestmark = pytest.mark.live

__all__ = ["lab"]  # the fixture


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system than the root's."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def who(lab: Lab) -> int | None:
    """Return which process answers at the path that others know."""
    async with open_qmp(lab.socket, label=NAME) as qmp:
        await qmp.execute("query-status")
        return qmp.peer_pid


async def its(lab: Lab) -> int | None:
    info = await lab.orch.domain_info(NAME)
    assert not info.problem
    return info.pid


def run_directories(root: Path) -> int:
    return len(list((root / NAME).glob("run-*")))


async def test_in_its_old_place(lab: Lab, elsewhere: Path, tmp_path: Path) -> None:
    """After a revert, a start, and a revert from inactive; and nothing waits to be tidied up."""
    lab.place = elsewhere
    await lab.start("-drive", f"if=virtio,file={lab.image('a.qcow2')}")
    await lab.attach()
    await lab.create()
    for inactive in (False, True):
        if inactive:
            await lab.orch.destroy(NAME)
        await lab.revert()
        assert await who(lab) == await its(lab)
        assert run_directories(tmp_path / "root") == 1
    await lab.orch.destroy(NAME)
    await lab.orch.start(NAME)
    assert await who(lab) == await its(lab)
    await lab.create("c2")
    await lab.revert(flags=RevertFlag.RUNNING)
    assert await who(lab) == await its(lab)


async def test_its_place_is_taken(lab: Lab, elsewhere: Path) -> None:
    """What listens there by now stays there; the domain is managed all the same, also where no place is left."""
    root, lab.place = lab.place, elsewhere / "run"
    lab.place.mkdir()
    await lab.start("-drive", f"if=virtio,file={lab.image('a.qcow2')}")
    await lab.attach()
    await lab.create()
    await lab.orch.destroy(NAME)
    lab.socket.unlink()
    await lab.start()
    other = await who(lab)
    await lab.orch.start(NAME)
    assert await who(lab) == other != await its(lab)
    await lab.revert()
    assert await who(lab) == other != await its(lab)
    assert run_directories(root / "root") == 1
    await lab.orch.destroy(NAME)
    shutil.copy(lab.place / "a.qcow2", root)
    lab.socket.unlink()
    lab.socket.write_text("of somebody else's")
    await lab.revert()
    assert await its(lab)
    assert lab.socket.read_text() == "of somebody else's"


async def test_a_socket_in_two_places(tmp_path: Path, elsewhere: Path) -> None:
    """It is put there in one step, again does no harm, and nothing is left beside it."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    made = tmp_path / "run-1" / "qmp.sock"
    made.parent.mkdir()
    await listener.bind(str(made))
    assert not filework.listens(str(made))
    listener.listen()
    for place in (tmp_path / "here.sock", elsewhere / "there.sock"):
        assert not filework.listens(str(place))
        for _ in range(2):
            filework.put_socket(str(made), str(place))
            assert filework.listens(str(place))
        assert not list(place.parent.glob("*.sock.*"))
    listener.close()
    assert not filework.listens(str(elsewhere / "there.sock"))
    with pytest.raises(FileNotFoundError):
        filework.put_socket(str(made), str(elsewhere / "gone" / "x.sock"))
