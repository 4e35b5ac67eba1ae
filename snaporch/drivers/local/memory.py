"""The RAM of this host."""

from __future__ import annotations

from pathlib import Path


def free_ram(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that the kernel reckons it can give without swapping; None where it does not say."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
