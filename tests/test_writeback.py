"""What is not synced goes to disk before a pause: until there is little left, and no more than four times."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snaporch.drivers.local.writeback import PASSES, SHORT_SECONDS, write_back


class Disk:
    """A disk and its clock: each sync of a file takes the next of some times."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.synced: list[str] = []
        self._seconds: Iterator[float] = iter(seconds)

    def sync(self, fd: int) -> None:
        """Sync a file."""
        self.synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        self.now += next(self._seconds)


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image."""
    path = tmp_path / "image"
    path.write_bytes(b"data")
    return str(path)


@pytest.mark.parametrize(
    ("seconds", "passes"),
    [([0.001], 1), ([0.3, 0.02, 0.001], 3), ([0.3, SHORT_SECONDS, 0.0], 3), ([1.0] * 9, PASSES)],
)
def test_until_a_pass_is_short(image: str, seconds: list[float], passes: int) -> None:
    """A guest that writes all the time is not waited for for ever."""
    disk = Disk(*seconds)
    assert write_back([image], disk.sync, lambda: disk.now) == passes
    assert disk.synced == ["image"] * passes


def test_a_pass_is_short_for_all_images_together(image: str, tmp_path: Path) -> None:
    """Two images of which each is synced in less have together more than a short pass."""
    (tmp_path / "second").touch()
    disk = Disk(0.003, 0.003, 0.001, 0.001)
    assert write_back([image, str(tmp_path / "second")], disk.sync, lambda: disk.now) == 2
    assert disk.synced == ["image", "second"] * 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda _path: None])
def test_what_is_no_file_is_passed_over(image: str, tmp_path: Path, make: Callable[[str], None]) -> None:
    """And holds nobody up; no descriptor is left open."""
    make(other := str(tmp_path / "other"))
    disk, before = Disk(0.0), len(os.listdir("/proc/self/fd"))
    assert write_back([other, image], disk.sync, lambda: disk.now) == 1
    assert disk.synced == ["image"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sync_that_fails_is_no_reason_to_fail(image: str) -> None:
    """The hypervisor's own flush says it, where it matters."""

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    assert write_back([image], fail, lambda: 0.0) == 1
