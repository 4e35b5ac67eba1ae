"""What a person does in front of a machine, by QMP: pressing its reset button, looking at its screen."""

from __future__ import annotations

import os

import trio

from snaporch.drivers.base import Resets, Screens
from snaporch.drivers.qmp.protocol import QMP
from snaporch.errors import CommandRefused, HypervisorError, Unsupported

RESET_SECONDS = 30.0  # for a QEMU that is busy
PICTURE_BYTES = 64 * 2**20  # far more than a PNG of any screen


class Console(Resets, Screens):
    """See Resets and Screens."""

    qmp: QMP

    async def reset(self) -> None:
        """See Resets: ``system_reset``, which QEMU does a moment after its answer."""
        with self.qmp.subscribe("RESET") as resets:
            await self.qmp.execute("system_reset")
            with trio.move_on_after(RESET_SECONDS):
                await resets.receive()
                return
        raise HypervisorError(f"{self.qmp.label}: QEMU has not reset the guest within {RESET_SECONDS:g} s")

    async def screenshot(self) -> bytes:
        """See Screens: ``screendump`` into a file of ours that has no name."""
        picture = os.memfd_create("screen", os.MFD_CLOEXEC)
        try:
            await self._dump(picture)
            if os.fstat(picture).st_size > PICTURE_BYTES:
                raise HypervisorError(
                    f"{self.qmp.label}: QEMU has written a picture of {os.fstat(picture).st_size:,} bytes"
                )
            return os.pread(picture, PICTURE_BYTES, 0)
        finally:
            os.close(picture)

    async def _dump(self, picture: int) -> None:
        # QEMU takes a descriptor of a set only where it was opened as it would open the file.
        writer = os.open(f"/proc/self/fd/{picture}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            passed = (await self.qmp.execute("add-fd", {}, fds=(writer,)))["fdset-id"]
        finally:
            os.close(writer)
        try:
            await self.qmp.execute("screendump", {"filename": f"/dev/fdset/{passed}", "format": "png"})
        except CommandRefused as error:
            raise Unsupported(
                f"{self.qmp.label} has no screen to take a picture of: {error.description}"
            ) from error
        finally:
            with trio.CancelScope(shield=True):
                await self.qmp.execute("remove-fd", {"fdset-id": passed})
