"""Plans: what is refused, with its place; the published schema says the same."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from snaporch.batch import schema
from snaporch.batch.plan import Check, OnFailure, load_plan, plan_from
from snaporch.errors import InvalidInput
from snaporch.model.convert import converter

DOCS = Path(__file__).parents[2] / "docs"
LEAST = {"name": "p", "select": {"globs": ["*"]}}
FULL = """
name = "nightly"
on_failure = "undo_all"
[select]
names = ["web1"]
globs = ["db*"]
tags = ["prod"]
exclude = ["*-test"]
[snapshot]
name = "{plan}-{time}"
live = true
strategy = "background"
verify = "boot"
max_seconds = "5min"
[limits]
per_host = 3
per_directory = 1
bandwidth = "100MiB/s"
deadline = "2h"
window = { opens = "22:00", closes = "06:00", zone = "Europe/Berlin" }
[retries]
attempts = 3
wait = 10
[[hooks.before]]
command = ["sync"]
deadline = "30s"
[[hooks.after_each]]
command = ["logger", "taken"]
[retention]
last = 3
daily = 7
max_bytes = "1TiB"
pin = ["golden*"]
[schedule]
cron = "30 2 * * *"
zone = "Europe/Berlin"
jitter = "10min"
missed = "skip"
[report]
html = "nightly-{batch}.html"
"""


def test_everything(tmp_path: Path) -> None:
    """A plan with all keys is read, units and all, and survives the record that a batch keeps of it."""
    file = tmp_path / "nightly.toml"
    file.write_text(FULL)
    plan = load_plan(file)
    assert [plan.limits.bandwidth, plan.limits.deadline, plan.retries.wait] == [100 * 2**20, 7200, 10]
    assert (plan.on_failure, plan.snapshot.verify) == (OnFailure.UNDO_ALL, Check.BOOT)
    assert plan.report.html == str(tmp_path / "nightly-{batch}.html")
    assert plan_from(converter.unstructure(plan)) == plan
    jsonschema.validate(tomllib.loads(FULL), schema.plan_schema())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"limits": {"per_hsot": 3}}, "unknown key 'per_hsot'; did you mean 'per_host'? @ f.limits"),
    ({"limits": {"per_host": 0}}, "per_host must be at least 1 @ f.limits"),
    ({"limits": {"per_host": "3"}}, "'3' is not a whole number @ f.limits.per_host"),
    ({"limits": {"bandwidth": "fast"}}, "'fast' is not a size; write for example 1073741824, 512MiB or 1GiB"),
    ({"limits": {"deadline": "2 hours"}}, "'2 hours' is not a duration"),
    ({"limits": {"window": {"opens": "25:00", "closes": "06:00"}}}, "'25:00' is not a time of day"),
    ({"limits": {"window": {"opens": "22:00"}}}, "'closes' is missing @ f.limits.window.closes"),
    ({"select": {}}, "selects nothing"),
    ({"select": {"names": "web1"}}, "'web1' is not a list of strings @ f.select.names"),
    ({"select": {"groups": {"g": ["a", "a"]}}}, "group 'g' must have members, and each once @ f.select"),
    ({"select": 3}, "not a table"),
    ({"name": "a b"}, "'a b' is not a plan name"),
    ({"snapshot": {"name": "{domain}"}}, "only {plan}, {time} and {batch} can be filled in @ f.snapshot"),
    ({"snapshot": {"live": "no"}}, "'no' is not true or false @ f.snapshot.live"),
    ({"snapshot": {"strategy": "paused"}}, "for a pause write live = false @ f.snapshot"),
    ({"on_failure": "panic"}, "'panic' is none of continue, stop, undo_all @ f.on_failure"),
    ({"hooks": {"before": [{"command": ["a"]}, {"command": []}]}}, "@ f.hooks.before[1]"),
    ({"hooks": {"before": [{"command": "rm -rf /"}]}}, "is not a list of strings @ f.hooks.before[0].command"),
    ({"schedule": {"cron": "at noon"}}, "'at noon' is not a cron expression"),
    ({"schedule": {"cron": "0 0 * * *", "zone": "Mars/Base"}}, "'Mars/Base' is not a time zone"),
    ({"retention": {}}, "keeps nothing: give last, hourly, daily, weekly, monthly or within @ f.retention"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_wrong(change: dict[str, Any], said: str) -> None:
    """What is wrong is said with the keys that lead to it, and what to write instead."""
    with pytest.raises(InvalidInput) as caught:
        plan_from(LEAST | change, "f")
    assert said in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    """Whoever writes a plan need not run it as often as it has errors."""
    with pytest.raises(InvalidInput, match=r"f\.limits.*f\.on_failure|f\.on_failure.*f\.limits"):
        plan_from(LEAST | {"limits": {"per_host": 0}, "on_failure": "panic"}, "f")


def test_no_toml(tmp_path: Path) -> None:
    """What is no TOML is refused with line and column."""
    file = tmp_path / "p.toml"
    file.write_text('name = "p"\nselect = [\n')
    with pytest.raises(InvalidInput, match=r"p\.toml: .*(line 3|end of document)"):
        load_plan(file)


def test_the_schema_is_published() -> None:
    """docs/reference/batch.schema.json is what the classes say; `python -m snaporch.batch.schema` writes it."""
    assert (DOCS / "reference/batch.schema.json").read_text() == schema.text()
    jsonschema.Draft202012Validator.check_schema(schema.plan_schema())


STRUCTURE = [
    change for change, said in WRONG if any(w in said for w in ("unknown", "is missing", "list of", "none of"))
]


@pytest.mark.parametrize("change", STRUCTURE)
def test_the_schema_refuses_too(change: dict[str, Any]) -> None:
    """An editor that knows the schema marks wrong keys and kinds."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(LEAST | change, schema.plan_schema())


def test_the_examples_in_the_docs() -> None:
    """Every plan in docs/how-to/batches.md is one."""
    blocks = (DOCS / "how-to/batches.md").read_text().split("```toml\n")[1:]
    plans = [plan_from(tomllib.loads(block.partition("```")[0])) for block in blocks]
    assert plans
