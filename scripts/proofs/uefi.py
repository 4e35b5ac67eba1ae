"""Tell the stories of domains with UEFI firmware, with a TPM, and with both, by each of the QEMUs: `uefi [N]`."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from snaporch.model.domain import TpmOptions
from tests import tpm_story, uefi_story
from tests.conftest import VERSIONS
from tests.live.world import Qemu

STORIES: dict[str, Callable[[Path, Qemu], Awaitable[None]]] = {
    "UEFI": uefi_story.tell,
    "UEFI and TPM": partial(uefi_story.tell, tpm=TpmOptions()),
    "TPM": tpm_story.tell,
}


async def main(count: int) -> None:
    """Tell them so often; the first failure ends it."""
    for line in VERSIONS.read_text().splitlines():
        qemu = Qemu(*line.split())
        for number, (name, tell) in itertools.product(range(count), STORIES.items()):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as directory:
                await tell(Path(directory).resolve(), qemu)
            took = f"{time.monotonic() - began:.0f} s"
            print(f"QEMU {qemu.version}, {name}, {number + 1} of {count}: {took}", flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
