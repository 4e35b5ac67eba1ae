"""The generation id: another one after each revert and in each copy, the same for as long as a domain goes on."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock and with the instruments that it finds among the arguments

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from trio.testing import MockClock

from snaporch import CreateFlag, DomainSnapshot, InvalidInput, RevertFlag
from snaporch.drivers.qemu.hostside import follow
from snaporch.drivers.qemu.options import Option
from snaporch.drivers.xen.config import from_definition
from snaporch.errors import Unsupported
from snaporch.model.convert import definition_from
from snaporch.model.domain import DomainDefinition
from snaporch.orchestrator import catalog_of
from snaporch.testing import ThreadsHoldTime, open_simulated_world

FIRST = "11111111-2222-3333-4444-555555555555"


@pytest.mark.parametrize("genid", ["auto", FIRST])
async def test_it_changes_with_each_revert(
    genid: str, tmp_path: Path, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """Also with one to an inactive domain; not with a start, nor with a definition that says the same of it."""
    async with open_simulated_world(tmp_path) as world:
        orch, seen = world.orchestrator, []

        async def look() -> str:
            seen.append((await orch.domain_info("web1")).generation)
            return seen[-1]

        definition = (await catalog_of(orch).domain("web1")).definition
        assert not await look()
        await orch.destroy("web1")
        await orch.define(attrs.evolve(definition, genid=genid))
        await orch.create("web1", DomainSnapshot("disks"), CreateFlag.DISK_ONLY)
        await orch.start("web1")
        assert (await look() == FIRST) is (genid == FIRST)
        await orch.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
        await orch.revert("web1", "one")
        await look()
        await orch.revert("web1", "one", RevertFlag.PAUSED)
        await look()
        await orch.revert("web1", "disks")
        await look()
        assert len({*seen}) == len(seen)
        await orch.start("web1")
        assert await look() == seen[-2]
        await orch.destroy("web1")
        await orch.define(attrs.evolve(definition, genid=genid))
        assert await look() == seen[-2]
        await orch.define(definition)
        assert not await look()


@pytest.mark.parametrize(
    ("value", "followed"),
    [
        (f"vmgenid,guid={FIRST},id=gen", "driver=vmgenid,guid=auto,id=gen"),
        (f'{{"driver": "vmgenid", "guid": "{FIRST}"}}', '{"driver": "vmgenid", "guid": "auto"}'),
        ("virtio-rng-pci,id=x", "virtio-rng-pci,id=x"),
    ],
)
def test_of_an_attached_domain(value: str, followed: str) -> None:
    """The next process has another one, however the command line says it."""
    assert follow([Option("device", value)], "/", "", ".new").options == (Option("device", followed),)


def test_it_is_refused_where_it_means_nothing() -> None:
    """Other words, and Xen."""
    with pytest.raises(InvalidInput, match="genid 'on' is none of auto, none, or a UUID"):
        definition_from({"name": "web1", "genid": "on"}, Path("/"))
    with pytest.raises(Unsupported, match="`genid` is not for Xen"):
        from_definition(DomainDefinition("web1", genid="auto", driver="xen"), ())
