"""The index of a memory file: made of a stream in pieces of any size; what is not understood is not guessed."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from snaporch.drivers.qmp import index

SECTION = 7
BLOCKS = {"pc.ram": 300, "pc.bios": 5}
DEVICES = b"\x04 what devices say \x00\x06\x00\x00\x00\x03abc"
DESCRIPTION = b'{"page_size": 4096, "devices": []}'


def end(section: int = SECTION) -> bytes:
    return struct.pack(">BI", 0x7E, section)


def part(*records: bytes, kind: int = 2) -> bytes:
    return struct.pack(">BI", kind, SECTION) + b"".join(records) + struct.pack(">Q", 0x10) + end()


def page(block: str, number: int, contents: bytes, *, same: bool) -> bytes:
    flags = (0x20 if same else 0) | (0x08 if contents else 0x02)
    name = b"" if same else bytes([len(block)]) + block.encode()
    return struct.pack(">Q", number << 12 | flags) + name + (contents or b"\0")


def stream(*parts: bytes, devices: bytes = DEVICES, description: bytes = DESCRIPTION) -> bytes:
    blocks = b"".join(bytes([len(n)]) + n.encode() + struct.pack(">Q", size << 12) for n, size in BLOCKS.items())
    return b"".join(
        [
            b"QEVM\0\0\0\x03\x07\0\0\0\x03q35",
            struct.pack(">BI", 1, SECTION) + b"\x03ram" + bytes(8),
            struct.pack(">Q", sum(BLOCKS.values()) << 12 | 4) + blocks + struct.pack(">Q", 0x10) + end(),
            *parts,
            devices,
            b"\x00\x06" + struct.pack(">I", len(description)) + description,
        ]
    )


def everything(seed: int) -> tuple[list[bytes], dict[tuple[str, int], bytes]]:
    """Return parts with all pages, some of them twice, in another order than they are in; and what they hold."""
    chance, held, parts, last = random.Random(seed), dict[tuple[str, int], bytes](), [], ""  # noqa: S311
    order = [(block, number) for block, size in BLOCKS.items() for number in range(size)]
    again = chance.sample(order, 20)
    middle = chance.randrange(len(order))
    order = order[middle:] + order[:middle] + again
    while order:
        records = []
        for block, number in order[: chance.randrange(1, 200)]:
            contents = chance.randbytes(index.PAGE) if number // 50 % 2 or chance.random() < 0.1 else b""
            records.append(page(block, number, contents, same=block == last))
            held[block, number], last = contents, block
        order = order[len(records) :]
        parts.append(part(*records))
    return [*parts, struct.pack(">BHH", 8, 11, 0), part(kind=3)], held


def made(data: bytes, sizes: Callable[[], int]) -> index.Index:
    builder = index.Builder()
    at = 0
    while at < len(data):
        size = sizes()
        builder.feed(memoryview(data)[at : at + size])
        at += size
    return builder.finish("xxh3-128:0")


@pytest.mark.parametrize("seed", range(4))
def test_it_says_where_every_page_is(seed: int, tmp_path: Path) -> None:
    """Of a page that is there twice the last one; in pieces of any size; also when kept."""
    parts, held = everything(seed)
    data, chance = stream(*parts), random.Random(seed)  # noqa: S311
    sizes: list[Callable[[], int]] = [lambda: len(data), lambda: chance.randrange(1, 40), lambda: index.BLOCK]
    for each in sizes:
        found = made(data, each)
        index.save(found, str(tmp_path / "index"))
        found = index.load(str(tmp_path / "index"))
        for ram in found.rams:
            for number, (kind, offset) in enumerate(zip(ram.kinds, ram.offsets, strict=True)):
                contents = held[ram.name, number]
                assert kind == (index.FULL if contents else index.ZERO)
                assert not contents or data[offset : offset + index.PAGE] == contents
        assert data[slice(*found.devices)] == DEVICES
        assert data[slice(*found.head)] == data[: found.head[1]]
        assert data[slice(*found.setup)].endswith(end())
        assert found.size == len(data)
        os.unlink(tmp_path / "index")


WHOLE, _ = everything(0)
WRONG = {
    "no stream of QEMU's": b"LibvirtQemudSave" + bytes(100),
    "dirty-bitmap is saved": stream(*WHOLE).replace(b"\x03ram", b"\x0cdirty-bitmap", 1),
    "does not have all pages of pc.bios": stream(part(*(page("pc.ram", n, b"", same=n > 0) for n in range(300)))),
    "saved in another way (0x80)": stream(*WHOLE, part(struct.pack(">Q", 0x80) + b"\x06pc.ram")),
    "saved in another way (0x128)": stream(*WHOLE, part(struct.pack(">Q", 0x128))),
    "filled with something else": stream(*WHOLE, part(struct.pack(">Q", 0x22) + b"\x01")),
    "is not what QEMU writes": stream(*WHOLE, part(page("pc.ram", 300, b"", same=False))),
    "it has a command (2)": stream(*WHOLE, struct.pack(">BHH", 8, 2, 0)),
    "does not end where it should": stream(*WHOLE, part()[:-1] + b"\0"),
    "page by page (section 2)": stream(*WHOLE, struct.pack(">BI", 2, SECTION + 1)),
    "its blocks of RAM have more": stream(*WHOLE).replace(
        struct.pack(">Q", 5 << 12), struct.pack(">QQ", 5 << 12, 4096)
    ),
    "description of its devices": stream(*WHOLE, description=b"none"),
    "the stream has no end": stream(*WHOLE)[: len(stream(*WHOLE)) // 2],
    "too large for an index": stream()
    .replace(struct.pack(">Q", sum(BLOCKS.values()) << 12 | 4), struct.pack(">Q", 2**63 | 4))
    .replace(struct.pack(">Q", 300 << 12), struct.pack(">Q", 2**62)),
}


@pytest.mark.parametrize("words", list(WRONG))
def test_what_is_not_understood_is_said(words: str, tmp_path: Path) -> None:
    """There is no index then, and the reason is in words."""
    path = tmp_path / "memory"
    path.write_bytes(WRONG[words])
    with pytest.raises(index.NotUnderstood) as raised:
        index.build(str(path), f"xxh3-128:{xxhash.xxh3_128_hexdigest(WRONG[words])}")
    assert words in str(raised.value)


def test_it_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    """One that is cut short, or has another bit, is none; an existing file is not written over."""
    path = str(tmp_path / "index")
    index.save(made(stream(*WHOLE), lambda: index.BLOCK), path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        index.save(made(stream(*WHOLE), lambda: index.BLOCK), path)
    good = Path(path).read_bytes()
    for bad in (good[:-1], good[:500] + bytes([good[500] ^ 1]) + good[501:], b"", b"SPINDEX2" + good[8:]):
        Path(path).write_bytes(bad)
        with pytest.raises(index.NotUnderstood):
            index.load(path)
