"""The public surface: what is exported, and that types say what they should; mypy checks this file, too."""

from __future__ import annotations

import inspect
import re
import typing
from typing import assert_type

import snaporch
from snaporch import (
    AnyOrchestrator,
    Client,
    DomainInfo,
    DomainSnapshot,
    MergePlan,
    OperationRecord,
    Orchestrator,
    RevertRecord,
    SnapshotRecord,
    Unreadable,
    VerifyReport,
)


def both(here: Orchestrator, there: Client) -> tuple[AnyOrchestrator, AnyOrchestrator]:
    """Both are what code for either takes: mypy says so."""
    return here, there


async def types(orch: AnyOrchestrator) -> None:
    """What is answered: mypy says so."""
    assert_type(await orch.create("web", DomainSnapshot("one")), SnapshotRecord)
    assert_type(await orch.revert("web", "one"), RevertRecord)
    assert_type(await orch.delete("web", "one", ids=["0"]), MergePlan)
    assert_type(await orch.verify("web", "one"), VerifyReport)
    assert_type(await orch.domain_info("web"), DomainInfo)
    assert_type(await orch.list("web"), tuple[SnapshotRecord, ...])
    assert_type(await orch.operations("web", last=1), tuple[OperationRecord, ...])
    assert_type(await orch.unreadable(), tuple[Unreadable, ...])


def test_every_name_is_there_once() -> None:
    """And has a value."""
    assert len(set(snaporch.__all__)) == len(snaporch.__all__)
    assert all(hasattr(snaporch, name) for name in snaporch.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", snaporch.__version__)


def test_all_errors_are_exported() -> None:
    """Whoever is to catch one can name it."""
    assert set(snaporch.errors.__all__) <= set(snaporch.__all__)


def test_both_have_all_methods_of_the_protocol() -> None:
    """With the same parameters."""
    for name, wanted in inspect.getmembers(AnyOrchestrator, inspect.isfunction):
        if not name.startswith("_"):
            for class_ in (Orchestrator, Client):
                assert [*inspect.signature(getattr(class_, name)).parameters] == [
                    *inspect.signature(wanted).parameters
                ], name


def test_what_is_answered_is_exported() -> None:
    """The classes in the annotations of all methods have public names."""
    words = set[str]()
    for name, method in inspect.getmembers(Orchestrator, inspect.isfunction):
        if not name.startswith("_"):
            words |= set(re.findall(r"[A-Z]\w+", str(typing.cast("object", method.__annotations__.get("return")))))
    known = {"None", "Any", "Path", "AsyncIterator", "Mapping", "MemoryReceiveChannel"}
    assert words - set(snaporch.__all__) <= known
