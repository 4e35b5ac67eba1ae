"""What Prometheus is told, and whether what is shipped to read it asks only for that."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from snaporch.drivers.simulated import ThreadsHoldTime
from snaporch.service.metrics import Figures
from snaporch.service.roles import Role
from tests.service.conftest import Lab, peer

WEB = "/v1/domains/web1"
ROOT = Path(__file__).parents[2]
GRAFANA, ALERTS = ROOT / "contrib/grafana/snaporch.json", ROOT / "contrib/prometheus/alerts.yml"


async def told(lab: Lab) -> dict[str, float]:
    """Return all samples, by name and labels."""
    await trio.testing.wait_all_tasks_blocked()
    answer = await lab.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = (sample for family in text_string_to_metric_families(answer.text) for sample in family.samples)
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


async def test_a_story_in_figures(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """What was created, refused, reverted and verified is counted, with the figures that the records have."""
    created = await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": "one"}, "flags": ["live"]})
    record = created.json()["result"]
    await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": "one"}, "flags": ["live"]})
    await lab.http.post(f"{WEB}/snapshots/one/revert?wait", json={})
    await lab.http.post(f"{WEB}/snapshots/one/verify?wait", json={})
    found = await told(lab)
    strategy = record["strategy"]
    expected = {
        "snaporch_operations_total create complete": 1,
        "snaporch_operations_total create refused": 1,
        "snaporch_operations_total revert complete": 1,
        "snaporch_operations_total verify complete": 1,
        f"snaporch_pause_seconds_count {strategy}": 1,
        f"snaporch_pause_seconds_sum {strategy}": record["timings"]["pause"],
        f"snaporch_operation_seconds_count create {strategy}": 1,
        "snaporch_bytes_total create": record["memory"]["size"],
        "snaporch_last_snapshot_timestamp_seconds web1": record["point"],
        "snaporch_operations_running": 0,
        "snaporch_operations_queued": 0,
        "snaporch_operations_stranded": 0,
    }
    assert found.items() >= expected.items()
    assert found["process_resident_memory_bytes"] > 0


async def test_what_runs_and_waits(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """An operation is among those that run until it has ended; one that was stopped is counted as rolled back."""
    lab.service.jobs.limiter.total_tokens = 1
    first = (await lab.http.post(f"{WEB}/snapshots", json={"flags": ["live"]})).json()
    waiting = {"flags": ["live"], "options": {"wait": True}}
    second = (await lab.http.post(f"{WEB}/snapshots?wait=0", json=waiting)).json()
    found = await told(lab)
    assert (found["snaporch_operations_running"], found["snaporch_operations_queued"]) == (1, 1)
    for each in (second, first):
        await lab.http.post(f"/v1/operations/{each['id']}/cancel?wait")
    found = await told(lab)
    assert (found["snaporch_operations_running"], found["snaporch_operations_queued"]) == (0, 0)
    assert found["snaporch_operations_total create rolled-back"] == 2


async def test_a_figure_that_is_missing(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the catalog cannot say what has ended, the service goes on, and counts what ends after that."""

    async def broken(*_: str) -> None:  # noqa: ASYNC124 - it stands for one that asks the catalog
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(type(lab.service.metrics), "_account", broken)
        await lab.http.post(f"{WEB}/snapshots?wait", json={"flags": ["live"]})
        await told(lab)
    await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": "counted"}, "flags": ["live"]})
    assert (await told(lab))["snaporch_operations_total create complete"] == 1


async def test_domains_come_and_go(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """A domain without snapshots is there as 0, one that is gone is not; what grows or gets worse is seen."""
    lab.world.host.add_image("/images/other")
    disks = [{"target": "vda", "path": "/images/other"}]
    await lab.http.post("/v1/domains", json={"name": "other", "driver": "simulated", "disks": disks})
    (lab.world.root / "web1").mkdir(exist_ok=True)
    (lab.world.root / "web1" / "grown").write_bytes(bytes(5000))
    newest, worse = "snaporch_last_snapshot_timestamp_seconds", "snaporch_domain_worse"
    found = await told(lab)
    assert (found[f"{newest} web1"], found[f"{newest} other"]) == (0, 0)
    assert found["snaporch_domain_bytes web1"] >= 5000
    async with lab.world.orchestrator.events() as events:
        for strategy in ("background", "precopy"):
            asked = {"snapshot": {"name": strategy}, "flags": ["live"], "options": {"strategy": strategy}}
            await lab.http.post(f"{WEB}/snapshots?wait", json=asked)
            found = await told(lab)
            assert found[f"{worse} web1 strategy"] == (strategy == "precopy")
        async for event in events:
            if event.text.startswith("precopy: memory was streamed by precopy"):
                break
    assert found[f"{newest} web1"] > 0
    await lab.http.delete("/v1/domains/other")
    await lab.http.post(f"{WEB}/delete?wait", json={"names": ["background"], "flags": ["children"]})
    found = await told(lab)
    assert found[f"{newest} web1"] == found[f"{worse} web1 strategy"] == 0
    assert not [name for name in found if name.endswith(" other")]


async def test_who_may_read_them(lab: Lab) -> None:
    """A viewer's token is enough, and it takes one."""
    with peer(None):
        assert (await lab.http.get("/metrics")).status_code == 401
        assert (await lab.http.get("/metrics", headers=lab.secret(Role.VIEWER))).status_code == 200


# --- what is shipped to read them ---------------------------------------------------------------------------


def names() -> dict[str, set[str]]:
    """Return the labels of every series that there can be, by its name."""
    registry = CollectorRegistry()
    figures = Figures(registry)
    series: dict[str, set[str]] = {"up": set()}
    for metric in vars(figures).values():
        family = metric.describe()[0]
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for suffix in suffixes:
            extra = {"le"} if suffix == "_bucket" else set()
            series[family.name + suffix] = set(metric._labelnames) | extra
    return series


def expressions(value: Any) -> Iterator[str]:
    """Yield every PromQL expression in a document."""
    if isinstance(value, dict):
        yield from (text for key, text in value.items() if key == "expr")
        for each in value.values():
            yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


@pytest.mark.parametrize("path", [GRAFANA, ALERTS], ids=lambda path: path.name)
def test_only_metrics_that_exist(path: Path) -> None:
    """The dashboard and the alerts ask for series and labels that there are, and for every metric."""
    document = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    known, found = names(), list(expressions(document))
    assert found
    attached = {"instance", "job"}  # by Prometheus
    for expression in found:
        used = re.findall(r"\b(snaporch_\w+|up)\b(?:{([^}]*)})?", expression)
        assert used, expression
        for name, matchers in used:
            assert name in known, expression
            assert set(re.findall(r"(\w+)[=!]", matchers)) <= known[name] | attached, expression
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        assert grouped <= attached.union(*(known[name] for name, _ in used)), expression


def test_every_metric_is_documented() -> None:
    """docs/reference/metrics.md has all of them, with their labels."""
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE
    )
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in rows}
    documented.pop("snaporch_build_info")
    bare = {re.sub(r"_(bucket|sum|count)$", "", name): labels - {"le"} for name, labels in names().items()}
    del bare["up"]
    assert documented == bare
