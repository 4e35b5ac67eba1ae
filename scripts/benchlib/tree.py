"""Random operations on one domain's tree of snapshots, and what must hold after each of them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs

from snaporch import CreateFlag, DeleteFlag, DomainSnapshot, DomainState, Orchestrator, RevertFlag

OPERATIONS = ("create",) * 4 + ("revert",) * 2 + ("delete",) * 4 + ("switch",)
FLAGS = (DeleteFlag(0),) * 5 + (DeleteFlag.CHILDREN_ONLY, DeleteFlag.CHILDREN)
KINDS = {".qcow2", ".mem", ".sink", ".index"}

Check = Callable[[str], Awaitable[None]]
"""Raises when the running guest is not well, that goes on (``on``), was ``restored``, or ``boots``."""


async def files_known(orch: Orchestrator, domain: str) -> set[str]:
    """Return all files that a domain and its snapshots are made of."""
    records = await orch.list(domain)
    known = {path for disk in (await orch.domain_info(domain)).disks for path in disk.chain}
    known |= {file.path for record in records for chain in record.images.values() for file in chain}
    return known | {path for record in records if record.memory for path in (record.memory.path, record.index)}


@attrs.define
class Tree:
    """A domain whose snapshots are created, reverted to and deleted at random.

    Attributes:
        orch: the orchestrator.
        domain: the domain's name.
        home: the directory with its files.
        chance: what happens.
        check: asks the guest.
        originals: the user's own images, which must stay.
        named: how many snapshots there have been.
    """

    orch: Orchestrator
    domain: str
    home: Path
    chance: random.Random
    check: Check
    originals: tuple[Path, ...]
    named: int = 0

    async def step(self) -> str:
        """Do something, check everything, and return in words what it was."""
        names = [record.name for record in await self.orch.list(self.domain)]
        what = self.chance.choice(OPERATIONS) if names else "create"
        name = self.chance.choice(names) if names else ""
        words = await getattr(self, f"_{what}")(name)
        await self._check_files()
        return f"{what} {words}"

    async def _state(self) -> DomainState:
        return (await self.orch.domain_info(self.domain)).state

    async def _create(self, _: str) -> str:
        self.named += 1
        runs = await self._state() is not DomainState.INACTIVE
        snapshot = DomainSnapshot(f"s{self.named}", memory=runs)
        await self.orch.create(self.domain, snapshot, CreateFlag.LIVE if runs else CreateFlag(0))
        if runs:
            await self.check("on")
        return f"{snapshot.name}{'' if runs else ', disks only'}"

    async def _revert(self, name: str) -> str:
        await self.orch.revert(self.domain, name)
        if await self._state() is DomainState.RUNNING:
            await self.check("restored")
        return name

    async def _delete(self, name: str) -> str:
        flags = self.chance.choice(FLAGS)
        plan = await self.orch.delete(self.domain, name, flags)
        if await self._state() is DomainState.RUNNING:
            await self.check("on")
        steps = ", ".join(f"{step.kind} {step.where} {step.target}" for step in plan.steps)
        return f"{name}{f' {flags.name}' if flags else ''}: {steps or 'nothing merged'}"

    async def _switch(self, _: str) -> str:
        if await self._state() is DomainState.INACTIVE:
            await self.orch.start(self.domain)
            await self.check("boots")
            return "on"
        await self.orch.destroy(self.domain)
        return "off"

    async def _check_files(self) -> None:
        """Assert that every snapshot is what was saved, and that each file has somebody who knows it."""
        records = await self.orch.list(self.domain)
        for record in records:
            report = await self.orch.verify(self.domain, record.name)
            assert report.ok, f"{record.name}: {report.problems}"  # noqa: S101 - a check is what this is
        found = {str(path) for path in self.home.iterdir() if path.suffix in KINDS}
        unknown = found - await files_known(self.orch, self.domain)
        assert not unknown, f"nobody knows {unknown}"  # noqa: S101
        assert all(path.exists() for path in self.originals), "an image of the user's is gone"  # noqa: S101

    async def revert_to_all(self) -> int:
        """Revert to every snapshot, ask the guest each time, and return how many there were."""
        records = await self.orch.list(self.domain)
        for record in records:
            await self.orch.revert(self.domain, record.name, RevertFlag.RUNNING)
            await self.check("restored" if record.memory else "boots")
        await self._check_files()
        return len(records)
