"""What a guest says, as it is found in the file of its serial port."""

from __future__ import annotations

from snaporch.guest.report import count_starts, parse

REST = "disks=2 checked=7 errors=0 gap_us=1 ram_mb=16 dirty_mb=3"


def test_killed_in_a_line() -> None:
    """One is killed in the midst of a line, wherever; what the next one says in the same line is all there."""
    whole = f"snaporch-guest seq=5 {REST} up_ms=234 io_us=2\n"
    ready = f"snaporch-guest ready seq=9 {REST} up_ms=24 \r\n"
    for length in range(len(whole)):
        text = whole[:length] + ready
        assert [report.seq for report in parse(text)] == [9], text
        assert count_starts(text) == 1
