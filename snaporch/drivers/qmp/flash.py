"""The variable store of UEFI firmware: a flash device, whose memory QEMU streams without watching it.

A background snapshot write-protects no memory of ROM devices, and a precopy does not notice what the guest writes
to it. So a stream may hold variables of a later instant than everything else. The guest writes them to the image
too, which at a point is a fresh overlay: that tells whether it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from snaporch.drivers.qmp.protocol import QMP

CODE, STORE = "/system.flash0", "/system.flash1"
"""How the paths of the devices end that machines for x86 have."""
UNWATCHED = "QEMU misses what the guest writes to its firmware's variables during a precopy"


def stores(blocks: Iterable[dict[str, Any]]) -> set[str]:
    """Return the nodes that flash devices are on which the guest can write to; `blocks` is query-block's answer."""
    return {
        block["inserted"]["node-name"]
        for block in blocks
        if "node-name" in (block.get("inserted") or {})
        and not block["inserted"]["ro"]
        and (block.get("device", "").startswith("pflash") or "/system.flash" in block.get("qdev", ""))
    }


async def written(qmp: QMP, before: Collection[str]) -> bool:
    """Return whether a guest has written variables to an overlay that was not there before.

    Args:
        qmp: the machine.
        before: the nodes that `stores` had then.
    """
    fresh = stores(await qmp.execute("query-block")) - {*before}
    if not fresh:
        return False
    nodes = await qmp.execute("query-blockstats", {"query-nodes": True})
    return any(node.get("node-name") in fresh and node["stats"]["wr_highest_offset"] for node in nodes)
