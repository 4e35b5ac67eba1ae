"""No more processes or threads: what cannot be begun is refused or rolled back, in words, and nothing is lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snaporch.cli import execute

USER = 54_321  # has no process on this host: limits count all of a user's
DOMAIN = 'name = "d"\n[[disks]]\ntarget = "vda"\npath = "d.qcow2"\n'


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory of that user's, with a domain's definition and image."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "own").mkdir()
        _all_verbs(place / "own")
        (place / "d.toml").write_text(DOMAIN)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(place / "d.qcow2"), "1M"], check=True)
        for path in (place, *place.iterdir()):
            os.chown(path, USER, USER)
        yield place


def _all_verbs(place: Path) -> None:
    """Do once what is done below: all modules are loaded then, which the other user may not be able to read."""
    (place / "d.toml").write_text(DOMAIN)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(place / "d.qcow2"), "1M"], check=True)
    root = ["--root", str(place / "root")]
    for verb in (
        ["domain", "define", str(place / "d.toml")],
        ["create", "d", "--disk-only"],
        ["list", "d"],
        ["fsck"],
    ):
        assert execute([*root, *verb]) == 0


def as_that_user(place: Path, *arguments: str, most: int | None = None) -> tuple[int, str]:
    """Run the program as that user, with no more than so many processes and threads; return status and words."""
    said = place / "said"
    if (child := os.fork()) == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 - to the end of this process
            if most is not None:
                resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            os.chdir(place)
            status = execute(["--root", str(place / "root"), *arguments])
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text()


def test_no_more_threads_or_processes(place: Path) -> None:
    """However few may be begun, a create is done, refused or rolled back, and what is there stays readable."""
    assert as_that_user(place, "domain", "define", "d.toml")[0] == 0
    done = 0
    for most in (1, 2, 3, 5, 8):
        status, said = as_that_user(place, "create", "d", f"s{most}", "--disk-only", most=most)
        assert status in {0, 1, 2}, (most, said)
        assert "Traceback" not in said, (most, said)
        assert "a defect" not in said, (most, said)
        done += status == 0
        assert said.startswith("snaporch: ") or status == 0, (most, said)
        status, said = as_that_user(place, "--json", "list", "d")
        assert (status, said.count('"creation_time"')) == (0, done)
    assert as_that_user(place, "create", "d", "s", "--disk-only")[0] == 0
    status, said = as_that_user(place, "--json", "fsck")
    assert (status, said.strip()) == (0, "[]")
