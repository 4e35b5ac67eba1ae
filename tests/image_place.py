"""Domains that never run, on real qcow2 files, for tests of what becomes of images."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs

from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import CreateFlag, DeviceDisk, DomainSnapshot
from snaporch.orchestrator import Orchestrator, open_orchestrator

MIB = 2**20
SIZE = 8 * MIB


def tool(*words: str | Path) -> str:
    """Run a program; return what it says."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def write(path: str | Path, pattern: int, offset: int = 0, size: int = MIB) -> None:
    """Write a pattern into the disk of an image."""
    tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {offset} {size}", path)


def content(path: str | Path, format_: str = "qcow2") -> bytes:
    """Return what a guest reads of the disk that an image holds."""
    with tempfile.NamedTemporaryFile() as raw:
        tool("qemu-img", "convert", "-U", "-f", format_, "-O", "raw", path, raw.name)
        return raw.read()


@attrs.frozen
class Place:
    """A directory for images, and an orchestrator on a root beside them."""

    directory: Path
    orch: Orchestrator

    def image(self, name: str, *, backing: str | Path = "") -> Path:
        """Make an image."""
        path = self.directory / name
        below = ["-b", str(backing), "-F", "qcow2"] if backing else []
        tool("qemu-img", "create", "-q", "-f", "qcow2", *below, path, *([] if backing else [str(SIZE)]))
        return path

    async def define(self, name: str, *disks: str | Path | DeviceDisk) -> None:
        """Define a domain whose disks are vda, vdb and so on."""
        made = [
            disk if isinstance(disk, DeviceDisk) else DeviceDisk(f"vd{letter}", str(disk))
            for letter, disk in zip("abcd", disks, strict=False)
        ]
        await self.orch.define(DomainDefinition(name, disks=tuple(made)))

    async def snapshot(self, domain: str, name: str) -> str:
        """Take a snapshot of an inactive domain; return the image that its first disk is on then."""
        await self.orch.create(domain, DomainSnapshot(name), CreateFlag.DISK_ONLY)
        return await self.active(domain)

    async def active(self, domain: str) -> str:
        """Return the image that a domain's first disk is on."""
        return (await self.orch.domain_info(domain)).disks[0].active


@asynccontextmanager
async def opened(directory: Path, root: str = "root") -> AsyncIterator[Place]:
    """Open an orchestrator on a root in a directory."""
    async with open_orchestrator(directory / root) as orch:
        yield Place(directory, orch)
