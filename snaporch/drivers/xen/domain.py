"""A running Xen domain as its driver knows it: what is in the `data` of its handle."""

from __future__ import annotations

from typing import Any

import attrs

from snaporch.model.domain import Handle


@attrs.frozen
class XenDomain:
    """A domain of this host.

    Attributes:
        uuid: tells it from every other, one of its name too; it keeps it when it reboots.
        domid: its id, which it does not keep when it reboots.
        name: its name.
        qemu: the process that serves its disks.
        directory: that it was launched with; empty where something else started it.
        config: of one that something else started: as libxl had it when it was attached to.
        interfaces: what its network devices are to be called in dom0 once they can, by their number; until then
            Xen has named them, as another domain may have these names.
    """

    uuid: str
    domid: int
    name: str
    qemu: int = 0
    directory: str = ""
    config: dict[str, Any] = attrs.field(factory=dict, eq=False)
    interfaces: dict[str, str] = attrs.field(factory=dict, eq=False)

    @classmethod
    def of(cls, handle: Handle) -> XenDomain:
        """Return the domain that a handle is of."""
        return cls(**handle.data)

    @property
    def word(self) -> str:
        """Return how programs of ours that know nothing of handles are told of it."""
        return f"{self.domid}:{self.uuid}"

    @property
    def socket(self) -> str:
        """The QMP socket of the QEMU that serves its disks: libxl's second one, the first is libxl's own."""
        return f"/run/xen/qmp-libxenstat-{self.domid}"

    def handle(self, driver: str) -> Handle:
        """Return its handle."""
        return Handle(driver, self.uuid, attrs.asdict(self))
