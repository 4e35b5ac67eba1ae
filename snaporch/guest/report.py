"""What the test guests say on their serial port.

A checkpoint may cut a line in two, and firmware and kernel write to the same port: anything that is not a
complete line of the guest's is skipped.
"""

from __future__ import annotations

import re

import attrs

__all__ = ["Report", "count_starts", "parse", "parse_errors"]

_STATUS = r"seq=(\d+) disks=(\d+) checked=(\d+) errors=(\d+) gap_us=(\d+) ram_mb=(\d+) dirty_mb=(\d+) up_ms=(\d+)"
_IO = r"(?: io_us=(\d+))?"
_END = r"(?: (?:(?!snaporch-guest)[^\r\n])*)?\r?\n"  # one that is killed in a line has the next one's first on it
_REPORT = re.compile(rf"snaporch-guest (?:ready )?{_STATUS}{_IO}{_END}")
_READY = re.compile(rf"snaporch-guest ready{_END}")
_ERROR = re.compile(r"snaporch-guest ERROR ([^\r\n]*)\r?\n")


@attrs.frozen
class Report:
    """One report line; see the guest's README for how each number comes about.

    Attributes:
        seq: the last sequence number that is durably on all disks.
        disks: how many disks the guest uses.
        checked: sectors and pages compared so far.
        errors: mismatches so far; never goes back.
        gap_us: the longest time since the last report in which the guest could not write its RAM.
        ram_mb: MiB of RAM with patterns.
        dirty_mb: MiB dirtied so far.
        up_ms: milliseconds since the workload began.
        io_us: the longest time since the last report from a disk request's start to its end.
    """

    seq: int
    disks: int
    checked: int
    errors: int
    gap_us: int
    ram_mb: int
    dirty_mb: int
    up_ms: int
    io_us: int = 0


def parse(text: str) -> list[Report]:
    """Return every complete report in the order written, the ready line among them."""
    return [Report(*map(int, match.groups(default="0"))) for match in _REPORT.finditer(text)]


def parse_errors(text: str) -> list[str]:
    """Return what follows ``snaporch-guest ERROR`` in each complete error line."""
    return [match.group(1) for match in _ERROR.finditer(text)]


def count_starts(text: str) -> int:
    """Return how often the workload began anew: a restored guest must not."""
    return len(_READY.findall(text))
