"""Who else looks after the domains of this host, by what they have left in its files."""

from __future__ import annotations

import re
from pathlib import Path

_HOSTS = {
    "etc/xensource-inventory": "XAPI",  # XenServer, XCP-ng
    "etc/qubes-release": "Qubes OS",
}
_LIBVIRT = "run/libvirt/libxl/{name}.xml"
_SETTINGS = ("etc/default/xendomains", "etc/sysconfig/xendomains")
_SAVED = re.compile(r"^\s*XENDOMAINS_SAVE=[\"']?([^\"'#\s]*)", re.MULTILINE)
_SAVE_DIRECTORY = "/var/lib/xen/save"


def owner_of(name: str, root: Path = Path("/")) -> str:
    """Return the program that manages a domain of this name and knows it by its uuid; empty: there is none."""
    for file, who in _HOSTS.items():
        if (root / file).exists():
            return who
    return "libvirt" if (root / _LIBVIRT.format(name=name)).exists() else ""


def owner_blocker(name: str, root: Path = Path("/")) -> str:
    """Return why a domain of this name is not to be taken charge of, or an empty string."""
    if not (who := owner_of(name, root)):
        return ""
    return (
        f"{who} manages {name} and knows it by its uuid, and a revert would give it a new one: "
        f"take its snapshots by {who}'s own tools"
    )


def saved_file(name: str, root: Path = Path("/")) -> Path | None:
    """Return the file in which `xendomains` has saved a domain when its host shut down, if there is one."""
    directory = _SAVE_DIRECTORY
    for settings in _SETTINGS:
        if (path := root / settings).is_file() and (found := _SAVED.findall(path.read_text(errors="replace"))):
            directory = found[-1]
    if not directory:  # it is told to save none
        return None
    path = root / directory.lstrip("/") / name
    return path if path.is_file() else None


def saved_blocker(name: str, root: Path = Path("/")) -> str:
    """Return why a domain that does not run must be left alone: its images belong to memory that was saved."""
    if (path := saved_file(name, root)) is None:
        return ""
    return (
        f"xendomains has saved the memory of {name} in {path}, and its disks belong to that: "
        f"`xl restore {path}` goes on from it, `rm {path}` gives that memory up"
    )
