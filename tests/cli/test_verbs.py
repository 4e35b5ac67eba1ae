"""What the verbs make of their options, and the documents they answer with; no hypervisor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from rich.console import Console

from snaporch.cli import execute, human
from snaporch.cli.asked import all_internal, parse_disks
from snaporch.errors import InvalidInput
from snaporch.model import documents
from snaporch.model.convert import converter
from snaporch.model.domain import DiskStatus, DomainDefinition, DomainInfo, DomainState
from snaporch.model.merge import MergeKind, MergePlan, MergeStep, Where
from snaporch.model.record import (
    Boot,
    FileRecord,
    Group,
    OperationKind,
    OperationRecord,
    RevertRecord,
    SnapshotRecord,
    Timings,
    VerifyReport,
)
from snaporch.model.request import Strategy
from snaporch.model.rfc import DomainSnapshot


def record(name: str, parent: str | None, *, memory: bool = True) -> SnapshotRecord:
    return SnapshotRecord(
        domain="web",
        snapshot=DomainSnapshot(name, f"[red]{name}\x1b[2J", 1000, memory=memory),
        parent=parent,
        domain_state=DomainState.RUNNING,
        strategy=Strategy.BACKGROUND if memory else Strategy.NONE,
        reason="possible here",
        point=1000.5,
        memory=FileRecord(f"/m/{name}.mem", 3000, "xxh3-128:00") if memory else None,
        images={
            "vda": (FileRecord("/d/vda.qcow2", 500, "xxh3-128:01"), FileRecord("/d/base", 9000, "xxh3-128:02"))
        },
        definition=DomainDefinition("web"),
        timings=Timings(pause=0.012, total=1.5, phases={"preparing": 0.1}),
    )


RECORDS = (record("one", None), record("two", "one"), record("three", "one", memory=False))


def info(*targets: str) -> DomainInfo:
    disks = tuple(DiskStatus(t, f"/d/{t}", "qcow2", t == "vdr", 2**20, (f"/d/{t}", "/d/base")) for t in targets)
    return DomainInfo("web", DomainState.RUNNING, disks, "two", 42)


def printed(renderable: Any) -> str:
    console = Console(width=200, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def call(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> tuple[int, Any]:
    status = execute(["--root", str(root), *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_disk_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target alone is taken by default, a file is relative to here, none and internal are words."""
    monkeypatch.chdir(tmp_path)
    request = parse_disks(["vda", "vdb=a=b.qcow2", "vdc=none", "vdd=internal", "vde=./none"])
    assert request.exclude == {"vdc"}
    found = {disk.disk.target: disk.external_sn and disk.external_sn.path for disk in request.disks}
    assert found == {"vda": "", "vdb": str(tmp_path / "a=b.qcow2"), "vdd": None, "vde": str(tmp_path / "none")}


@pytest.mark.parametrize("options", [["=x"], ["vda="], [""], ["vda", "vda=none"]])
def test_disk_options_that_make_no_sense(options: list[str]) -> None:
    """What cannot be meant is refused, with the option in the text."""
    with pytest.raises(InvalidInput, match=f"--disk {options[-1]}"):
        parse_disks(options)


def test_internal_is_for_all_writable_disks() -> None:
    """--internal leaves out what is left out or read-only, and excludes files."""
    request = all_internal(parse_disks(["vdb=none"]), info("vda", "vdb", "vdr"))
    assert [(disk.disk.target, disk.external) for disk in request.disks] == [("vda", False)]
    with pytest.raises(InvalidInput, match="choose one"):
        all_internal(parse_disks(["vda=x"]), info("vda"))


@pytest.mark.parametrize(
    "options",
    [
        ["--bandwidth", "fast"],
        ["--bandwidth", "0"],
        ["--on-timeout", "pause"],
        ["--max-seconds", "0"],
        ["--max-seconds", "nan"],
        ["--disk-only", "--memory-file", "x"],
    ],
)
def test_options_that_make_no_sense(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before anything is looked at."""
    status, document = call(capsys, tmp_path / "root", "create", "web", *options)
    assert (status, document["error"]["type"]) == (2, "InvalidInput")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "verb",
    [
        "create web",
        "list web",
        "tree web",
        "show web one",
        "revert web one",
        "delete web one",
        "flatten web",
        "domain depth web 9",
        "verify web one",
        "verify web --all",
        "domain start web",
        "operations web",
    ],
)
def test_not_found(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A domain that is not there is status 3."""
    status, document = call(capsys, tmp_path, *verb.split())
    assert (status, document["error"]["type"]) == (3, "NotFound")


@pytest.mark.parametrize("options", [[], ["one", "--all"]])
def test_verify_one_or_all(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which snapshot is meant must be said, once."""
    status, document = call(capsys, tmp_path / "root", "verify", "web", *options)
    assert (status, document["error"]["type"]) == (2, "InvalidInput")
    assert not (tmp_path / "root").exists()


def test_nothing_to_recover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is an empty list, and people are told."""
    assert call(capsys, tmp_path, "recover") == (0, [])
    assert execute(["--root", str(tmp_path), "recover"]) == 0
    assert capsys.readouterr().out == "nothing to recover\n"


def test_recover_says_what_was_recovered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations are as in `operations`; it is this verb that recovers, not the opening of the root."""
    calls: list[OperationRecord] = []

    async def recover(_: object, **_limits: object) -> tuple[OperationRecord, ...]:
        await trio.lowlevel.checkpoint()
        calls.append(OperationRecord("0123abcd", OperationKind.DELETE, ("web",), "one", "complete", 1000.0, 1001.0))
        return tuple(calls)

    monkeypatch.setattr("snaporch.orchestrator.upkeep.recover", recover)
    status, (document,) = call(capsys, tmp_path, "recover")
    assert (status, len(calls)) == (0, 1)
    assert document == documents.operation(calls[0])
    calls.clear()
    assert execute(["--root", str(tmp_path), "recover"]) == 0
    assert capsys.readouterr().out == "delete web one (0123abcd): complete\n"


def test_domains_of_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A domain is defined from a file, seen, and forgotten; paths are relative to the file."""
    (tmp_path / "web.toml").write_text('name = "web"\nmemory = "1GiB"\n')
    root = tmp_path / "root"
    assert call(capsys, root, "domain", "list") == (0, [])
    assert call(capsys, root, "domain", "define", str(tmp_path / "web.toml"))[1]["state"] == "inactive"
    assert [each["name"] for each in call(capsys, root, "domain", "list")[1]] == ["web"]
    assert call(capsys, root, "create", "web")[1]["error"]["exit_code"] == 2
    assert call(capsys, root, "operations") == (0, [])
    assert call(capsys, root, "domain", "undefine", "web")[0] == 0
    assert call(capsys, root, "domain", "show", "web")[0] == 3


def test_a_bad_definition_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typing error in a definition is named."""
    (tmp_path / "web.toml").write_text('name = "web"\nmemmory = "1GiB"\n')
    status, document = call(capsys, tmp_path, "domain", "define", str(tmp_path / "web.toml"))
    assert status == 2
    assert "memmory" in document["error"]["message"]


def test_list_document() -> None:
    """The list is in the order of the records, and says which is current."""
    first, second, third = documents.listed(RECORDS, "two")
    assert first["name"] == "one"
    assert (second["parent"], second["memory"], second["current"]) == ("one", True, True)
    assert (third["memory"], third["domain_state"], third["creation_time"]) == (False, "running", 1000)
    assert (first["bytes"], third["bytes"]) == (3500, 500)


def test_tree_document() -> None:
    """A flat list, each with its parent."""
    found = documents.tree(RECORDS, "two")
    assert [(each["name"], each["parent"], each["current"]) for each in found] == [
        ("one", None, False),
        ("two", "one", True),
        ("three", "one", False),
    ]


def test_create_document() -> None:
    """What scripts rely on is there, null where there is none."""
    document = documents.created(RECORDS[0])
    assert (document["pause_seconds"], document["total_seconds"]) == (0.012, 1.5)
    assert (document["memory_file"], document["memory_bytes"]) == ("/m/one.mem", 3000)
    assert documents.created(RECORDS[2])["memory_file"] is None


PLAN = MergePlan(
    doomed=frozenset({"two", "one"}),
    steps=(MergeStep(MergeKind.COMMIT, "vda", "/d/vda-2", "/d/vda", None, 2048, Where.LIVE, active=True),),
    unlink=("/d/vda-2", "/d/[red]\x1b"),
    kept=(("/d/vda-1", "2 images are backed by it"),),
    bytes=2048,
)


@pytest.mark.parametrize("dry_run", [False, True])
def test_delete_document(*, dry_run: bool) -> None:
    """A dry run has no outcome; the rest is the same."""
    document = json.loads(json.dumps(converter.unstructure(documents.deleted("web", "one", PLAN, dry_run=dry_run))))
    assert document == {
        "domain": "web",
        "name": "one",
        "deleted": ["one", "two"],
        "dry_run": dry_run,
        "outcome": None if dry_run else "complete",
        "bytes": 2048,
        "steps": [
            {
                "kind": "commit",
                "target": "vda",
                "top": "/d/vda-2",
                "base": "/d/vda",
                "bytes": 2048,
                "where": "live",
            }
        ],
        "unlink": ["/d/vda-2", "/d/[red]\x1b"],
        "format": 1,
        "kept": [{"path": "/d/vda-1", "reason": "2 images are backed by it"}],
    }
    text = printed(human.deleted({"web": PLAN}, dry_run=dry_run))
    assert "commit /d/vda-2 down into /d/vda" in text
    assert "\x1b" not in text
    wanted = (
        "web: nothing is touched; it would delete one, two, merge 2.0 KiB, remove 2 files"
        if dry_run
        else "web: one, two deleted, 2.0 KiB merged, 2 files removed"
    )
    assert text.splitlines()[-1] == wanted


@pytest.mark.parametrize("dry_run", [False, True])
def test_flatten_document(*, dry_run: bool) -> None:
    """As of a delete, with nothing deleted; chains that are short already are said to be."""
    document = documents.flattened("web", "", PLAN, dry_run=dry_run)
    assert (document["name"], document["bytes"], document["dry_run"]) == (None, 2048, dry_run)
    assert document.keys() == documents.deleted("web", "one", PLAN, dry_run=dry_run).keys() - {"deleted"}
    text = printed(human.flattened("web", PLAN, dry_run=dry_run)).splitlines()
    did = "nothing is touched; it would copy" if dry_run else "copied"
    assert (text[0], text[-1]) == ("flatten web", f"web: {did} 2.0 KiB")
    assert "short enough" in printed(human.flattened("web", MergePlan(), dry_run=dry_run))


def test_verify_document() -> None:
    """What is wrong is said in both forms."""
    good = VerifyReport("web", "one", ok=True, booted=True, boot=Boot.RAN)
    bad = VerifyReport("web", "two", ok=False, problems=("/d/x is missing",))
    assert documents.verified(good) == {
        "format": 1,
        "domain": "web",
        "name": "one",
        "ok": True,
        "problems": (),
        "booted": True,
        "files": "good",
        "boot": "ran",
        "reason": None,
    }
    assert printed(human.verified("web", [good, bad])).splitlines() == [
        "web one: ok: every file is what was saved, a copy runs",
        "web two: DAMAGED",
        "  /d/x is missing",
    ]
    assert "no snapshots" in printed(human.verified("web", []))


def test_a_snapshot_that_is_being_deleted_is_shown_as_such() -> None:
    """In the list, in the tree and by itself."""
    going = attrs.evolve(RECORDS[0], deleting=True)
    assert [each["deleting"] for each in documents.listed((going, RECORDS[1]), None)] == [True, False]
    assert documents.shown(going, None)["deleting"] is True
    assert "one (deleting)" in printed(human.snapshots("web", (going,), None))
    assert "one (deleting)" in printed(human.tree("web", (going,), None))
    assert "one (deleting)" in printed(human.snapshot(going, None))


def test_a_group_is_shown_as_such() -> None:
    """With the others by name; create answers with what it answers of each."""
    web = attrs.evolve(RECORDS[0], group=Group("0123abcd", ("db", "web")))
    assert documents.listed((web, RECORDS[1]), None)[0]["group"] == ("db", "web")
    assert "one point with db" in printed(human.created([web]))
    assert "one (group)" in printed(human.tree("web", (web,), None))
    assert "db, web" in printed(human.snapshot(web, None))
    document = documents.created_group([web, attrs.evolve(web, domain="db", timings=Timings(pause=2.0))])
    assert (document["name"], document["outcome"], document["pause_seconds"]) == (web.name, "complete", 2.0)
    assert [member["domain"] for member in document["members"]] == ["web", "db"]
    plans = printed(human.deleted({"web": PLAN, "db": PLAN}, dry_run=False))
    assert all(f"{name}: one, two deleted" in plans for name in ("web", "db"))
    reverts = [RevertRecord(name, "one", web.point, "proven", 1.5, 2.0) for name in ("web", "db")]
    back = printed(human.reverted(reverts, [info("vda")] * 2))
    assert all(f"{each.domain} is back at one" in back for each in reverts)
    assert "its guest was paused for 1.50 s (proven)" in back


@pytest.mark.parametrize(
    "words",
    [
        ["create", "--group", "web,db", "one", "two"],
        ["create", "--group", "web,web"],
        ["create", "--group", "web,db", "--internal"],
        ["create"],
        ["revert", "--group", "web,db", "one", "two"],
        ["revert", "--group", "web,db"],
        ["revert", "web"],
        ["delete", "--group", "web,web", "one"],
        ["delete"],
    ],
)
def test_groups_that_make_no_sense(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before anything is looked at."""
    status, document = call(capsys, tmp_path / "root", *words)
    assert (status, document["error"]["type"]) == (2, "InvalidInput")


def test_an_operation_has_an_outcome_when_it_has_ended() -> None:
    """One that runs has none."""
    ran = OperationRecord("0123abcd", OperationKind.CREATE, ("web",), "one", "streaming", 1000.0)
    assert documents.operation(ran)["outcome"] is None
    done = OperationRecord("0123abcd", OperationKind.CREATE, ("web",), "one", "rolled-back", 1000.0, 1001.0)
    assert documents.operation(done)["outcome"] == "rolled-back"
    assert "1.00 s" in printed(human.operations([ran, done]))


def test_text_for_people() -> None:
    """Names and figures are there; what others wrote is neither markup nor moves a cursor."""
    assert "<- current" in next(
        line for line in printed(human.tree("web", RECORDS, "two")).splitlines() if "two" in line
    )
    assert "disks only" in printed(human.tree("web", RECORDS, "two"))
    table = printed(human.snapshots("web", RECORDS, "two"))
    assert "[red]one" in table
    assert "\x1b" not in table
    assert "12.0 ms" in printed(human.created(RECORDS[:1]))
    assert "2.9 KiB" in printed(human.snapshot(RECORDS[0], None))
    late = attrs.evolve(RECORDS[0], timings=Timings(0.012, setup=0.02, foreseen=0.018, missed=True))
    assert "too late, so the guest was stopped once more" in printed(human.snapshot(late, None))
    assert "/d/base" in printed(human.domain(info("vda", "vdr")))
    assert "running" in printed(human.domains([info("vda")]))
    assert "no domains" in printed(human.domains([]))
    assert "yes" in printed(
        human.findings({"qemu": {"background": True, "versions": {"machine": "q35"}, "why": ""}})
    )
