"""The memory stream of a domain of libvirt's: its file begins with libvirt's header, and libvirt restores it."""

from __future__ import annotations

from snaporch.drivers.base import StreamPlan
from snaporch.drivers.libvirt.save_image import header
from snaporch.drivers.qmp.stream import QemuStream, Source


class LibvirtStream(QemuStream):
    """See Stream."""

    def __init__(self, source: Source, plan: StreamPlan, *, xml: str, running: bool) -> None:
        super().__init__(source, plan)
        self._header = header(xml, running=running)

    def _prologue(self) -> bytes:
        return self._header

    async def _take_back(self) -> None:
        """Leave that to libvirt, which takes disk leases again only with its own resume."""
