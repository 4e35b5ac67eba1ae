"""The images that a QEMU gives up at the end of a migration, and how it takes them back.

A migration ends with a guest that stands (run state postmigrate) and images that QEMU may not write to: another
QEMU has them now. After a save it is the same, though nobody else has them. So snaporch takes them back after each
save of its own; a guest that stands without its images was migrated by somebody else, and is gone from here.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress

from snaporch.drivers.qmp.protocol import QMP
from snaporch.errors import CommandRefused

STANDS = "postmigrate"


async def gave_up(qmp: QMP) -> bool:
    """Return whether a guest in the state postmigrate is without its images; a guest that has none never is."""
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    if any("active" in node for node in nodes):
        return not all(node.get("active", True) for node in nodes)
    rights = await _rights(qmp) if nodes else {}
    return bool(rights) and not any(rights.values())


async def take_back(qmp: QMP) -> None:
    """Let QEMU write again to the images of a guest that stands; done already, it does nothing.

    Raises:
        CommandRefused: another process has one of them.
    """
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    if any("active" in node for node in nodes):
        if not all(node.get("active", True) for node in nodes):
            await qmp.execute("blockdev-set-active", {"active": True})
    elif nodes and (await qmp.execute("query-status"))["status"] == STANDS:
        names = [node["node-name"] for node in nodes if node["drv"] == "qcow2"]
        await _export(qmp, dict.fromkeys([*await _rights(qmp), *names]))


async def _rights(qmp: QMP) -> dict[str, list[str]]:
    """Return what devices may do with the nodes that they are on, by name; for a QEMU before 10.0.

    There is no other sign. The command is one for debugging, and those QEMUs will not change any more.
    """
    graph = await qmp.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    devices = {node["id"] for node in graph["nodes"] if node["type"] == "block-backend"}
    return {names[edge["child"]]: edge["perm"] for edge in graph["edges"] if edge["parent"] in devices}


async def _export(qmp: QMP, nodes: Iterable[str]) -> None:
    """Before 10.0 only an NBD export activates a node of a guest that stands (docs/explanation/point.md)."""
    with (
        tempfile.TemporaryDirectory(prefix="snaporch-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(f"{directory}/nbd.sock")  # QEMU may run as another user, who gets at nothing there
        listener.listen(1)
        await qmp.execute("getfd", {"fdname": "snaporch-nbd"}, fds=(listener.fileno(),))
        address = {"type": "fd", "data": {"str": "snaporch-nbd"}}
        await qmp.execute("nbd-server-start", {"addr": address})
        for node in nodes:
            export = {"type": "nbd", "id": "snaporch", "node-name": node, "name": "snaporch"}
            with suppress(CommandRefused):  # a read-only node of another disk
                await qmp.execute("block-export-add", export)
                await qmp.execute("block-export-del", {"id": "snaporch", "mode": "hard"})
        await qmp.execute("nbd-server-stop")
