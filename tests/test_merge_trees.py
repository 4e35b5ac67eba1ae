"""Random trees of two domains: creates, writes, reverts, resizes, and deletes that keep all promises."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snaporch.errors import Unsupported
from snaporch.images.chain import Graph, doomed_by, graph_of, heir
from snaporch.images.merge import apply, plan_delete, plan_flatten
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.merge import MergePlan
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeleteFlag, DeviceDisk
from tests.merge_model import Contents, check, check_flat, least, snapshot_record

# Creates, reverts, deletes and flattens in a run of the suite; writes and the like are not counted.
OPERATIONS = int(os.environ.get("SNAPORCH_MERGE_OPERATIONS", "2000"))
ONE_RUN = 50
CLUSTERS = 8

# --- random trees -------------------------------------------------------------------------------------------------


@attrs.define
class Domain:
    """A domain of the model: as much of it as `graph_of` wants, kept as its own records."""

    record: DomainRecord
    snapshots: dict[str, SnapshotRecord] = attrs.field(factory=dict)
    running: bool = False


class Trees(RuleBasedStateMachine):
    """Domains with shared bases: creates, writes, reverts, resizes, deletes, flattens; what merges is checked."""

    done: ClassVar[Counter[str]] = Counter()  # operations by kind, of all runs

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        """Two domains: one with a disk over a template and one of its own, one over the same template."""
        self.chance = random.Random(seed)  # noqa: S311 - to choose orders
        self.count, self.contents, self.shared = itertools.count(), Contents(), False
        self.contents.add("/template", own=False, virtual_size=CLUSTERS)
        self.contents.data["/template"] = {cluster: f"template {cluster}" for cluster in range(0, CLUSTERS, 2)}
        for path in ("/a/vda", "/b/vda"):
            self.contents.add(path, own=False, virtual_size=CLUSTERS, backing="/template")
        self.contents.add("/a/vdb", own=False, virtual_size=CLUSTERS, format="raw")
        self.domains = {
            "a": Domain(self.record("a", vda="/a/vda", vdb="/a/vdb")),
            "b": Domain(self.record("b", vda="/b/vda")),
        }

    def record(self, name: str, **disks: str) -> DomainRecord:
        """Return a domain's record."""
        return DomainRecord(DomainDefinition(name, disks=tuple(DeviceDisk(t, p) for t, p in disks.items())))

    def domain(self, name: str) -> Domain:
        """Return a domain."""
        return self.domains[name]

    def overlay(self, name: str, target: str, under: str) -> DeviceDisk:
        """Make an overlay."""
        path = f"/s/{name}/{target}.{next(self.count)}"
        self.contents.add(path, backing=under, virtual_size=self.contents.images[under].virtual_size)
        return DeviceDisk(target, path)

    names = st.sampled_from(["a", "a", "a", "b"])

    @rule(name=names, disk=st.integers(0, 1), clusters=st.sets(st.integers(0, CLUSTERS - 1), min_size=1))
    def write(self, name: str, disk: int, clusters: set[int]) -> None:
        """The guest writes."""
        disks = self.domain(name).record.disks
        path = disks[disk % len(disks)].path
        for cluster in clusters:
            if cluster < self.contents.images[path].virtual_size:
                self.contents.data[path][cluster] = f"write {next(self.count)}"

    @rule(
        name=names, disk=st.integers(0, 1), size=st.sampled_from([CLUSTERS, CLUSTERS, CLUSTERS - 2, CLUSTERS + 2])
    )
    def resize(self, name: str, disk: int, size: int) -> None:
        """A disk grows or shrinks."""
        disks = self.domain(name).record.disks
        path = disks[disk % len(disks)].path
        if path.startswith("/s/"):
            old, new = self.contents.images[path], attrs.evolve(self.contents.images[path], virtual_size=size)
            kept = {cluster: value for cluster, value in self.contents.data[path].items() if cluster < size}
            under = self.contents.images[old.backing].virtual_size if old.backing else 0
            # As QEMU does when an image grows over a longer backing: what was cut off must not come back.
            kept |= dict.fromkeys(range(old.virtual_size, min(size, under)), "zero")
            self.contents.images[path], self.contents.data[path] = new, kept

    @rule(name=names, only=st.sampled_from([None, None, 0]))
    def create(self, name: str, only: int | None) -> None:
        """A snapshot of all disks, or of the first."""
        self.done["create"] += 1
        domain = self.domain(name)
        snapshot = f"s{next(self.count)}"
        frozen = {disk.target: disk for disk in domain.record.disks[: None if only is None else 1]}
        domain.snapshots[snapshot] = snapshot_record(domain.record, snapshot, frozen)
        fresh = {target: self.overlay(name, target, disk.path) for target, disk in frozen.items()}
        domain.record = attrs.evolve(domain.record, active={**domain.record.active, **fresh}, current=snapshot)

    @rule(name=names, pick=st.integers(0, 99), tidy=st.booleans())
    def revert(self, name: str, pick: int, tidy: bool) -> None:
        """Fresh overlays over a point; the old active images go, or are left for the next delete."""
        domain = self.domain(name)
        if domain.snapshots:
            self.done["revert"] += 1
            record = list(domain.snapshots.values())[pick % len(domain.snapshots)]
            frozen = {disk.disk.target: disk.disk for disk in record.snapshot.disks}
            old = {target: disk for target, disk in domain.record.active.items() if target in frozen}
            fresh = {target: self.overlay(name, target, disk.path) for target, disk in frozen.items()}
            domain.record = attrs.evolve(
                domain.record, active={**domain.record.active, **fresh}, current=record.name
            )
            backings = {image.backing for image in self.contents.images.values()}
            for disk in old.values():
                if tidy and disk.path not in backings:
                    del self.contents.images[disk.path], self.contents.data[disk.path]

    @rule(pick=st.integers(0, 99))
    @precondition(lambda self: self.domains["a"].snapshots and not self.shared)
    def share(self, pick: int) -> None:
        """The other domain's disk becomes a clone of a point; once, or in the end everything is shared."""
        record = list(self.domain("a").snapshots.values())[pick % len(self.domain("a").snapshots)]
        clone, domain = self.overlay("b", "vda", record.snapshot.disks[0].disk.path), self.domain("b")
        domain.record = attrs.evolve(domain.record, active={"vda": clone})
        self.shared = True

    @rule(name=names, choices=st.lists(st.integers(0, 999), min_size=5, max_size=15))
    def live_on(self, name: str, choices: list[int]) -> None:
        """Many operations in a row: deep and bushy trees have the interesting deletes."""
        for choice in choices:
            kind, pick = choice % 10, choice // 10
            if kind < 5:
                self.create(name, None if pick % 3 else 0)
                self.write(name, pick, {self.chance.randrange(CLUSTERS) for _ in range(pick % 5)})
            elif kind < 7:
                self.revert(name, pick, tidy=bool(pick % 3))
            else:
                self.delete(name, pick, DeleteFlag(pick % 3 if kind == 9 else 0))

    @rule(name=names)
    def start_or_stop(self, name: str) -> None:
        """The hypervisor has the images open, or not."""
        self.domain(name).running = not self.domain(name).running

    @rule(name=names, pick=st.integers(0, 99), flags=st.sampled_from([DeleteFlag(0)] * 4 + list(DeleteFlag)))
    def delete(self, name: str, pick: int, flags: DeleteFlag) -> None:
        """Delete snapshots, and keep all promises."""
        domain, graph = self.domain(name), self.graph(name)
        if not domain.snapshots:
            return
        self.done["delete"] += 1
        parents = {record.name: record.parent for record in domain.snapshots.values()}
        doomed = doomed_by(parents, list(parents)[pick % len(parents)], flags)
        plan = plan_delete(graph, doomed)
        if len(graph.images) < 14:
            assert (len(apply(graph, plan).images), plan.bytes) == least(graph.without(doomed))
        check(graph, self.contents, plan, self.chance)
        self.forget(domain, plan, parents, doomed)

    @rule(name=names, pick=st.integers(0, 99), depth=st.integers(1, 4))
    def flatten(self, name: str, pick: int, depth: int) -> None:
        """Chains of the domain, or of a snapshot, become short; what is left over goes with the next delete."""
        domain, graph = self.domain(name), self.graph(name)
        points = [record.snapshot.disks for record in domain.snapshots.values()]
        choices = [domain.record.disks, *(tuple(disk.disk for disk in disks) for disks in points)]
        tops = [disk.path for disk in choices[pick % len(choices)]]
        if any(top in graph.pins and len(list(graph.chain(top))) > depth for top in tops):
            with pytest.raises(Unsupported):
                plan_flatten(graph, tops, depth)
            return
        self.done["flatten"] += 1
        check_flat(graph, self.contents, plan_flatten(graph, tops, depth), tops, depth)

    def forget(
        self, domain: Domain, plan: MergePlan, parents: Mapping[str, str | None], doomed: frozenset[str]
    ) -> None:
        """Write the outcome into the records, as a delete does into the catalog."""

        def moved(disk: DeviceDisk) -> DeviceDisk:
            return attrs.evolve(disk, path=plan.moved.get(disk.path, disk.path))

        for name in doomed:
            del domain.snapshots[name]
        for name, record in domain.snapshots.items():
            disks = tuple(attrs.evolve(disk, disk=moved(disk.disk)) for disk in record.snapshot.disks)
            domain.snapshots[name] = attrs.evolve(
                record,
                snapshot=attrs.evolve(record.snapshot, disks=disks),
                parent=heir(parents, doomed, record.parent),
            )
        active = {target: moved(disk) for target, disk in domain.record.active.items()}
        current = heir(parents, doomed, domain.record.current)
        domain.record = attrs.evolve(domain.record, active=active, current=current)

    def needs(self, name: str) -> set[str]:
        """Return all images that a domain's files, disks and points read."""
        domain = self.domain(name)
        tops = [disk.path for disk in domain.record.disks]
        tops += [path for path in self.contents.images if path.startswith(f"/s/{name}/")]
        tops += [disk.disk.path for record in domain.snapshots.values() for disk in record.snapshot.disks]
        return {image.path for top in tops for image in self.contents.chain(top)}

    def graph(self, name: str) -> Graph:
        """Return the graph of a domain: its own files and what it reads."""
        domain, needs = self.domain(name), self.needs(name)
        images = [image for image in self.contents.measured() if image.path in needs]
        others = {path: f"domain {other}" for other in self.domains if other != name for path in self.needs(other)}
        needed = {path: who for path, who in others.items() if path in needs}
        return graph_of(domain.record, domain.snapshots.values(), images, running=domain.running, needed=needed)

    @invariant()
    def every_file_is_there(self) -> None:
        """No image is missing under another."""
        backings = {image.backing for image in self.contents.images.values()} - {None}
        assert backings <= self.contents.images.keys()


class TestTrees(Trees.TestCase):  # type: ignore[misc, valid-type]
    """As many operations as are said, counted: hypothesis ends a run where it likes."""

    settings = settings(
        max_examples=max(1, OPERATIONS // ONE_RUN // 8),
        stateful_step_count=ONE_RUN,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def runTest(self) -> None:  # noqa: N802 - as unittest calls it
        """Run until there have been enough of them."""
        Trees.done.clear()
        while Trees.done.total() < OPERATIONS:
            super().runTest()
        assert all(Trees.done[kind] > OPERATIONS // 40 for kind in ("create", "revert", "delete", "flatten"))


def test_a_smaller_image_takes_no_more_than_it_shows() -> None:
    """A disk that was made smaller, flattened, made larger and merged back shows zeros behind its old end."""
    trees, plain = Trees(), [0, 0, 0, 0, 0]
    trees.begin(seed=0)
    trees.live_on(choices=plain, name="a")
    trees.resize(disk=0, name="a", size=6)
    trees.live_on(choices=plain, name="a")
    trees.flatten(depth=1, name="a", pick=0)
    trees.resize(disk=0, name="a", size=8)
    trees.live_on(choices=[0, 9, 9, 29, 9], name="a")
