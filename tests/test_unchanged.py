"""What is changed behind snaporch's back is found at start, create, delete and flatten, on real images."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import attrs
import pytest

from snaporch.drivers.local import filework
from snaporch.errors import DamagedSnapshot, OperationFailed, Refused
from snaporch.model.finding import Trouble
from tests.image_place import MIB, Place, content, opened, tool, write


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with opened(tmp_path) as made:
        yield made


@attrs.frozen
class Chain:
    """A domain with two snapshots, all images of which have data: disk.qcow2, `middle`, and `active`."""

    place: Place
    disk: Path
    middle: str
    active: str

    def rebase(self, image: str, backing: str) -> None:
        """Change what an image says that it is backed by, and no data."""
        words = ["-b", backing, "-F", "qcow2"] if backing else ["-b", ""]
        tool("qemu-img", "rebase", "-u", "-f", "qcow2", *words, image)

    @property
    def verbs(self) -> list[Callable[[], Awaitable[object]]]:
        """All that would go on from what is there."""
        orch = self.place.orch
        return [
            lambda: orch.start("one"),
            lambda: self.place.snapshot("one", "s9"),
            lambda: orch.delete("one", "s2"),
            lambda: orch.flatten("one", depth=1),
        ]

    async def check_refused(self, match: str, *, deeper: bool) -> None:
        """See all of these be refused, and nothing change; what has no chain is flat."""
        before = [Path(path).read_bytes() for path in (self.disk, self.middle, self.active)]
        for verb in self.verbs[: 4 if deeper else 3]:
            with pytest.raises(Refused, match=match):
                await verb()
        assert [Path(path).read_bytes() for path in (self.disk, self.middle, self.active)] == before
        assert [record.name for record in await self.place.orch.list("one")] == ["s1", "s2"]


@pytest.fixture
async def chain(place: Place) -> Chain:
    disk = place.image("disk.qcow2")
    write(disk, 0x11)
    await place.define("one", disk)
    middle = await place.snapshot("one", "s1")
    write(middle, 0x22, MIB)
    active = await place.snapshot("one", "s2")
    write(active, 0x33, 2 * MIB)
    return Chain(place, disk, middle, active)


@pytest.mark.parametrize("to", ["base", "other", "nothing"])
async def test_the_active_image_is_rebased(chain: Chain, to: str) -> None:
    """It is named with what it was backed by; put back as the error says it is good again."""
    mine = content(chain.active)
    other = str(chain.place.image("x.qcow2"))
    chain.rebase(chain.active, {"base": str(chain.disk), "other": other, "nothing": ""}[to])
    match = rf"{chain.active} was backed by {chain.middle} and is now backed by"
    await chain.check_refused(match, deeper=to != "nothing")
    found = await chain.place.orch.fsck()
    assert [each.trouble for each in found] == [Trouble.BROKEN_DISK]
    chain.rebase(chain.active, chain.middle)
    assert await chain.place.orch.fsck() == ()
    await chain.place.orch.delete("one", "s2")
    assert content(await chain.place.active("one")) == mine


async def test_a_user_takes_a_rebased_image_for_his_own(chain: Chain) -> None:
    """What was copied by hand is no mistake: a definition that names the image says so."""
    tool("qemu-img", "rebase", "-f", "qcow2", "-b", "", chain.active)
    mine = content(chain.active)
    with pytest.raises(Refused, match="is now backed by nothing"):
        await chain.place.snapshot("one", "s3")
    await chain.place.define("one", chain.active)
    await chain.place.snapshot("one", "s3")
    assert content(await chain.place.active("one")) == mine


@pytest.mark.parametrize("how", ["commit", "rebase", "resize"])
async def test_a_frozen_image_is_changed(chain: Chain, how: str) -> None:
    """Nothing goes on from it, and no merge hides the damage under a new checksum."""
    if how == "commit":
        tool("qemu-img", "commit", "-q", "-f", "qcow2", chain.active)
    elif how == "rebase":
        chain.rebase(chain.middle, str(chain.place.image("other.qcow2")))
    else:
        tool("qemu-img", "resize", "-q", "-f", "qcow2", chain.middle, "16M")
    orch = chain.place.orch
    for verb in chain.verbs[:2]:
        with pytest.raises(Refused, match=r"damaged|instead of|is now backed by"):
            await verb()
    assert not (await orch.verify("one", "s2")).ok
    assert (await orch.verify("one", "s1")).ok
    if how != "rebase":
        await orch.delete("one", "s2")  # what is damaged goes, and what stays is whole
        assert (await orch.verify("one", "s1")).ok


@pytest.mark.parametrize("verb", ["delete", "flatten"])
async def test_no_merge_hides_damage(chain: Chain, verb: str) -> None:
    """An image that was written to is not merged, nor merged into, for a snapshot that stays."""
    write(chain.disk, 0x77)
    orch = chain.place.orch
    with pytest.raises(DamagedSnapshot, match=r"disk\.qcow2 is damaged: .*snaporch delete one s[12] --children"):
        await (orch.delete("one", "s1") if verb == "delete" else orch.flatten("one", "s2", depth=1))
    assert not (await orch.verify("one", "s2")).ok


async def test_other_names_are_no_change(chain: Chain) -> None:
    """An image that was moved, with a link in its place, is the same image."""
    moved = chain.place.directory / "moved.qcow2"
    Path(chain.middle).rename(moved)
    Path(chain.middle).symlink_to(moved)
    mine = content(chain.active)
    await chain.place.snapshot("one", "s3")
    assert content(await chain.place.active("one")) == mine


@pytest.mark.parametrize("when", ["open", "close"])
def test_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A checksum is of the file that its identity is of, or there is none."""
    path, other = tmp_path / "image", tmp_path / "other"
    path.write_bytes(b"first")
    other.write_bytes(b"later")
    act = getattr(os, when)

    def replaced(*arguments: int) -> int:
        done: int = act(*arguments)
        if other.exists():
            other.replace(path)
        return done

    monkeypatch.setattr(f"snaporch.drivers.local.filework.os.{when}", replaced)
    with pytest.raises(OperationFailed, match="changed while its checksum"):
        filework.checksum(str(path), sync=False)
