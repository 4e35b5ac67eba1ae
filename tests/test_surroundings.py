"""The surroundings of a process that something else started: looked at, refused, and given to the next one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from snaporch.drivers.local.as_user import User
from snaporch.drivers.local.process import LocalProcess
from snaporch.drivers.qemu import launcher
from snaporch.drivers.qemu.attach import no_way_back, relaunch
from snaporch.drivers.qemu.surroundings import foreign, known, look, user_of
from snaporch.drivers.qmp.process import QemuProcess

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of others")


@contextmanager
def running(*prefix: str, **options: object) -> Iterator[int]:
    """Give a process that waits, which was started in a certain way."""
    with subprocess.Popen([*prefix, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        yield process.pid


def launched(wanted: dict[str, object], script: str, *, fds: tuple[int, ...] = ()) -> str:
    """Return what a shell says that was launched in surroundings."""
    words = [sys.executable, "-I", "-S", launcher.__file__, "sh", "-c", script]
    environment = {"SNAPORCH_SURROUNDINGS": json.dumps(wanted), "OURS": "secret"}
    return subprocess.run(words, env=environment, capture_output=True, check=True, text=True, pass_fds=fds).stdout


@as_root
def test_all_of_it_is_kept() -> None:
    """Ids, groups, limits, niceness, CPUs, how soon it is ended, umask, environment, directory."""
    place = Path(tempfile.mkdtemp(prefix="snaporch-theirs-"))
    os.chown(place, NOBODY, NOBODY)

    def prepare() -> None:
        os.nice(3)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
        Path("/proc/self/oom_score_adj").write_text("321")

    words = ("setpriv", "--reuid=65534", "--regid=100", "--groups=100,105", "--no-new-privs")
    environment = {"PATH": os.environ["PATH"], "THEIRS": "1"}
    with running(*words, preexec_fn=prepare, umask=0o037, cwd="/", env=environment) as pid:
        assert foreign(pid) == ""
        seen = attrs.asdict(look(pid))
    stored = json.loads(json.dumps(seen))
    assert user_of(stored) == User(NOBODY, 100, (100, 105))
    assert json.loads(json.dumps(attrs.asdict(known(stored)))) == stored
    kept, ours = os.pipe()
    os.set_inheritable(ours, True)
    program = {"program": "/bin/sh", "cwd": str(place), "private_network": False, "fds": [kept]}
    said = launched(
        seen | program,
        "cat /proc/$$/status; echo nice:$(cut -d' ' -f19 /proc/$$/stat); echo oom:$(cat /proc/$$/oom_score_adj);"
        "echo cwd:$(pwd); echo umask:$(umask); echo limits:$(ulimit -Sn) $(ulimit -Hn); echo env:$THEIRS.$OURS;"
        f"echo fds:$(test -e /proc/$$/fd/{kept} && echo kept) $(test -e /proc/$$/fd/{ours} || echo closed)",
        fds=(kept, ours),
    )
    found = {line.partition(":")[0]: line.partition(":")[2].strip() for line in said.splitlines()}
    assert found["Uid"].split() == ["65534"] * 4
    assert found["Gid"].split() == ["100"] * 4
    assert found["Groups"].split() == ["100", "105"]
    assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == int(found["CapInh"], 16) == 0
    assert found["NoNewPrivs"] == "1"
    assert found["Cpus_allowed_list"] == str(min(os.sched_getaffinity(0)))
    expected = {
        "nice": str(os.nice(0) + 3),
        "oom": "321",
        "cwd": str(place),
        "limits": "300 400",
        "env": "1.",
        "fds": "kept closed",
    }
    assert {name: found[name] for name in expected} == expected
    assert int(found["umask"], 8) == 0o037
    place.rmdir()
    os.close(kept)
    os.close(ours)


@as_root
def test_what_cannot_be_had_is_not_run(tmp_path: Path) -> None:
    """A directory that the user does not get into, a program that is not the user's: nothing runs."""
    with running(user=NOBODY, group=NOBODY, extra_groups=[], cwd="/") as pid:
        seen = attrs.asdict(look(pid))
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nid -u\n")
    program.chmod(0o700)
    tmp_path.chmod(0o700)
    for change in ({"cwd": str(tmp_path), "program": "/bin/sh"}, {"cwd": "/", "program": str(program)}):
        wanted = seen | {"private_network": False, "fds": []} | change
        with pytest.raises(subprocess.CalledProcessError) as failed:
            launched(wanted, "id -u")
        assert not failed.value.stdout


@as_root
@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (("setpriv", "--reuid=65534", "--clear-groups"), ""),
        (("setpriv", "--ruid=65534", "--clear-groups"), "several uids at once"),
        (("setpriv", "--rgid=100", "--clear-groups"), "several gids at once"),
        (
            ("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+net_raw", "--ambient-caps=+net_raw"),
            "as nobody with capabilities",
        ),
        (("unshare", "--uts"), "another uts namespace"),
        (("unshare", "--ipc"), "another ipc namespace"),
        (("unshare", "--mount"), "another mnt namespace: it sees other files"),
        (("unshare", "--net"), "another net namespace: it is in another network"),
        (("unshare", "--cgroup"), "another cgroup namespace"),
    ],
)
def test_who_can_be_followed(prefix: tuple[str, ...], words: str) -> None:
    with running(*prefix) as pid:
        why = foreign(pid)
    assert words in why
    assert bool(words) == bool(why)


@as_root
def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not root follows what has the same user and groups, and nothing else."""
    with running(user=NOBODY, group=100, extra_groups=[105]) as pid:
        for ours, words in (
            (User(4242, 100, (105,)), "it runs as nobody, and snaporch as user 4242"),
            (User(NOBODY, 100, ()), "other groups"),
            (User(NOBODY, 105, (100,)), "other groups"),
            (User(NOBODY, 100, (105,)), ""),
        ):
            monkeypatch.setattr(User, "ours", lambda ours=ours: ours)
            monkeypatch.setattr(os, "geteuid", lambda ours=ours: ours.uid)
            why = foreign(pid)
            assert words in why
            assert bool(words) == bool(why)


def test_one_that_has_become_another_user() -> None:
    """By its command line: the next one is that user from its beginning, and cannot become anybody."""
    words = "qemu -m 1G -runas nobody -run-with user=nobody -run-with user=nobody,async-teardown=on"
    process = QemuProcess(LocalProcess(0, 0), "/d/q", attached=True, argv=tuple(words.split()))
    made = relaunch(process, (), (), fds=(5,), pidfile="", incoming=False, mark=("-chardev", "null,id=x"))
    assert "nobody" not in " ".join(made.argv)
    assert ("-run-with", "async-teardown=on") in zip(made.argv, made.argv[1:], strict=False)
    assert "-pidfile" not in made.argv
    assert made.argv[-2:] == ("-chardev", "null,id=x")


def test_no_room_for_another_socket() -> None:
    """It is known before anything is done that the next process of another user could not listen beside it."""
    argv = ("qemu", "-qmp", f"unix:/{'d' * 100},server=on,wait=off")
    process = QemuProcess(LocalProcess(0, 0), argv[2][5:106], attached=True, argv=argv)
    assert no_way_back(process, (), ()) == ""
    assert "cannot listen beside it" in no_way_back(process, (), (), of_another=True)
