"""Tell random stories of several domains on shared images: `stories [COUNT] [STEPS] [FIRST SEED]`."""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import trio

from tests.image_stories import tell


async def main(count: int, steps: int, first: int) -> int:
    """Tell them one after the other; say which failed, and what was done how often."""
    failed, verbs = 0, Counter[str]()
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as directory:
            try:
                dice = random.Random(seed)  # noqa: S311 - a story, not a secret
                story = await tell(Path(directory).resolve(), dice, steps)
            except Exception as error:  # noqa: BLE001 - each story is told, whatever became of the last one
                failed += 1
                print(f"story {seed}: {type(error).__name__}: {error}", flush=True)
                continue
        verbs.update(_verb(line) for line in story.told)
    print(f"{count} stories of {steps} steps, {failed} failed; {dict(verbs)}")
    return int(bool(failed))


def _verb(told: str) -> str:
    """Return what a line of a story is counted as."""
    return (
        "refused" if told.startswith(" ") else "hard link" if told.startswith("hard") else told.split(maxsplit=1)[0]
    )


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(trio.run(main, *(numbers + [100, 25, 1][len(numbers) :])))
