"""The command line of a *trial*: a throw-away QEMU that shows whether memory loads, and reaches nothing outside.

What one process alone can have (see `hostside`) has a *stand-in* there: an interface in a private network
namespace, character devices connected to nothing, memory that is not shared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from snaporch.drivers.qemu.hostside import Held, character_device
from snaporch.drivers.qemu.options import Keys, Option, Tree


def isolate(options: Iterable[Option]) -> Iterator[Option]:
    """Yield the options of a throw-away copy: all that reaches outside has a stand-in, the devices are the same.

    It is to be started in a network namespace of its own: in it ports and interfaces are as they are.
    """
    for option in options:
        yield from _isolated(option)


_CUT = frozenset(
    {"mon", "qmp", "qmp-pretty", "vnc", "spice", "display", "gdb", "s", "trace", "mem-path", "mem-prealloc"}
)


def _isolated(option: Option) -> tuple[Option, ...]:
    name, value = option.name, option.value or ""
    device = character_device(option)
    if name in _CUT or (name == "monitor" and value != "none"):
        return ()
    if name == "chardev" and device is not None:
        return (Option(name, Keys((("backend", "null"), ("id", device.get("id")))).text()),)
    if name in {"serial", "parallel", "debugcon"} and device is not None:
        return (Option(name, "none" if value == "none" else "null"),)
    new = _PRIVATE.get(name, lambda text: text)(value)
    return (option if new == value else Option(name, new),)


def _private_network(value: str) -> str:
    """Return a -netdev whose device finds what it found before, connected to nothing."""
    tree = Tree.parse(value, "type")
    kind, identity = tree.get("type"), tree.get("id")
    if kind in {"tap", "bridge"}:  # the guest's device knows what a tap interface can do
        kept = {
            key: value for key, value in tree.options.items() if key in {"vhost", "vnet_hdr", "queues", "sndbuf"}
        }
        if queues := tree.get("fds"):
            kept["queues"] = str(len(queues.split(":")))
        made = {"type": "tap", "id": identity, "script": "no", "downscript": "no"} | kept
        return Tree(made, json=tree.json).text()
    return Keys((("type", "user"), ("id", identity), ("restrict", "on"))).text()


def _private_nic(value: str) -> str:
    keys = Keys.parse(value, "type")
    kind = keys.get("type")
    if kind in {"none", "nic", "hubport"}:
        return value
    kept = [pair for pair in keys.pairs if pair[0] in {"id", "mac", "model", "netdev", "addr"}]
    if kind in {"tap", "bridge"}:
        return Keys((("type", "tap"), ("script", "no"), ("downscript", "no"), *kept)).text()
    return Keys((("type", "user"), ("restrict", "on"), *kept)).text()


def _private_memory(value: str) -> str:
    """Return an object without a file or huge pages under guest memory; a stream knows it by the same name."""
    tree = Tree.parse(value, "qom-type")
    if tree.get("qom-type") == "filter-dump":
        tree.options["file"] = os.devnull
        return tree.text()
    if tree.get("qom-type") not in {"memory-backend-file", "memory-backend-memfd"}:
        return value
    kept = {"id", "size", "host-nodes", "policy", "x-use-canonical-path-for-ramblock-id"}
    shared = {"share": tree.options["share"]} if "share" in tree.options else {}
    made = (
        {"qom-type": "memory-backend-memfd"} | {key: v for key, v in tree.options.items() if key in kept} | shared
    )
    return Tree(made, json=tree.json).text()


def _private_device(value: str) -> str:
    tree = Tree.parse(value, "driver")
    if not tree.get("driver").startswith("vhost-vsock"):
        return value
    address = 2**31 + os.getpid()
    tree.options["guest-cid"] = address if tree.json else str(address)
    return tree.text()


def _private_drive(value: str) -> str:
    keys = Keys.parse(value, "file")
    return keys.without(lambda key: key == "copy-on-read").text() if "copy-on-read" in keys else value


_PRIVATE = {
    "netdev": _private_network,
    "nic": _private_nic,
    "net": _private_nic,
    "object": _private_memory,
    "device": _private_device,
    "drive": _private_drive,
}


def wants_network(options: Iterable[Option]) -> bool:
    """Return whether a throw-away copy needs a network namespace of its own: it makes an interface."""
    kinds = (
        Tree.parse(each.value or "", "type").get("type")
        for each in options
        if each.name in {"netdev", "nic", "net"}
    )
    return "tap" in kinds


def stand_ins(held: Iterable[Held]) -> list[str]:
    """Return in words what a trial has in place of what a process holds: so much it does not prove."""
    return [f"{each.what}: {each.stand_in}" for each in held if each.stand_in]
