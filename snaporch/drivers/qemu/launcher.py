"""Become a program in given surroundings: ``python launcher.py PROGRAM ARG…``.

The surroundings are in the environment, as JSON, where nobody else sees them: what `Surroundings` has. A program of
its own, without imports from the package, so that it starts quickly. What cannot be had is an error: the program is
then not run.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import socket
import struct
import sys

_NEWNET, _NEWUSER = 0x40000000, 0x10000000
_SET_NO_NEW_PRIVILEGES = 38
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def _private_network() -> None:
    """Leave the host's network, for one with a loopback interface; who is not root does so in a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_NEWNET):
        if libc.unshare(_NEWNET | _NEWUSER):
            raise OSError(ctypes.get_errno(), "no network namespace of its own can be had")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _enter(wanted: dict) -> None:  # type: ignore[type-arg]  # what came as JSON
    cgroup = f"/sys/fs/cgroup{wanted['cgroup']}/cgroup.procs"
    if wanted["cgroup"] and os.path.exists(cgroup):  # one that is gone was made for that process alone
        with open(cgroup, "w") as file:
            file.write(str(os.getpid()))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(wanted["oom_score_adj"])
    for name, limits in wanted["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(limits))
    os.sched_setaffinity(0, wanted["affinity"])
    os.setpriority(os.PRIO_PROCESS, 0, wanted["nice"])
    os.umask(wanted["umask"])


def _become(wanted: dict) -> None:  # type: ignore[type-arg]  # as above
    """Take the ids and groups of the first process, which only root can; nothing else that is open goes along."""
    if wanted.get("no_new_privileges"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "new privileges cannot be ruled out")
    if wanted.get("uid", -1) < 0 or os.geteuid() != 0:
        return
    kept = {0, 1, 2, *wanted["fds"]}
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in kept:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(number)
    uid, gid = wanted["uid"], wanted["gid"]
    os.setgroups(wanted["groups"])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (gid, gid, gid):
        raise PermissionError("its user cannot be had")


def main() -> None:
    """See the module."""
    wanted, arguments = json.loads(os.environ.pop("SNAPORCH_SURROUNDINGS")), sys.argv[1:]
    environment = dict(os.environ)
    try:
        if wanted.get("private_network"):
            _private_network()
        if "limits" in wanted:
            _enter(wanted)
            environment = wanted["environment"]
        _become(wanted)  # from here on as the first one: also to go to its directory
        os.chdir(wanted["cwd"])
    except OSError as error:
        sys.exit(f"launcher: it cannot be started as the first one was: {error}")
    os.execve(wanted["program"], arguments, environment)  # noqa: S606 - there is no shell


if __name__ == "__main__":
    main()
