"""A process gets its huge pages back from outside, and no more memory than it had."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snaporch.drivers.local import hugepages
from snaporch.drivers.local.hugepages import blocker, collapse

MIB = 2**20
# Half of its memory is written to, half only read. It says at the end whether all of it still holds what it did.
PROGRAM = f"""
import mmap, sys
size = 64 * {MIB}
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, 4096):
    if at < size // 2:
        memory[at] = at // 4096 % 251 + 1
    else:
        memory[at]
print("ready", flush=True)
sys.stdin.read()
print(all(memory[at] == (at // 4096 % 251 + 1 if at < size // 2 else 0) for at in range(0, size, 4096)))
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process with memory of small pages."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield started
        started.kill()


def held(pid: int, what: str) -> int:
    """Return what a process has of something, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])


def test_huge_pages_come_back(process: subprocess.Popen[str]) -> None:
    """Where there is memory; what was only read takes none, and all holds what it did."""
    assert not blocker()
    before = held(process.pid, "Anonymous")
    assert not held(process.pid, "AnonHugePages")
    tried = collapse(process.pid, threading.Event())
    assert 28 * MIB <= tried <= 32 * MIB
    assert 0 < held(process.pid, "AnonHugePages") <= tried
    assert held(process.pid, "Anonymous") < before + MIB
    said, _ = process.communicate()
    assert said == "True\n"


def test_it_ends_when_it_is_told_to(process: subprocess.Popen[str]) -> None:
    """And with it nothing is left undone."""
    stop = threading.Event()
    stop.set()
    assert collapse(process.pid, stop) == 0


def test_a_process_that_is_gone_is_no_error() -> None:
    """It may end at any time."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert collapse(ended.pid, threading.Event()) == 0


@pytest.mark.parametrize(("number", "words"), [(errno.EPERM, "CAP_SYS_NICE"), (errno.EINVAL, "Linux 6.1")])
def test_why_not(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    """The reason names what is missing."""
    monkeypatch.setattr(hugepages, "_advise", lambda *_: number)
    assert words in blocker()


def test_a_host_that_wants_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What its administrator has said holds, though the kernel would do it all the same."""
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(hugepages, "SETTING", str(tmp_path / "enabled"))
    assert "uses no huge pages" in blocker()
    assert collapse(1, threading.Event()) == 0
