"""Snapshots have ids that are never used again: who gives one gets that snapshot, or is refused."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from snaporch import CreateOptions, DeleteFlag, DomainSnapshot, InvalidInput, Orchestrator
from snaporch.errors import OtherSnapshot
from snaporch.service.problems import problem
from snaporch.testing import ThreadsHoldTime, open_simulated_world

ACTS: dict[str, Callable[[Orchestrator, list[str]], Awaitable[Any]]] = {
    "revert": lambda orch, ids: orch.revert("web1", "one", ids=ids),
    "delete": lambda orch, ids: orch.delete("web1", "one", ids=ids),
    "plan": lambda orch, ids: orch.delete("web1", "one", DeleteFlag.CHILDREN, ids=ids, dry_run=True),
    "verify": lambda orch, ids: orch.verify("web1", "one", ids=ids),
    "edit": lambda orch, ids: orch.edit("web1", "one", new_name="two", ids=ids),
    "pin": lambda orch, ids: orch.pin("web1", "one", ids=ids),
}


@pytest.mark.parametrize("act", ACTS)
async def test_a_name_that_means_another_snapshot_is_refused(
    act: str, tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """It is a 409, and nothing is touched; with the id that there is now it is done."""
    async with open_simulated_world(tmp_path) as world:
        orch = world.orchestrator
        first = await orch.create("web1", DomainSnapshot("one"))
        await orch.delete("web1", "one", ids=[first.id])
        second = await orch.create("web1", DomainSnapshot("one"))
        assert first.id != second.id
        before = await orch.list("web1")
        with pytest.raises(OtherSnapshot, match="one of web1 is another snapshot now") as caught:
            await ACTS[act](orch, [first.id])
        assert problem(caught.value)["status"] == 409
        assert await orch.list("web1") == before == (second,)
        await ACTS[act](orch, [second.id])


def test_targets_are_no_letters() -> None:
    """A string in the place of a collection is refused."""
    with pytest.raises(InvalidInput, match="exclude: 'vda' is one string"):
        CreateOptions(exclude="vda")
    assert CreateOptions(exclude=["vda"]).exclude == {"vda"}
