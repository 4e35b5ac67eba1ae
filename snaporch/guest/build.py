"""Builds the test guests.

``python -m snaporch.guest.build [tiny|linux] --cache DIR`` prints the paths of what it built. Names contain a hash
of the sources, so that a change rebuilds and nothing else does; files appear complete or not at all, so that any
number of callers may build at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from snaporch.errors import SnaporchError

__all__ = ["GuestBuildError", "Kind", "LinuxGuest", "build_linux", "build_tiny", "main", "missing_tools"]

Kind: TypeAlias = Literal["tiny", "linux"]

_SOURCES = Path(__file__).parent
_TINY_SOURCES = ("tiny_start.S", "tiny.c", "workload.c", "workload.h", "tiny.ld")
_LINUX_SOURCES = ("linux.c", "workload.c", "workload.h", "init.sh", "build.py")
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_TINY_FLAGS = (
    "-m32",
    "-march=i686",
    "-mgeneral-regs-only",  # nobody sets up SSE
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
)
_KERNEL_PACKAGE = "linux-image-cloud-amd64"
# In the order in which they must be loaded; a kernel may have some of them built in.
_MODULES = ("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
# A command and the Debian package that has it.
_TOOLS: dict[Kind, dict[str, str]] = {
    "tiny": {"gcc": "gcc", "ld": "binutils"},
    "linux": {"gcc": "gcc", "ld": "binutils", "dpkg-deb": "dpkg", "apt-get": "apt"},
}
_LIBC = Path("/usr/include/stdio.h")


class GuestBuildError(SnaporchError):
    """A guest could not be built; the text has the tool's own words."""


@attrs.frozen
class LinuxGuest:
    """What ``qemu -kernel ... -initrd ...`` needs."""

    kernel: Path
    initrd: Path


def missing_tools(kind: Kind) -> list[str]:
    """Return the Debian packages that building this guest needs and this machine lacks."""
    missing = [package for command, package in _TOOLS[kind].items() if shutil.which(command) is None]
    if kind == "linux" and not _LIBC.exists():
        missing.append("libc6-dev")
    return missing


def build_tiny(cache: Path) -> Path:
    """Return the bare-metal guest, a multiboot kernel for ``qemu -kernel``, built if it is not in the cache.

    Raises:
        GuestBuildError: the compiler is missing or failed.
    """
    target = cache / f"tiny-{_hash(_TINY_SOURCES)}.elf"
    if target.exists():
        return target
    _need_tools("tiny")
    with _scratch(cache) as scratch:
        built = scratch / "tiny.elf"
        sources = [str(_SOURCES / name) for name in _TINY_SOURCES if name.endswith((".c", ".S"))]
        script = f"-Wl,-T,{_SOURCES / 'tiny.ld'}"
        _run(["gcc", *_TINY_FLAGS, *_WARNINGS, script, "-o", str(built), *sources])
        built.replace(target)
    return target


def build_linux(cache: Path) -> LinuxGuest:
    """Return Debian's cloud kernel and an initramfs with the workload, built if they are not in the cache.

    The packages are downloaded and unpacked, not installed.

    Raises:
        GuestBuildError: a tool is missing or failed, or apt knows no such package.
    """
    key = _hash(_LINUX_SOURCES)
    guest = LinuxGuest(kernel=cache / f"linux-{key}.vmlinuz", initrd=cache / f"linux-{key}.initrd")
    if guest.kernel.exists() and guest.initrd.exists():
        return guest
    _need_tools("linux")
    with _scratch(cache) as scratch:
        root = scratch / "root"
        for package in (_kernel_package(), "busybox-static"):
            _unpack(package, root, scratch)
        workload = scratch / "workload"
        sources = [str(_SOURCES / name) for name in _LINUX_SOURCES if name.endswith(".c")]
        _run(["gcc", "-std=gnu11", "-O2", "-static", "-pthread", "-s", *_WARNINGS, "-o", str(workload), *sources])
        initrd = scratch / "initrd"
        initrd.write_bytes(_initramfs(root, workload))
        kernel = next((root / "boot").glob("vmlinuz-*"))
        # The initramfs last: its modules fit this kernel only, and both must be there before either counts.
        kernel.replace(guest.kernel)
        initrd.replace(guest.initrd)
    return guest


def _hash(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((_SOURCES / name).read_bytes())
    return digest.hexdigest()[:12]
