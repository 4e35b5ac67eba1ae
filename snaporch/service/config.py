"""The settings of a service: ``service.toml`` in its root, or another file; read again on SIGHUP."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from snaporch.errors import InvalidInput
from snaporch.model.convert import read_toml, structured
from snaporch.model.units import Size
from snaporch.service.roles import role_of

NAME = "service.toml"
_MOST_PORT = 65_535

_RANGES: dict[str, tuple[int, int]] = {
    "running": (1, 1_000),
    "queued": (0, 100_000),
    "streams": (1, 100_000),
    "connections": (1, 100_000),
    "per_peer": (1, 100_000),
    "per_user": (1, 100_000),
    "body_bytes": (1, 1 << 30),
    "stop_seconds": (0, 86_400),
    "min_free": (0, 1 << 60),
}


@attrs.frozen
class Config:
    """A service's configuration.

    Attributes:
        socket: the unix socket; empty: ``service.sock`` in the root.
        listen: ``ADDRESS:PORT`` for TCP; empty: none.
        certificate: a PEM file: TCP is TLS then. Without, TCP is for loopback addresses only.
        key: its key, a PEM file.
        directories: where paths in requests may lead, beside the root itself.
        owners: users, beside root and the service's own, who may own what such a path leads through: they could
            have it lead anywhere.
        plans: the directory of plans that have a schedule; empty: ``plans`` in the root. Looked for at the start.
        users: roles by user name, for the unix socket; root and the service's own user are admins. Where there are
            any, the socket and the way to it are open to others; what is in the root is not.
        group: of these others, the members of this group only; empty: all.
        running: operations that run at once.
        queued: operations that wait for that.
        streams: followers of events at once.
        connections: connections at once over TCP, and as many of other users over the unix socket; root and our own
            user have places of their own.
        per_peer: of these for one address, or one user.
        per_user: requests of one token, or one user, at once: those that wait and follow events, too.
        body_bytes: the largest request body.
        stop_seconds: on a stop, how long operations may take to come to where they can be left.
        webhooks: URLs to which alerts are posted; ``http`` on loopback addresses only.
        min_free: bytes that plans which the service runs leave free where the root is; a plan may say more.
        log: ``json`` or ``console``.
        realtime: take real-time priority, if that may be had: see `snaporch.engine.realtime`.
    """

    socket: str = ""
    listen: str = ""
    certificate: str = ""
    key: str = ""
    directories: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    plans: str = ""
    users: dict[str, str] = attrs.field(factory=dict)
    group: str = ""
    running: int = 8
    queued: int = 100
    streams: int = 500
    connections: int = 1_000
    per_peer: int = 500
    per_user: int = 250
    body_bytes: int = 1 << 20
    stop_seconds: float = 60.0
    webhooks: tuple[str, ...] = ()
    min_free: Size = Size(0)  # noqa: RUF009 - an immutable value
    log: str = "json"
    realtime: bool = True

    def __attrs_post_init__(self) -> None:
        for role in self.users.values():
            role_of(role)
        owner_ids(self.owners)
        _ = self.group_id
        if self.log not in {"json", "console"}:
            raise InvalidInput(f"log: {self.log!r} is neither json nor console")
        if bool(self.certificate) != bool(self.key):
            raise InvalidInput("certificate and key: give both, or neither")
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidInput(f"{name}: must be between {least:,} and {most:,}")
        for address in self.webhooks:
            _check_address(address)
        if any(not path.startswith("/") for path in self.directories):
            raise InvalidInput("directories: must be absolute paths")
        if self.listen and not self.certificate and not is_loopback(self.address[0]):
            raise InvalidInput(f"listen: {self.listen} is not a loopback address: it needs a certificate and a key")

    @property
    def group_id(self) -> int:
        """The id of `group`; -1: there is none.

        Raises:
            InvalidInput: there is no such group.
        """
        try:
            return grp.getgrnam(self.group).gr_gid if self.group else -1
        except KeyError as error:
            raise InvalidInput(f"group: {error.args[0]}") from None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`."""
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > _MOST_PORT:
            raise InvalidInput(f"listen: {self.listen!r} is not ADDRESS:PORT, with a port up to {_MOST_PORT}")
        return host.strip("[]"), int(port)


def _check_address(address: str) -> None:
    """Refuse what is no URL of a webhook.

    Raises:
        InvalidInput: it is none.
    """
    url = urlsplit(address)
    if not url.hostname or not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.hostname))):
        raise InvalidInput(f"webhooks: {address!r} is no https:// URL, nor an http:// one on a loopback address")


def owner_ids(names: Iterable[str]) -> frozenset[int]:
    """Return the ids of the users who may own what paths lead through: our own, and those that are named.

    Raises:
        InvalidInput: there is no such user.
    """
    try:
        return frozenset({os.geteuid(), *(pwd.getpwnam(name).pw_uid for name in names)})
    except KeyError as error:
        raise InvalidInput(f"owners: {error.args[0]}") from None


def is_loopback(host: str) -> bool:
    """Return whether an address is of this host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_config(path: Path, *, must_exist: bool = False, **overrides: Any) -> Config:
    """Read a configuration; a file that is not there says nothing.

    Raises:
        InvalidInput: it cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    data = read_toml(path) if must_exist or path.exists() else {}
    return structured(data | overrides, Config, str(path) if path.exists() else "the options")
