"""Tell the story of a domain with UEFI firmware in each of the QEMUs: `uefi [COUNT]`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import trio

from tests.conftest import VERSIONS
from tests.live.world import Qemu
from tests.uefi_story import tell


async def main(count: int) -> None:
    """Tell it so often; the first failure ends it."""
    for line in VERSIONS.read_text().splitlines():
        qemu = Qemu(*line.split())
        for number in range(count):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as directory:
                await tell(Path(directory).resolve(), qemu)
            print(f"QEMU {qemu.version}, {number + 1} of {count}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
