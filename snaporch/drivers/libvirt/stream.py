"""The memory stream of a domain of libvirt's: its file begins with libvirt's header, and libvirt restores it."""

from __future__ import annotations

from typing import Any

from snaporch.drivers.libvirt.save_image import header
from snaporch.drivers.qmp.stream import QemuStream


class LibvirtStream(QemuStream):
    """See Stream."""

    def __init__(self, *arguments: Any, xml: str, running: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header = header(xml, running=running)

    def _prologue(self) -> bytes:
        return self._header
