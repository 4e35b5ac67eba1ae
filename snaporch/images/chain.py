"""The images of one domain and who needs them: the input of a delete's plan. No I/O.

An image is *held* while a snapshot has it as its point or a disk of the domain is active on it. It is *pinned*
when it must stay exactly as it is: another domain reads it, it is a file of somebody else's, it has snapshots
inside, or such an image is backed by it. All others that are here are *surplus*: they are there only because
something that is held is backed by them.

Paths are compared as strings: two names of one image are two images, each of which needs the other as it is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import attrs

from snaporch.errors import DamagedSnapshot, InvalidInput, NotFound
from snaporch.images.kinds import TABLE, Kind, Verb
from snaporch.model.domain import DomainRecord
from snaporch.model.record import SnapshotRecord
from snaporch.model.rfc import DeleteFlag

# --- images and holders -------------------------------------------------------------------------------------------


@attrs.frozen
class Image:
    """One image file.

    Attributes:
        path: where it is.
        format: ``qcow2`` or ``raw``.
        backing: the image under it, or None.
        allocated: bytes that it holds itself: what moving its content costs at most.
        virtual_size: what a guest sees, in bytes.
        own: snaporch made it, so snaporch may unlink it.
        original: not own, but the user's disk of this very domain: the guest has written to it, so a merge may.
        inside: names of snapshots inside it that no snapshot of the domain knows.
        identity: what it is, whatever its name (`snaporch.images.kinds.Traced`).
        odd: why an image of its kinds is not merged, or an empty string.
    """

    path: str
    format: str = "qcow2"
    backing: str | None = None
    allocated: int = 0
    virtual_size: int = 0
    own: bool = True
    original: bool = False
    inside: tuple[str, ...] = ()
    identity: str = ""
    odd: str = ""


@attrs.frozen
class Point:
    """A snapshot holds an image as the point of one disk.

    Attributes:
        snapshot: its name.
        target: the disk.
        path: the frozen image, or the image that has the snapshot inside.
        internal: the point is inside the image.
    """

    snapshot: str
    target: str
    path: str
    internal: bool = False


def _by_path(images: Mapping[str, Image] | Iterable[Image]) -> Mapping[str, Image]:
    return images if isinstance(images, Mapping) else {image.path: image for image in images}


def _all_points(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(points)


class Copies(enum.StrEnum):
    """Into which of the images that a hypervisor has open it copies up."""

    INTO_ANY = "any"
    INTO_ACTIVE = "active"
    INTO_NONE = "none"


@attrs.frozen
class Graph:
    """The images of one domain, in whole chains, and who holds them.

    Attributes:
        domain: its name.
        images: by path.
        points: what its snapshots hold.
        active: by target, the image that each of its disks is on.
        running: a hypervisor has the chains of all active images open (a paused guest counts).
        needed: images that others read, each with one of these in words.
        copies: into which of the images that it has open the hypervisor copies up.

    Raises:
        DamagedSnapshot: an image is missing under another one or under a holder, or a chain has no end.
    """

    domain: str
    images: Mapping[str, Image] = attrs.field(converter=_by_path)
    points: tuple[Point, ...] = attrs.field(default=(), converter=_all_points)
    active: Mapping[str, str] = attrs.field(factory=dict)
    running: bool = False
    needed: Mapping[str, str] = attrs.field(factory=dict)
    copies: Copies = Copies.INTO_ANY

    def __attrs_post_init__(self) -> None:
        for image in self.images.values():
            if image.backing is not None and image.backing not in self.images:
                raise DamagedSnapshot(f"{image.path} is backed by {image.backing}, which is missing", image.backing)
        for path in {*self.held, *self.needed} - self.images.keys():
            raise DamagedSnapshot(f"{path} is missing", path)
        for path in self.images.keys() - set(self.order):
            raise DamagedSnapshot(f"the backing chain of {path} has no end", path)

    @cached_property
    def held(self) -> frozenset[str]:
        """The images that are a point or active."""
        return frozenset({*(point.path for point in self.points), *self.active.values()})

    @cached_property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """By path, the images that are directly backed by each image."""
        found: dict[str, list[str]] = {path: [] for path in self.images}
        for image in self.images.values():
            if image.backing is not None:
                found[image.backing].append(image.path)
        return {path: tuple(above) for path, above in found.items()}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All paths, every image after its backing."""
        order = [path for path, image in self.images.items() if image.backing is None]
        for path in order:  # grows while it is walked; a loop: chains are deeper than Python's stack
            order.extend(self.children[path])
        return tuple(order)

    @cached_property
    def opened(self) -> frozenset[str]:
        """The images that a hypervisor has open: no other program may write to these."""
        return self.below(self.active.values()) if self.running else frozenset()

    @cached_property
    def pins(self) -> Mapping[str, str]:
        """The images that must stay exactly as they are, each with the reason.

        What a pinned image reads is pinned as well: a merge under it would change a file in its chain, which
        another program may have open, or (a snapshot inside an image reads through the image's backing) lose data.
        """
        found = {path: f"{who} needs it" for path, who in self.needed.items()}
        for point in self.points:
            if point.internal:
                found.setdefault(point.path, f"it has snapshot {point.snapshot} inside")
        for image in self.images.values():
            if not image.own and not image.original:
                found.setdefault(image.path, "it is not snaporch's")
            if image.inside:
                words = TABLE[Kind.INSIDE][Verb.MERGE]
                found.setdefault(image.path, words.format(detail=", ".join(image.inside)))
            if image.odd:
                found.setdefault(image.path, image.odd)
        for path in reversed(self.order):
            backing = self.images[path].backing
            if path in found and backing is not None:
                found.setdefault(backing, f"{path} is backed by it, and {found[path]}")
        return found

    @cached_property
    def targets(self) -> Mapping[str, str]:
        """By path, a disk whose chains the image is in; images that nothing reads are not in it."""
        found = {path: target for target, path in self.active.items()}
        for point in self.points:
            found.setdefault(point.path, point.target)
        for path in reversed(self.order):
            backing = self.images[path].backing
            if path in found and backing is not None:
                found.setdefault(backing, found[path])
        return found

    def chain(self, path: str) -> Iterator[Image]:
        """Yield the chain of an image, itself first, its base last."""
        link: str | None = path
        while link is not None:
            image = self.images[link]
            yield image
            link = image.backing

    def below(self, paths: Iterable[str]) -> frozenset[str]:
        """Return all images in the chains of `paths`."""
        found: set[str] = set()
        for path in paths:
            for image in self.chain(path):
                if image.path in found:
                    break
                found.add(image.path)
        return frozenset(found)

    def without(self, doomed: Iterable[str]) -> Graph:
        """Return the graph in which these snapshots have given up their points."""
        gone = frozenset(doomed)
        return attrs.evolve(self, points=tuple(point for point in self.points if point.snapshot not in gone))


def graph_of(
    domain: DomainRecord,
    snapshots: Iterable[SnapshotRecord],
    images: Iterable[Image],
    *,
    running: bool,
    needed: Mapping[str, str],
    copies: Copies = Copies.INTO_ANY,
) -> Graph:
    """Return the graph of a domain from what the catalog and the images say.

    Args:
        domain: the domain's record.
        snapshots: all of its snapshots.
        images: all images in the chains of its disks, its points and its own files; `original` is found here.
        running: whether it has a hypervisor, running or paused.
        needed: those of them that others read, each with one of these in words.
        copies: see Graph.
    """
    records, found = tuple(snapshots), {image.path: image for image in images}
    points = [
        Point(record.name, disk.disk.target, disk.disk.path, internal=not disk.external)
        for record in records
        for disk in record.snapshot.disks
    ]
    known = {disk.name for record in records for disk in record.snapshot.disks if not disk.external}
    definitions = (domain.definition, *(record.definition for record in records))
    written = {disk.path for definition in definitions for disk in definition.disks if not disk.readonly}
    written |= {point.path for point in points}
    return Graph(
        domain=domain.name,
        images=[
            attrs.evolve(
                image,
                original=not image.own and image.path in written,
                inside=tuple(name for name in image.inside if name not in known),
            )
            for image in found.values()
        ],
        points=points,
        # A medium that nothing is backed by and that need not be there (a CD-ROM) may be left out of `images`.
        active={disk.target: disk.path for disk in domain.disks if disk.path in found or not disk.readonly},
        running=running,
        needed=needed,
        copies=copies,
    )


# --- the tree of snapshots ----------------------------------------------------------------------------------------


def doomed_by(parents: Mapping[str, str | None], name: str, flags: DeleteFlag) -> frozenset[str]:
    """Return the names of the snapshots that a delete removes; `parents` is the tree, by name.

    Raises:
        NotFound: there is no such snapshot.
        InvalidInput: CHILDREN and CHILDREN_ONLY were both asked for.
    """
    if name not in parents:
        raise NotFound(f"there is no snapshot {name!r}")
    if DeleteFlag.CHILDREN in flags and DeleteFlag.CHILDREN_ONLY in flags:
        raise InvalidInput("--children and --children-only exclude each other: with this snapshot, or without it")
    if not flags & (DeleteFlag.CHILDREN | DeleteFlag.CHILDREN_ONLY):
        return frozenset({name})
    children: dict[str | None, list[str]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found = [name]
    for each in found:  # grows while it is walked
        found.extend(children.get(each, ()))
    return frozenset(found if DeleteFlag.CHILDREN in flags else found[1:])


def heir(parents: Mapping[str, str | None], doomed: frozenset[str], name: str | None) -> str | None:
    """Return the nearest of `name` and its ancestors that remains: who a child, or `current`, descends from now."""
    while name in doomed:
        name = parents.get(name)
    return name
