"""Reports: whole, harmless whatever names and errors are, and never over somebody else's file."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import attrs
from trio.testing import MockClock

from snaporch import HypervisorError
from snaporch.batch.plan import Reports
from snaporch.batch.report import write_reports
from snaporch.batch.store import BatchRecord, Stage
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime
from tests.batch.estate import Estate, open_estate, plan

EVIL = "<script>alert('1')</script> & \"x\" \x1b[31m\n]]>"


def reports(directory: Path) -> dict[str, Any]:
    return {kind: str(directory / "out" / f"{{batch}}.{kind}") for kind in ("json", "junit", "html")}


async def ran(estate: Estate, directory: Path) -> BatchRecord:
    """Run a batch of which one fails, with reports."""
    error = HypervisorError(EVIL)
    estate.host.faults.add("stream.half", domain="vm1", error=error)
    return await estate.run(plan(limits={"per_host": 2}, report=reports(directory)))


async def test_reports(tmp_path: Path, autojump_clock: MockClock, virtual_time: ThreadsHoldTime) -> None:
    """Each format is well-formed and says the same; the page has a bar for each item and needs no other host."""
    async with open_estate(tmp_path, 5) as estate:
        batch = await ran(estate, tmp_path)
    assert not batch.problems
    read = {kind: Path(path.format(batch=batch.id)).read_text() for kind, path in reports(tmp_path).items()}

    document = json.loads(read["json"])
    assert document["snaporch_batch"]["counts"] == {"done": 4, "failed": 1}
    assert [item["end"] for item in document["items"]] == ["done", "failed", "done", "done", "done"]

    suite = ET.fromstring(read["junit"])[0]  # noqa: S314 - our own
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "1", "0")
    assert [case.get("name") for case in suite.findall("testcase")] == [f"vm{number}" for number in range(5)]
    assert "alert('1')" in (suite[1][0].get("message") or "")

    page = read["html"]
    assert page.count('<rect class="done"') == 4
    assert page.count('<rect class="failed"') == 1
    assert "<script" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    assert not [url for url in re.findall(r"https?://[^\"' ]+", page) if url != "http://www.w3.org/2000/svg"]
    svg = ET.fromstring(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])  # type: ignore[index]  # noqa: S314
    rows = {rect.get("y") for rect in svg.iter("{http://www.w3.org/2000/svg}rect")}
    assert len(rows) == 2  # as many lanes as ran at once


async def test_somebody_elses_file(
    tmp_path: Path, autojump_clock: MockClock, virtual_time: ThreadsHoldTime
) -> None:
    """A report replaces a report; anything else is left alone, and the batch says so."""
    path = tmp_path / "report.json"
    async with open_estate(tmp_path, 1) as estate:
        path.write_text("precious")
        first = await estate.run(plan(snapshot={"name": "a"}, report={"json": str(path)}))
        assert path.read_text() == "precious"
        assert "is not overwritten" in first.problems[0]
        path.unlink()
        second = await estate.run(plan(snapshot={"name": "b"}, report={"json": str(path)}))
        third = await estate.run(plan(snapshot={"name": "c"}, report={"json": str(path)}))
        assert (second.stage, third.stage) == (Stage.COMPLETE, Stage.COMPLETE)
        assert json.loads(path.read_text())["snaporch_batch"]["id"] == third.id
        assert path.stat().st_mode & 0o777 == 0o600
        gone = attrs.evolve(third, id="00000000")
        await write_reports(
            catalog_of(estate.orch), gone, Reports(json=str(path))
        )  # a batch without items is a report
    assert json.loads(path.read_text())["items"] == []
