"""Kinds of images: the table, and each kind on a real image."""

from __future__ import annotations

from pathlib import Path

from snaporch.images.kinds import TABLE, Kind, Traced, Verb, refusal, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "images.md"


def test_the_reference_has_the_table() -> None:
    """What is read there is what decides."""
    assert table() in DOCUMENT.read_text()


def test_every_kind_has_a_row() -> None:
    """No kind is decided by accident."""
    assert TABLE.keys() == set(Kind)


def test_what_is_below_is_not_written_to() -> None:
    """Bitmaps matter in the image that is written to, encryption in the whole chain."""
    bitmaps = Traced("/base", "1", {Kind.BITMAPS: "b0"})
    secret = Traced("/base", "1", {Kind.ENCRYPTED: "LUKS"})
    top = Traced("/top", "2", {Kind.QCOW2: ""})
    assert not refusal(Verb.CREATE, [top, bitmaps])
    assert "it has persistent bitmaps (b0)" in refusal(Verb.CREATE, [bitmaps])
    assert "it is encrypted (LUKS)" in refusal(Verb.CREATE, [top, secret])
