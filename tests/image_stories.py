"""Random stories of several domains on shared images, told on real qcow2 files: nobody's content changes under him.

The oracle is a model that knows, for every reader, which bytes he is to read: for each domain, for each snapshot,
and for what a second root directory holds. After each step every reader is read, byte for byte. An operation may
be refused or busy, never fail; whatever it was, all others read what they read before.

A guest is played: the domain is checked as for its start, and then its image is written to.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs

from snaporch.drivers.local.trace import trace
from snaporch.engine.run import Operation
from snaporch.errors import Busy, Refused, TargetExists
from snaporch.model.domain import DomainDefinition
from snaporch.model.record import OperationKind
from snaporch.model.rfc import DeleteFlag, DeviceDisk
from snaporch.operations.disks import check_start
from snaporch.orchestrator import catalog_of
from tests.image_place import Place, content, opened, tool

SIZE = 512 * 1024
PIECE = 64 * 1024
NAMES = ("one", "two", "three")
CLONES = ("copy", "other")  # that `clone` makes


def _readable(path: Path) -> bool:
    """Return whether an image is whole: one that no domain was given may have lost what it was made over."""
    with suppress(Refused):
        return bool(trace(str(path), "qcow2"))
    return False


@attrs.define
class Story:
    """One story.

    Attributes:
        place: the first root directory, which most happens in.
        other: a second one, over the same images.
        dice: decides.
        domains: what each domain is to read.
        points: what each snapshot is to read, by domain and name.
        elsewhere: what each domain of the second root is to read.
        told: what has happened, for whoever reads a failure.
    """

    place: Place
    other: Place
    dice: random.Random
    domains: dict[str, bytes] = attrs.field(factory=dict)
    points: dict[tuple[str, str], bytes] = attrs.field(factory=dict)
    elsewhere: dict[str, bytes] = attrs.field(factory=dict)
    told: list[str] = attrs.field(factory=list)
    _count: int = 0

    def _new(self, what: str) -> str:
        self._count += 1
        return f"{what}{self._count}"

    # --- what there is ---

    def _images(self) -> list[Path]:
        """Return all images, those under the root too, and all their other names, that are whole."""
        found = [path for path in self.place.directory.rglob("*.qcow2") if "other" not in path.parts]
        return sorted(path for path in found if path.is_file() and _readable(path))

    def _image(self, backing: Path | None) -> Path:
        path = self.place.directory / f"{self._new('image')}.qcow2"
        below = ["-b", str(backing), "-F", "qcow2"] if backing else []
        tool("qemu-img", "create", "-q", "-f", "qcow2", *below, path, *([] if backing else [str(SIZE)]))
        if not backing:
            self._write(path)
        return path

    def _named(self, path: Path) -> Path:
        """Return the image under some name: its own, a symbolic link's, a hard link's."""
        name = self.place.directory / f"{self._new('name')}.qcow2"
        match self.dice.choice(("own", "symbolic", "hard")):
            case "symbolic":
                name.symlink_to(path)
            case "hard":
                os.link(path, name)
                self.told.append(f"hard link {name.name} to {path.name}")
            case _:
                return path
        return name

    def _write(self, path: Path | str) -> None:
        pattern, at = self.dice.randrange(1, 256), self.dice.randrange(SIZE // PIECE) * PIECE
        tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {at} {PIECE}", path)

    async def _point(self) -> tuple[str, str]:
        return self.dice.choice(sorted(self.points))

    # --- what happens ---

    async def define(self) -> None:
        """Define a domain, on a new image, over one of another, or on one that may be another's."""
        free = [name for name in NAMES if name not in self.domains]
        if not free:
            return
        images, name = self._images(), self.dice.choice(free)
        over = self.dice.choice(images) if images and self.dice.random() < 0.7 else None
        named = self._named(over) if over else None
        disk = named if named and self.dice.random() < 0.3 else self._image(named)
        self.told.append(f"define {name} on {disk.name} over {over}")
        await self.place.define(name, disk)
        self.domains[name] = content(disk)

    async def redefine(self) -> None:
        """Define a domain anew: another image or target, or its overlay for its own."""
        name = self.dice.choice(sorted(self.domains))
        active = await self.place.active(name)
        known = (await catalog_of(self.place.orch).domain(name)).definition.disks[0]
        path = self.dice.choice([known.path, active, str(self.dice.choice(self._images()))])
        target = self.dice.choice(["vda", "vda", "sda"])
        self.told.append(f"redefine {name}: {target} {path}")
        disk = DeviceDisk(target, path, readonly=self.dice.random() < 0.1)
        await self.place.orch.define(DomainDefinition(name, disks=(disk,)))
        now = await self.place.active(name)
        if active != known.path and not os.path.samefile(now, active):
            raise AssertionError(f"{name} was taken off its newest image: {self.told}")
        self.domains[name] = content(now)

    async def clone(self) -> None:
        """Make another domain from a snapshot, of a clone, too."""
        free = [name for name in CLONES if name not in self.domains]
        if not free:
            return
        name, snapshot = await self._point()
        new = self.dice.choice(free)
        self.told.append(f"clone {name} {snapshot} {new}")
        await self.place.orch.clone(name, snapshot, new)
        self.domains[new] = self.points[name, snapshot]

    async def undefine(self) -> None:
        """Forget a domain; of a clone, all that was made for it."""
        name = self.dice.choice(sorted(self.domains))
        discard = name in CLONES and self.dice.random() < 0.5
        self.told.append(f"undefine {name}{' --discard' if discard else ''}")
        await self.place.orch.undefine(name, discard=discard)
        del self.domains[name]

    async def back_and_forth(self) -> None:
        """The second root goes back to what it has kept, and may take it anew."""
        name = self.dice.choice(sorted(self.elsewhere))
        self.told.append(f"elsewhere {name} back and forth")
        await self.other.orch.revert(name, "s")
        if self.dice.random() < 0.5:
            await self.other.orch.delete(name, "s")
            await self.other.snapshot(name, "s")

    async def play(self) -> None:
        """Let a guest start and write, if it may."""
        name = self.dice.choice(sorted(self.domains))
        self.told.append(f"play {name}")
        context, operation = self.place.orch._context, Operation(OperationKind.START, name, "")
        async with context.locked(operation):
            record = await context.catalog.domain(name)
            await check_start(context, operation, record)
            if not record.disks[0].readonly:
                self._write(record.disks[0].path)
        self.domains[name] = content(await self.place.active(name))

    async def create(self) -> None:
        """Take a snapshot."""
        name, snapshot = self.dice.choice(sorted(self.domains)), self._new("s")
        self.told.append(f"create {name} {snapshot}")
        await self.place.snapshot(name, snapshot)
        if (await self.place.orch.show(name, snapshot)).snapshot.disks:  # else its one disk is read-only
            self.points[name, snapshot] = self.domains[name]

    async def revert(self) -> None:
        """Go back."""
        name, snapshot = await self._point()
        self.told.append(f"revert {name} {snapshot}")
        await self.place.orch.revert(name, snapshot)
        self.domains[name] = self.points[name, snapshot]

    async def delete(self) -> None:
        """Delete snapshots."""
        name, snapshot = await self._point()
        flags = self.dice.choice([DeleteFlag(0), DeleteFlag(0), DeleteFlag.CHILDREN, DeleteFlag.CHILDREN_ONLY])
        self.told.append(f"delete {name} {snapshot} {flags}")
        await self.place.orch.delete(name, snapshot, flags)
        left = {(name, record.name) for record in await self.place.orch.list(name)}
        self.points = {key: data for key, data in self.points.items() if key[0] != name or key in left}

    async def flatten(self) -> None:
        """Shorten chains."""
        name = self.dice.choice(sorted(self.domains))
        self.told.append(f"flatten {name}")
        await self.place.orch.flatten(name, depth=self.dice.choice([1, 2]))

    async def repair(self) -> None:
        """Mend what is certain."""
        self.told.append("fsck --repair")
        await self.place.orch.fsck(repair=True)

    async def from_elsewhere(self) -> None:
        """A second root takes a snapshot of a clone of something, and keeps it."""
        images = self._images()
        if images and len(self.elsewhere) < 2:
            name, backing = self._new("far"), self.dice.choice(images)
            disk = self._image(self._named(backing))
            self.told.append(f"elsewhere {name} over {backing}")
            await self.other.define(name, disk)
            before = content(disk)
            await self.other.snapshot(name, "s")
            self.elsewhere[name] = before

    # --- telling it ---

    async def step(self) -> None:
        """Do something at random, and look at everybody."""
        verbs: list[Callable[[], Awaitable[None]]] = [self.define, self.from_elsewhere]
        if self.domains:
            verbs += [self.play, self.play, self.create, self.create, self.redefine, self.undefine, self.flatten]
            verbs += [self.repair]
        if self.points:
            verbs += [self.revert, self.revert, self.delete, self.delete, self.clone]
        if self.elsewhere:
            verbs += [self.back_and_forth]
        try:
            await self.dice.choice(verbs)()
        except (Refused, Busy) as error:
            if isinstance(error, TargetExists):
                raise
            self.told.append(f"  refused: {error}")
        await self.check()

    async def check(self) -> None:
        """Read everybody.

        Raises:
            AssertionError: somebody reads something else than he is to.
        """
        for name, data in self.domains.items():
            self._same(f"domain {name}", await self.place.active(name), data)
        for (name, snapshot), data in self.points.items():
            record = await self.place.orch.show(name, snapshot)
            self._same(f"snapshot {snapshot} of {name}", record.snapshot.disks[0].disk.path, data)
        for name, data in self.elsewhere.items():
            self._same(f"domain {name} elsewhere", await self.other.active(name), data)

    def _same(self, who: str, path: str, data: bytes) -> None:
        if not os.path.exists(path) or content(path) != data:
            raise AssertionError("\n".join([f"{who} does not read what it did ({path}):", *self.told]))


@asynccontextmanager
async def telling(directory: Path, dice: random.Random) -> AsyncIterator[Story]:
    """Begin a story in an empty directory."""
    async with opened(directory) as place, opened(directory, "other") as other:
        yield Story(place, other, dice)


async def tell(directory: Path, dice: random.Random, steps: int) -> Story:
    """Tell a story; return it.

    Raises:
        AssertionError: somebody's content has changed under him.
    """
    async with telling(directory, dice) as story:
        for _ in range(steps):
            await story.step()
        return story
