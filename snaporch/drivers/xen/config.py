"""Domains as libxl's JSON has them: from definitions, and changed for another start. Pure."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition
from snaporch.model.rfc import DeviceDisk

Config = dict[str, Any]

PV, PVH, HVM = "pv", "pvh", "hvm"
_UNUSED = {
    "machine": "",
    "emulator": "",
    "extra_args": (),
    "guest_agent": False,
    "serial": "",
    "accel": "auto",
    "genid": "none",
    "firmware": "bios",
}
# Nobody but us looks at these for a domain of ours, and we look when we need to: `xl`'s own watcher ends with a
# guest's first suspension, as it takes that for the guest's end.
_ON = ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset")


def from_definition(definition: DomainDefinition, disks: Iterable[DeviceDisk]) -> Config:
    """Return the configuration of a domain of ours; without name and uuid.

    Raises:
        Unsupported: the definition asks for what Xen, or this driver, has not.
    """
    for name, default in _UNUSED.items():
        if getattr(definition, name) != default:
            raise Unsupported(f"{definition.name}: `{name}` is not for Xen: leave it out of the definition")
    kind = definition.xen.kind if definition.xen is not None else PV
    if kind != PV:
        raise Unsupported(
            f'{definition.name}: no test shows that a checkpoint of a {kind} guest goes back; take `kind = "pv"`'
        )
    if not definition.kernel:
        raise Unsupported(f"{definition.name}: a {kind} guest needs a `kernel` in its definition")
    kib = definition.memory >> 10
    info = {
        "max_vcpus": definition.vcpus,
        "avail_vcpus": list(range(definition.vcpus)),
        "max_memkb": kib,
        "target_memkb": kib,
        "kernel": definition.kernel,
        "cmdline": definition.append,
        f"type.{kind}": {},
    }
    if definition.initrd:
        info["ramdisk"] = definition.initrd
    created = {"type": kind, "run_hotplug_scripts": "True"}
    devices = [_disk(disk) for disk in disks]
    return {"c_info": created, "b_info": info, "disks": devices} | dict.fromkeys(_ON, "destroy")


def _disk(disk: DeviceDisk) -> Config:
    return {
        "pdev_path": disk.path,
        "vdev": disk.target,
        "backend": "qdisk",
        "format": disk.format,
        "readwrite": int(not disk.readonly),
    }


def changed(
    config: Mapping[str, Any],
    *,
    name: str,
    uuid: str,
    disks: Iterable[DeviceDisk],
    beside: bool = False,
    isolated: bool = False,
) -> Config:
    """Return a configuration for another start: under a name and a uuid, on other images.

    Args:
        config: as it was.
        name: the domain's new name.
        uuid: its new uuid: destroying the second domain of a uuid takes what xenstore knows of the first.
        disks: the images to run on, in place of those that the configuration has.
        beside: another domain has the names of its network devices in dom0: let Xen name them.
        isolated: without network.
    """
    made = copy.deepcopy(dict(config))
    made["c_info"] |= {"name": name, "uuid": uuid}
    images = {disk.target: disk for disk in disks}
    for device in made.get("disks", ()):
        if (image := images.get(device["vdev"])) is not None:
            device["pdev_path"], device["format"] = image.path, image.format
    for nic in made.get("nics", ()) if beside else ():
        nic.pop("ifname", None)
    if isolated:
        made.pop("nics", None)
        made.pop("vtpms", None)
    return made


def interfaces(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the network devices are called in dom0, by their number, where that is chosen (``vifname``)."""
    nics = config.get("nics", ())
    return {str(nic.get("devid", number)): nic["ifname"] for number, nic in enumerate(nics) if nic.get("ifname")}


def name_of(config: Mapping[str, Any]) -> str:
    """Return a domain's name."""
    return str(config["c_info"]["name"])


def kind_of(config: Mapping[str, Any]) -> str:
    """Return ``pv``, ``pvh`` or ``hvm``."""
    return str(config["c_info"].get("type", HVM))


def disks_of(config: Mapping[str, Any]) -> tuple[DeviceDisk, ...]:
    """Return a domain's disks as libxl knows them."""
    return tuple(
        DeviceDisk(
            str(disk["vdev"]),
            str(disk.get("pdev_path") or ""),
            str(disk.get("format", "raw")),
            readonly=not disk.get("readwrite", 0),
        )
        for disk in config.get("disks", ())
    )


def blocker(config: Mapping[str, Any]) -> str:
    """Return why a domain cannot be snapshotted, or an empty string."""
    if kind_of(config) == HVM:
        return (
            "an HVM guest's devices are in a QEMU whose state libxl saves by itself, which this driver does not "
            "understand yet: only pv and pvh guests can be snapshotted"
        )
    for disk in config.get("disks", ()):
        if disk.get("is_cdrom", "False") in {True, "True"} and not disk.get("pdev_path"):
            continue
        if (backend := disk.get("backend", "phy")) != "qdisk":
            return (
                f"disk {disk['vdev']} is served by {backend}, not by qdisk: it cannot be switched to an overlay; "
                "give it `backendtype=qdisk` in the domain's configuration and start it anew"
            )
        if disk.get("format") not in {"qcow2", "raw"}:
            return f"disk {disk['vdev']} is in the format {disk.get('format')}: only qcow2 and raw are understood"
    for devices in ("pcidevs", "usbdevs", "rdms"):
        if config.get(devices):
            return f"it has {devices} passed through to it, whose state cannot be saved"
    return "" if config.get("disks") else "it has no disk"
