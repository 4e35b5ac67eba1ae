"""The surroundings of a QEMU that something else started: whose it is, its program, its namespaces and limits."""

from __future__ import annotations

import os
import re
import resource
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from snaporch.drivers.local.as_user import User

_NAMESPACES = {"mnt": "sees other files", "net": "is in another network", "user": "has other users"}
_LIMITS = {
    "Max open files": "NOFILE",
    "Max locked memory": "MEMLOCK",
    "Max core file size": "CORE",
    "Max address space": "AS",
    "Max file size": "FSIZE",
    "Max stack size": "STACK",
}


@attrs.frozen
class Surroundings:
    """What a process like another one needs beside its command line.

    Attributes:
        program: the file that it runs.
        identity: device and inode of that.
        cwd: its working directory.
        environment: its variables.
        cgroup: its control group below the root of the hierarchy; empty: it is in ours, or in none.
        limits: soft and hard limits on resources, by name.
        affinity: the CPUs that it may run on.
        nice: its niceness.
        oom_score_adj: how soon it is ended when memory is short.
        umask: its file mode creation mask.
        uid: its user; -1: not known, and ours.
        gid: its group.
        groups: its further groups.
        no_new_privileges: no program that it runs gets more rights.
    """

    program: str
    identity: tuple[int, int]
    cwd: str
    environment: dict[str, str]
    cgroup: str
    limits: dict[str, tuple[int, int]]
    affinity: tuple[int, ...]
    nice: int
    oom_score_adj: str
    umask: int
    uid: int = -1
    gid: int = -1
    groups: tuple[int, ...] = ()
    no_new_privileges: bool = False

    @property
    def whose(self) -> tuple[tuple[int, int], int, int, tuple[int, ...]]:
        """What decides about its rights: its program and its ids."""
        return self.identity, self.uid, self.gid, self.groups


def look(pid: int) -> Surroundings:
    """Return the surroundings of a process.

    Raises:
        OSError: it is gone, or is none of ours.
    """
    place = Path(f"/proc/{pid}")
    words = (place / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    status = (place / "status").read_text()
    umask, user = re.search(r"^Umask:\s+(\d+)$", status, re.MULTILINE), _user_in(status)
    program = os.stat(place / "exe")
    return Surroundings(
        program=os.readlink(place / "exe").removesuffix(" (deleted)"),
        identity=(program.st_dev, program.st_ino),
        cwd=os.readlink(place / "cwd"),
        environment={name: value for name, equals, value in (word.partition("=") for word in words) if equals},
        cgroup=_cgroup(place),
        limits=_limits((place / "limits").read_text()),
        affinity=tuple(sorted(os.sched_getaffinity(pid))),
        nice=os.getpriority(os.PRIO_PROCESS, pid),
        oom_score_adj=(place / "oom_score_adj").read_text().strip(),
        umask=int(umask[1], 8) if umask else 0o022,
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        no_new_privileges=_field(status, "NoNewPrivs") == ["1"],
    )


def user_of(data: Mapping[str, Any]) -> User | None:
    """Return as whom a process ran whose surroundings are in a handle's data; None where that is our user."""
    if (uid := data.get("uid", -1)) in {-1, os.geteuid()}:
        return None
    return User(uid, data["gid"], tuple(data["groups"]))


def _field(status: str, name: str) -> list[str]:
    found = re.search(rf"^{name}:(.*)$", status, re.MULTILINE)
    return found[1].split() if found else []


def _user_in(status: str) -> User:
    groups = sorted(int(group) for group in _field(status, "Groups"))
    return User(int(_field(status, "Uid")[0]), int(_field(status, "Gid")[0]), tuple(groups))


def _cgroup(place: Path) -> str:
    ours = Path("/proc/self/cgroup").read_text()
    theirs = (place / "cgroup").read_text()
    found = re.search(r"^0::(/.*)$", theirs, re.MULTILINE)
    return found[1] if found and theirs != ours else ""


def _limits(text: str) -> dict[str, tuple[int, int]]:
    found = {}
    for line in text.splitlines():
        for words, name in _LIMITS.items():
            if line.startswith(words):
                soft, hard = (
                    resource.RLIM_INFINITY if word == "unlimited" else int(word)
                    for word in line[len(words) :].split()[:2]
                )
                found[name] = soft, hard
    return found


def foreign(pid: int) -> str:
    """Return why a process like this one cannot be started by us, from our place, or an empty string."""
    place = Path(f"/proc/{pid}")
    try:
        status = (place / "status").read_text()
        if why := _foreign_rights(status):
            return why
        for name in sorted(os.listdir("/proc/self/ns")):
            if os.readlink(place / "ns" / name) != os.readlink(f"/proc/self/ns/{name}"):
                kind = name.removesuffix("_for_children")
                return f"it is in another {kind} namespace" + (
                    f": it {_NAMESPACES[kind]}" if kind in _NAMESPACES else ""
                )
        if os.readlink(place / "root") != os.readlink("/proc/self/root"):
            return f"its root directory is {os.readlink(place / 'root')}"
        if _user_in(status).uid != os.geteuid():
            return ""  # its program is run as that user only
        return untrusted(os.readlink(place / "exe").removesuffix(" (deleted)"))
    except OSError as error:
        return f"it cannot be looked at: {error.strerror}"


def _foreign_rights(status: str) -> str:
    """Return why a process cannot have the rights that another one's /proc/PID/status tells of."""
    user, ours = _user_in(status), User.ours()
    for what in ("Uid", "Gid"):
        if len(set(_field(status, what))) > 1:
            return f"it runs with several {what.lower()}s at once ({' '.join(_field(status, what))})"
    if ours.uid == 0:
        kept = ("CapInh", "CapPrm", "CapEff", "CapAmb") if user.uid else ()
        if any(int(_field(status, name)[0], 16) for name in kept):
            return f"it runs as {user.name} with capabilities of its own, which another process would not get"
        return ""
    if user.uid != ours.uid:
        return f"it runs as {user.name}, and snaporch as {ours.name}: snaporch as root could"
    if {user.gid, *user.groups} != {ours.gid, *ours.groups} or user.gid != ours.gid:
        return "it runs with other groups than snaporch, which only root could give to another process"
    return ""


def untrusted(program: str) -> str:
    """Return why a program is not one that we run: somebody else could put another in its place."""
    ours = {0, os.geteuid()}
    for path in [Path(program), *Path(program).parents]:
        with suppress(FileNotFoundError):
            found = path.stat()
            writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
            if found.st_uid not in ours or (writable and os.geteuid() == 0):
                who = User(found.st_uid, -1, ()).name if found.st_uid not in ours else "others"
                return f"{who} could put another program in the place of {program} ({path})"
    return ""


def known(data: Mapping[str, Any]) -> Surroundings:
    """Return the surroundings that are in a handle's data."""
    lists = ("identity", "affinity", "groups")
    return Surroundings(**{**data, **{name: tuple(data[name]) for name in lists if name in data}})


def replaced(known: Surroundings) -> str:
    """Return what has become of the program since the process was started, or an empty string."""
    try:
        found = os.stat(known.program)
    except OSError:
        return f"its program {known.program} is gone"
    if (found.st_dev, found.st_ino) != known.identity:
        return f"its program {known.program} was replaced since it was started"
    return ""
