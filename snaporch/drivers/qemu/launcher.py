"""Become a program in given surroundings: ``python launcher.py PROGRAM ARG…``.

The surroundings are in the environment, as JSON, where nobody else sees them: what `Surroundings` has. A program of
its own, without imports from the package, so that it starts quickly. What cannot be had is an error: the program is
then not run.
"""

import ctypes
import fcntl
import json
import os
import resource
import socket
import struct
import sys

_NEWNET, _NEWUSER = 0x40000000, 0x10000000
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
        os.chdir(wanted["cwd"])
    except OSError as error:
        sys.exit(f"launcher: it cannot be started as the first one was: {error}")
    os.execve(wanted["program"], arguments, environment)  # noqa: S606 - there is no shell


if __name__ == "__main__":
    main()
