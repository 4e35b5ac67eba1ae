"""The program ``snaporch``, and ``python -m snaporch``: the command line.

Its imports take a while. Who interrupts them gets a line, as later on, and no traceback.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the program on this process's arguments."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # under `nohup` or `&` it may be ignored
        signal.signal(signal.SIGINT, _too_early)
    from snaporch.cli import main as command_line  # noqa: PLC0415 - slow

    command_line()


def _too_early(number: int, frame: FrameType | None) -> None:
    """End the process: it has done nothing yet, and in the middle of an import an exception may be lost."""
    del number, frame
    with suppress(OSError):
        os.write(2, b"snaporch: interrupted; nothing was touched\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
