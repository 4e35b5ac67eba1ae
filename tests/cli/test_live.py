"""The program from the outside, on one real guest that all these tests share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from snaporch.cli import execute
from tests.cli.conftest import NAME, Program, until

pytestmark = pytest.mark.live

SLOW = ("--live", "--strategy", "precopy", "--bandwidth", "1MiB")  # does not end before it is cancelled


def disks_of(guest: Program) -> Any:
    return guest.look("domain", "show", NAME)["disks"]


def streaming(guest: Program, name: str) -> bool:
    found = guest.look("operations", NAME)
    return any(each["subject"] == name and each["state"] == "streaming" for each in found)


def test_checkpoint_and_revert(guest: Program) -> None:
    """A live checkpoint is listed with its figures, and the guest goes back to it and is whole."""
    made = guest.answer("create", NAME, "one", "--live", "--description", "first")
    assert (made["domain"], made["name"], made["outcome"]) == (NAME, "one", "complete")
    assert 0 < made["pause_seconds"] < made["total_seconds"]
    assert os.stat(made["memory_file"]).st_size == made["memory_bytes"]
    assert made["disks"] == [
        {"target": disk["target"], "frozen": disk["chain"][1], "active": disk["active"], "inside": None}
        for disk in disks_of(guest)
    ]
    seq, start = guest.reports()[-1].seq, guest.said()
    until(lambda: any(report.seq > seq for report in guest.reports(start)))

    back = guest.answer("revert", NAME, "one")
    assert (back["outcome"], back["state"], back["current"]) == ("complete", "running", "one")
    start = guest.said()
    until(lambda: len(guest.reports(start)) > 5)
    assert guest.reports(start)[-1].errors == 0
    (listed,) = guest.look("list", NAME)
    assert listed.items() >= {"name": "one", "parent": None, "memory": True, "current": True}.items()
    assert guest.look("show", NAME, "one")["memory"]["checksum"] == made["memory_checksum"]
    assert [each["name"] for each in guest.answer("tree", NAME)] == ["one"]


@pytest.mark.window("the rate of the stream")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_rolls_a_create_back(guest: Program, number: signal.Signals) -> None:
    """While it runs another is refused with its name; cut short it is status 130, and nothing of it is left."""
    before, snapshots = disks_of(guest), guest.look("list", NAME)
    name = f"cut-{number.name.lower()}"
    create = guest.begin("--json", "create", NAME, name, *SLOW)
    until(lambda: streaming(guest, name))
    second = guest.run("--json", "create", NAME, "second", "--live")
    create.send_signal(number)
    first = guest.end(create)
    assert second.status == 4
    assert second.document["error"]["running"] == f"create {name}"
    assert first.status == 130
    assert (first.document["name"], first.document["outcome"]) == (name, "rolled-back")
    assert guest.look("operations", NAME)[-1]["outcome"] == "rolled-back"
    assert (disks_of(guest), guest.look("list", NAME)) == (before, snapshots)
    assert guest.look("domain", "show", NAME)["state"] == "running"


def test_files_of_ones_own(guest: Program) -> None:
    """Files that are named are relative to the working directory, and people get two lines."""
    ran = guest.run("create", NAME, "own", "--live", "--memory-file", "own.mem", "--disk", "vda=own.qcow2")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("\n") == 2
    assert "pause" in ran.out
    assert (guest.directory / "own.mem").exists()
    assert disks_of(guest)[0]["active"] == str(guest.directory / "own.qcow2")


def test_delete_and_verify(guest: Program) -> None:
    """A dry run says what a delete then does; what remains is verified, to the exit status."""
    guest.look("create", NAME, "first", "--live")
    guest.look("create", NAME, "second", "--live")
    before = (guest.look("list", NAME), disks_of(guest))
    dry = guest.look("delete", NAME, "first", "--dry-run")
    assert (dry["deleted"], dry["dry_run"], dry["outcome"]) == (["first"], True, None)
    assert (guest.look("list", NAME), disks_of(guest)) == before
    done = guest.answer("delete", NAME, "first")
    assert (done["dry_run"], done["outcome"]) == (False, "complete")
    assert (done["steps"], done["unlink"]) == (dry["steps"], dry["unlink"])
    assert {step["where"] for step in done["steps"]} == {"live"}
    assert not any(os.path.exists(path) for path in done["unlink"])
    assert execute(["--root", str(guest.directory / "root"), "delete", NAME, "first"]) == 3
    start = guest.said()
    until(lambda: len(guest.reports(start)) > 1)
    report = guest.answer("verify", NAME, "second", "--boot")
    report.pop("format")
    was = {"domain": NAME, "name": "second", "ok": True, "problems": [], "booted": True}
    assert report == was | {"files": "good", "boot": "ran", "reason": None}
    Path(guest.look("show", NAME, "second")["memory"]["path"]).write_bytes(b"damaged")
    ran = guest.run("--json", "verify", NAME, "--all")
    assert (ran.status, ran.err) == (1, f"snaporch: {NAME}: damaged: second\n")
    assert [each["name"] for each in ran.document if not each["ok"]] == ["second"]
    guest.look("delete", NAME, "second")
    assert all(each["ok"] for each in guest.look("verify", NAME, "--all"))


def test_pause_and_resume(guest: Program) -> None:
    """A checkpoint of a paused domain leaves it paused."""
    assert guest.look("domain", "pause", NAME)["state"] == "paused"
    assert guest.look("create", NAME, "still")["domain_state"] == "paused"
    assert guest.look("domain", "resume", NAME)["state"] == "running"
    assert execute(["--root", str(guest.directory / "root"), "domain", "start", NAME]) == 2


def test_demo(guest: Program, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The story is told to its end, the guest is whole, and nothing is left."""
    monkeypatch.setenv("TMPDIR", str(guest.directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(guest.directory))
    (guest.directory / "snaporch").mkdir()
    (guest.directory / "snaporch/guest").symlink_to(kernel.parent)
    ran = guest.run("demo", "--tiny", "--accel", "tcg", "--json")
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert told["errors_when_ruined"] > 0
    assert told["after_revert"]["errors"] == 0
    assert told["live"]["pause_seconds"] < told["stop_and_save"]["pause_seconds"]
    assert "0 errors" in ran.err
    assert not list(guest.directory.glob("snaporch-demo-*"))
