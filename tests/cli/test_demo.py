"""The demo tells the truth: a guest that is not what it was makes it fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from snaporch.demo import go_back
from snaporch.demo.guest import DemoFailed, Guest

POINT = (100, 110)  # what the guest counted while it was checkpointed


def line(seq: int, *, errors: int = 0, up_ms: int = 1000, word: str = "") -> str:
    counts = f"seq={seq} disks=2 checked=9 errors={errors} gap_us=1 ram_mb=16 dirty_mb=0 up_ms={up_ms}"
    return f"snaporch-guest {word}{counts}\n"


@attrs.define
class Reverted:
    """An orchestrator in whose revert a guest says one thing, and others as soon as it is looked at again."""

    guest: Guest
    said: str = ""

    async def revert(self, _domain: str, _name: str) -> None:
        """Say what the guest says meanwhile."""
        with self.guest.log.open("a") as log:
            log.write(self.said)


@attrs.frozen
class Talking(Guest):
    """A guest that says its words when it has been reverted and is listened to."""

    words: str = ""

    async def until(self, *_: Any, **__: Any) -> None:
        """Say it, whatever is waited for."""
        with self.log.open("a") as log:
            log.write(self.words)


async def story(directory: Path, words: str, *, said: str = "") -> dict[str, Any]:
    guest = Talking(directory, words)
    guest.log.write_text(line(150) + line(200, errors=9, up_ms=2000))
    orchestrator: Any = Reverted(guest, said)
    return await go_back(orchestrator, guest, POINT, lambda _: None)


async def test_a_guest_that_goes_on(tmp_path: Path) -> None:
    """From the point, counting, without errors: that is what the demo is to show."""
    told = await story(tmp_path, line(105, up_ms=900) + line(190, up_ms=4000))
    assert (told["first"], told["last"], told["errors"], told["before"]) == (105, 190, 0, 200)


@pytest.mark.parametrize(
    ("words", "said", "why"),
    [
        (line(105) + line(120, errors=1), "", "finds 1 errors"),
        (line(105) + line(120), line(64, word="ready "), "began anew"),
        (line(201) + line(220), "", "goes on from 201"),
        (line(99) + line(120), "", "goes on from 99"),
        (line(105) + line(105), "", "goes on from 105"),
    ],
)
async def test_a_guest_that_is_not_what_it_was(tmp_path: Path, words: str, said: str, why: str) -> None:
    """Errors, a restart, another number, or none at all any more: the demo fails, and says which."""
    with pytest.raises(DemoFailed, match=why) as failed:
        await story(tmp_path, words, said=said)
    assert failed.value.exit_code == 1
