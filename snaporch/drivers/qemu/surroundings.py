"""The surroundings of a QEMU that something else started: whose it is, its program, its namespaces and limits."""

from __future__ import annotations

import os
import pwd
import re
import resource
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

_NAMESPACES = {"mnt": "sees other files", "net": "is in another network", "user": "has other users", "pid": ""}
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


def look(pid: int) -> Surroundings:
    """Return the surroundings of a process.

    Raises:
        OSError: it is gone, or is none of ours.
    """
    place = Path(f"/proc/{pid}")
    words = (place / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    status = (place / "status").read_text()
    umask = re.search(r"^Umask:\s+(\d+)$", status, re.MULTILINE)
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
    )


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
    """Return why a process like this one cannot be started with our rights, from our place, or an empty string."""
    place = Path(f"/proc/{pid}")
    try:
        owner = os.stat(place).st_uid
        ids = re.search(r"^Uid:\s+(\d+)\s+(\d+)", (place / "status").read_text(), re.MULTILINE)
        others = {int(ids[1]), int(ids[2])} if ids else {owner}
        if strangers := others - {os.geteuid()}:
            return f"it runs as {_user(strangers.pop())}, and snaporch as {_user(os.geteuid())}"
        for name, what in _NAMESPACES.items():
            if os.readlink(place / "ns" / name) != os.readlink(f"/proc/self/ns/{name}"):
                return f"it is in another {name} namespace" + (f": it {what}" if what else "")
        if os.readlink(place / "root") != os.readlink("/proc/self/root"):
            return f"its root directory is {os.readlink(place / 'root')}"
        return untrusted(os.readlink(place / "exe").removesuffix(" (deleted)"))
    except OSError as error:
        return f"it cannot be looked at: {error.strerror}"


def untrusted(program: str) -> str:
    """Return why a program is not one that we run: somebody else could put another in its place."""
    ours = {0, os.geteuid()}
    for path in [Path(program), *Path(program).parents]:
        with suppress(FileNotFoundError):
            found = path.stat()
            writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
            if found.st_uid not in ours or (writable and os.geteuid() == 0):
                who = _user(found.st_uid) if found.st_uid not in ours else "others"
                return f"{who} could put another program in the place of {program} ({path})"
    return ""


def _user(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return f"user {uid}"


def known(data: Mapping[str, Any]) -> Surroundings:
    """Return the surroundings that are in a handle's data."""
    return Surroundings(**{**data, "identity": tuple(data["identity"]), "affinity": tuple(data["affinity"])})


def replaced(known: Surroundings) -> str:
    """Return what has become of the program since the process was started, or an empty string."""
    try:
        found = os.stat(known.program)
    except OSError:
        return f"its program {known.program} is gone"
    if (found.st_dev, found.st_ino) != known.identity:
        return f"its program {known.program} was replaced since it was started"
    return ""
