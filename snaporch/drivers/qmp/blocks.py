"""The block layer of a QEMU, seen through QMP: what snaporch does with images that a QEMU has open."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xxhash

from snaporch.drivers.base import (
    Guard,
    LiveCopies,
    LiveMerges,
    Machine,
    Overlay,
    Overlays,
    PivotNote,
    Progress,
    untold,
)
from snaporch.drivers.local.names import file_named
from snaporch.drivers.qmp.blockjob import PREFIX
from snaporch.drivers.qmp.merge import Merger
from snaporch.drivers.qmp.protocol import QMP
from snaporch.model.request import MergeOptions, OnTimeout

_JOBS = {"backup", "commit", "mirror", "stream"}
_ENDED = {"concluded", "null"}
# Undoing must end: a guest that outruns the merge, slowed down too, is paused for the rest of it.
_TO_THE_END = MergeOptions(on_timeout=OnTimeout.PAUSE)


def image_file(image: dict[str, Any]) -> str:
    """Return the name of an image's file as QEMU was given it.

    QEMU speaks of an image whose backing is not named as in its header as ``json:{…}``, all its options.
    """
    name = str(image["filename"])
    if name.startswith("json:"):
        options = json.loads(name.removeprefix("json:"))
        while isinstance(options.get("file"), dict):
            options = options["file"]
        name = options.get("filename", name)
    return name


def chain_of(image: dict[str, Any] | None, cwd: str) -> Iterator[str]:
    """Yield the files of an image and of all that back it."""
    for name in names_of(image):
        yield file_named(name, cwd)


def names_of(image: dict[str, Any] | None) -> Iterator[str]:
    """Yield the names of an image's file and of all that back it, as QEMU was given them."""
    while image is not None:
        yield image_file(image)
        image = image.get("backing-image")


def _node_of(overlay: Overlay) -> str:
    """Return the name of the block node of an overlay: the same after a crash of snaporch, and short enough."""
    return f"sp-{xxhash.xxh3_64_hexdigest(overlay.path.encode())}"


class Blocks(Machine, Overlays, LiveMerges, LiveCopies):
    """A machine whose disks are served by a QEMU.

    Attributes:
        qmp: the connection to that QEMU.
        cwd: the directory that relative paths of its images are relative to.
    """

    qmp: QMP
    cwd: str = "/"

    @abc.abstractmethod
    def pivot_guard(self, job: str, note: PivotNote) -> Guard:
        """Return a guard for the time in which QEMU holds what the guest writes to a disk that is to pivot."""

    @abc.abstractmethod
    def is_ours(self, node: str) -> bool:
        """Return whether we have opened a node, here or on the command line."""

    async def activate(self) -> None:
        """Make nodes writable that a finished migration of a guest which stays paused has left inactive."""

    async def open_overlay(self, overlay: Overlay) -> None:
        """See Overlays; the overlay's backing is left open: the transaction puts it on the present node."""
        await self.qmp.execute(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": _node_of(overlay),
                "file": {"driver": "file", "filename": overlay.path},
                "backing": None,
                "discard": "unmap",
            },
        )

    async def nodes(self) -> set[str]:
        """Return the names of all block nodes."""
        nodes = await self.qmp.execute("query-named-block-nodes", {"flat": True})
        return {node["node-name"] for node in nodes}

    async def close_overlay(self, overlay: Overlay) -> None:
        """See Overlays."""
        if (node := (await self.image_nodes()).get(overlay.path)) is not None:
            await self.qmp.execute("blockdev-del", {"node-name": node})

    async def switch(self, overlays: Sequence[Overlay]) -> None:
        """See Overlays."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": overlay.base.node, "overlay": _node_of(overlay)}}
            for overlay in overlays
        ]
        await self.qmp.execute("transaction", {"actions": actions})

    async def image_nodes(self, *, writable: bool = False) -> dict[str, str]:
        """Return the block nodes of all open images, or only of those open for writing, by path."""
        nodes = await self.qmp.execute("query-named-block-nodes")
        wanted = (node for node in nodes if node["drv"] in {"qcow2", "raw"} and not (writable and node["ro"]))
        return {next(chain_of(node["image"], self.cwd)): node["node-name"] for node in wanted}

    async def commit_image(
        self, top: str, base: str, *, note: PivotNote, options: MergeOptions, progress: Progress
    ) -> None:
        """See LiveMerges."""
        await self.activate()
        await Merger(self).commit(top, base, note, options, progress)

    async def merge_back(self, overlay: Overlay, note: PivotNote) -> None:
        """See Overlays."""
        await self.commit_image(overlay.path, overlay.base.active, note=note, options=_TO_THE_END, progress=untold)

    async def stream_image(self, top: str, base: str | None, *, options: MergeOptions, progress: Progress) -> None:
        """See LiveCopies."""
        await self.activate()
        await Merger(self).stream(top, base, options, progress)

    async def jobs_of_others(self, *, ending: bool = False) -> list[str]:
        """See Machine; one that has ended and was not dismissed keeps nobody from anything."""
        jobs = await self.qmp.execute("query-jobs")
        exports = await self.qmp.execute("query-block-exports") if ending else []
        return [
            f"{job['type']} {job['id']}"
            for job in jobs
            if job["type"] in _JOBS and job["status"] not in _ENDED and not job["id"].startswith(PREFIX)
        ] + [f"{export['type']} export {export['id']}" for export in exports if not export["shutting-down"]]

    async def settle_merges(self, active: Mapping[str, str]) -> None:
        """See Overlays."""
        await Merger(self).settle(active)
