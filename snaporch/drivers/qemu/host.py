"""What this host has for QEMU: `Driver.doctor`."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from snaporch.drivers.local import hugepages
from snaporch.drivers.qemu import firmware, kvm
from snaporch.errors import Unsupported


def default_emulator() -> str:
    """Return the QEMU to use where a definition names none."""
    return os.environ.get("SNAPORCH_QEMU", "qemu-system-x86_64")


async def doctor(qemu_img: str) -> dict[str, Any]:
    """Return what is here, and what is missing, for `snaporch doctor` (JSON).

    Args:
        qemu_img: the program's name.
    """
    emulator = default_emulator()
    found = shutil.which(emulator)
    findings: dict[str, Any] = {"emulator": found or f"{emulator} is not installed"}
    if found:
        out = await trio.run_process([found, "--version"], capture_stdout=True, stdin=subprocess.DEVNULL)
        findings["version"] = out.stdout.decode().splitlines()[0]
        findings["kvm"] = await kvm.cached_probe(found) or "a guest runs under it"
    findings["qemu-img"] = shutil.which(qemu_img) or "not installed (Debian: apt install qemu-utils)"
    try:
        findings["uefi"] = firmware.firmware_for().code
    except Unsupported as error:
        findings["uefi"] = str(error)
    findings["userfaultfd"] = _userfaultfd()
    blocker = await trio.to_thread.run_sync(hugepages.blocker)
    findings["huge-pages"] = (
        f"split by every background snapshot, and later pauses are longer: {blocker}"
        if blocker
        else "a guest gets them back after a background snapshot"
    )
    return findings


def _userfaultfd() -> str:
    """Say whether a QEMU of this user may write-protect its memory (background snapshots)."""
    if os.geteuid() == 0 or os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return "allowed"
    with suppress(OSError):
        if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1":
            return "allowed"
    return "not allowed: background snapshots fall back to precopy; root can `sysctl vm.unprivileged_userfaultfd=1`"
