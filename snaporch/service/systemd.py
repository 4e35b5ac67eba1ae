"""Messages between systemd and the service; without systemd they are left out. See sd_notify(3)."""

from __future__ import annotations

import os
import socket
import time

FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(*lines: str) -> None:
    """Tell systemd something; it does not matter if nobody hears it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        try:
            to.sendto("\n".join(lines).encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return


def reloading() -> None:
    """Say that a reload has begun; READY ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """Return how often systemd wants to hear from us, or None; twice as often is well."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() else None


def activated() -> list[socket.socket]:
    """Return the sockets that systemd listens on for us."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # they are not for what we start
    found = [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + count)]
    for each in found:
        each.set_inheritable(False)
    return found
