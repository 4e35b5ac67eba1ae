"""qemu-img: how it is run, and how an image is named to it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from snaporch.drivers.base import Progress
from snaporch.drivers.local.trace import is_block_device
from snaporch.errors import OperationFailed, Refused

FILENAME = "file.file.filename="
_PROGRESS = re.compile(rb"\((\d+)\.(\d\d)/100%\)")

_MOST_BYTES = 64 * 2**20  # of its words: where it runs as another user, they may be anything
_LAST_BYTES = 64 * 1024


def protocol(path: str) -> str:
    """Return the driver by which QEMU opens what an image is in."""
    return "host_device" if is_block_device(path) else "file"


def throttled(path: str) -> str:
    """Return a qcow2 as ``--image-opts`` has it, its file in the throttle group ``limit``."""
    throttle = f"file.driver=throttle,file.throttle-group=limit,file.file.driver={protocol(path)}"
    return f"driver=qcow2,{throttle},{FILENAME}{path.replace(',', ',,')}"


@asynccontextmanager
async def _ended(process: trio.Process) -> AsyncIterator[None]:
    """Yield; whatever comes out of the body, the process is then gone."""
    try:
        yield
    except BaseException:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        raise


async def _read(stream: trio.abc.ReceiveStream | None, said: bytearray) -> None:
    """Read all that comes, and keep so much of it as an answer may have."""
    if stream is not None:
        async with stream:
            async for chunk in stream:
                said.extend(chunk[: _MOST_BYTES - len(said)])


@attrs.define
class QemuImg:
    """The part of a storage that runs qemu-img.

    Attributes:
        qemu_img: the program.
    """

    qemu_img: str = "qemu-img"

    @property
    def _rights(self) -> dict[str, Any]:
        """With which rights qemu-img is run, as options of `subprocess.Popen`."""
        return {}

    async def _qemu_img(self, *arguments: str, good: tuple[int, ...] = (0,)) -> bytes:
        command, said, words = [self.qemu_img, *arguments], bytearray(), bytearray()
        pipe = subprocess.PIPE
        try:
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, **self._rights
            )
        except FileNotFoundError:
            raise Refused(f"{self.qemu_img} is not installed (Debian: apt install qemu-utils)") from None
        async with _ended(process), trio.open_nursery() as nursery:
            nursery.start_soon(_read, process.stdout, said)
            nursery.start_soon(_read, process.stderr, words)
            await process.wait()
        if process.returncode not in good:
            last = words.decode(errors="replace").strip().splitlines()
            raise OperationFailed(last[-1] if last else f"qemu-img {arguments[0]}: exit {process.returncode}")
        return bytes(said)

    async def _watched(self, progress: Progress, *arguments: str) -> None:
        """Run a command of qemu-img that says how far it is, in hundredths of a percent."""
        command, said = [self.qemu_img, arguments[0], "-p", *arguments[1:]], bytearray()
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self._rights
        )
        async with _ended(process):
            if process.stdout is not None:
                async with process.stdout as output:
                    async for chunk in output:
                        said.extend(chunk)
                        del said[:-_LAST_BYTES]
                        if found := _PROGRESS.findall(chunk):
                            progress(int(b"".join(found[-1])), 100_00)
            await process.wait()
        if process.returncode:
            said = bytearray(_PROGRESS.sub(b"", said).strip())
            words = said.decode(errors="replace").splitlines()
            raise OperationFailed(words[-1] if words else f"qemu-img {arguments[0]}: exit {process.returncode}")
