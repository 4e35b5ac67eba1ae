"""Snapshots leave the root as files, and come in."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import attrs

from snaporch.drivers.base import Binary
from snaporch.model.archive import Exported, Imported
from snaporch.operations.exporting import export, export_disk
from snaporch.operations.importing import import_archive
from snaporch.orchestrator.looking import Looking


@attrs.define
class Archives(Looking):
    """The part of an orchestrator that exports and imports."""

    async def export(
        self, domain: str, name: str, output: Path | str | Binary, *, ids: Collection[str] = ()
    ) -> Exported:
        """Write a snapshot, with all that is needed to go back to it, to one file: see docs/how-to/archives.md.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            output: a file that is not there yet, which appears when it is complete; or a stream of bytes.
            ids: see `revert`.

        Raises:
            TargetExists: there is such a file.
            NotEnoughSpace: each disk is copied first, beside the domain's files, and that may not fit.
            Unsupported: the domain was attached to, or the snapshot does not hold all of its disks.
            DamagedSnapshot, OperationFailed: a file is not what was saved, or cannot be written; nothing is left
                but what was written to a stream.
        """
        await self._mended(domain)
        output = str(output) if isinstance(output, Path) else output
        return await export(self._context, domain, name, output, version=version("snaporch"), ids=ids)

    async def export_disk(
        self,
        domain: str,
        name: str,
        target: str,
        output: Path | str | Binary,
        *,
        format_: str = "qcow2",
        ids: Collection[str] = (),
    ) -> Exported:
        """Copy one disk of a snapshot, whole, to an image that needs no other.

        Args:
            domain: the domain's name.
            name: the snapshot's.
            target: the disk.
            output: as of `export`.
            format_: ``qcow2`` or ``raw``.
            ids: see `revert`.

        Raises:
            As `export`.
        """
        await self._mended(domain)
        output = str(output) if isinstance(output, Path) else output
        return await export_disk(self._context, domain, name, target, output, format_=format_, ids=ids)

    async def import_archive(
        self,
        path: Path | str,
        *,
        name: str = "",
        trust: bool = False,
        same_identity: bool = False,
        disks_only: bool = False,
    ) -> Imported:
        """Make an inactive domain, with one snapshot, of an archive, which may be anybody's.

        Args:
            path: the archive.
            name: the domain's; by default the one that it had.
            trust: take over what it says that runs on this host: the emulator and QEMU's further options.
            same_identity: the domain keeps its UUID.
            disks_only: leave out the memory.

        Raises:
            InvalidInput: it is no archive, or its memory needs what is not trusted.
            TargetExists: there is such a domain, or one of that UUID.
            DamagedSnapshot: it is not what its manifest says; nothing is left of it.
            Unsupported: its memory cannot be loaded here; likewise.
        """
        return await import_archive(
            self._context,
            str(path),
            name=name,
            trust=trust,
            same_identity=same_identity,
            disks_only=disks_only,
        )
