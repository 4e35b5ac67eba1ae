"""Who asks, and what they may do: tokens, hashed at rest; on a unix socket, the kernel's word on its other end."""

from __future__ import annotations

import enum
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import attrs
import cattrs

from snaporch.catalog.lock import release
from snaporch.drivers.local.durable import sync_parent
from snaporch.drivers.local.sockets import Peer
from snaporch.errors import Forbidden, InvalidInput, NotFound, TargetExists, Unauthenticated, Unavailable
from snaporch.model.convert import converter
from snaporch.model.names import check_name

TOKENS = "tokens.json"
PREFIX = "sno_"  # lets secret scanners find one that has leaked


class Role(enum.IntEnum):
    """What a caller may do; each may do what those before it may."""

    VIEWER = 1
    """Look."""
    OPERATOR = 2
    """Create, revert, delete, verify, start, stop."""
    ADMIN = 3
    """Define, attach, recover."""


def role_of(name: str) -> Role:
    """Return a role by its name.

    Raises:
        InvalidInput: there is none of that name.
    """
    try:
        return Role[name.upper()]
    except KeyError:
        raise InvalidInput(f"{name!r} is no role; there are viewer, operator and admin") from None


# Set by the listener for all that is done for a connection; None where that is not of a unix socket.
connected_peer: ContextVar[Peer | None] = ContextVar("snaporch_peer", default=None)


@attrs.frozen
class Caller:
    """Who asks.

    Attributes:
        name: for the audit log: ``token:ci`` or ``uid:1000``.
        role: what it may do; None: nothing, as it is unknown.
        local: it is at the other end of our unix socket.
        own: it is root, or the service's own user, there.
    """

    name: str
    role: Role | None
    local: bool = False
    own: bool = False

    def must_be(self, role: Role) -> None:
        """Refuse one who may not.

        Raises:
            Unauthenticated: nobody knows who it is.
            Forbidden: its role is not enough.
        """
        if self.role is None:
            raise Unauthenticated(
                "a token is needed: `snaporch token make NAME` makes one; send it as Authorization: Bearer TOKEN"
            )
        if self.role < role:
            raise Forbidden(f"{self.name} is a {self.role.name.lower()}; this takes a role of {role.name.lower()}")


@attrs.frozen
class Token:
    """A token as it is kept: its SHA-256, which is enough for 256 random bits."""

    name: str
    role: str
    digest: str
    made: float


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@attrs.define
class Tokens:
    """The tokens of a root, in one file that only its owner can read; read anew when it has changed."""

    path: Path
    _tokens: tuple[Token, ...] = ()
    _stamp: tuple[int, int, int] = (0, 0, 0)

    def all(self) -> tuple[Token, ...]:
        """Return all tokens."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._tokens, self._stamp = (), (0, 0, 0)
            return ()
        stamp = status.st_mtime_ns, status.st_ino, status.st_size
        if stamp != self._stamp:
            self._tokens, self._stamp = self._read(), stamp
        return self._tokens

    def make(self, name: str, role: Role) -> str:
        """Make a token and return its secret, which is told this once; durable on return.

        Raises:
            TargetExists: there is a token of that name.
        """
        check_name(name, "token")
        secret = PREFIX + secrets.token_urlsafe(32)
        with self._changing() as tokens:
            if name in {token.name for token in tokens}:
                raise TargetExists(f"there is a token {name!r} already; revoke it, or choose another name")
            tokens.append(Token(name, role.name.lower(), _digest(secret), time.time()))
        return secret

    def revoke(self, name: str) -> None:
        """Forget a token: from now on, whatever happens to the host, nobody gets in by it.

        Raises:
            NotFound: there is no token of that name.
        """
        with self._changing() as tokens:
            if name not in {token.name for token in tokens}:
                raise NotFound(f"there is no token {name!r}; `snaporch token list` lists all")
            tokens[:] = [token for token in tokens if token.name != name]

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """Yield the tokens to be changed; nobody else changes them meanwhile, in this process or another."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.path.parent.glob(f"{self.path.name}.*.new"):  # by one who was killed
                left.unlink(missing_ok=True)
            tokens = list(self._read())
            yield tokens
            self._write(tokens)
        finally:
            release(lock)

    def _read(self) -> tuple[Token, ...]:
        try:
            return converter.structure(json.loads(self.path.read_text()), tuple[Token, ...])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, cattrs.BaseValidationError, TypeError, KeyError) as error:
            raise Unavailable(f"{self.path} cannot be read: {error}; make it anew, or put back a copy") from None

    def _write(self, tokens: Sequence[Token]) -> None:
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with open(os.open(new, flags, 0o600), "w") as file:
                json.dump(converter.unstructure(tokens), file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_parent(str(self.path))

    def caller(self, secret: str) -> Caller | None:
        """Return who has a secret; compared in constant time."""
        digest = _digest(secret)
        found = [token for token in self.all() if secrets.compare_digest(token.digest, digest)]
        return Caller(f"token:{found[0].name}", role_of(found[0].role)) if found else None


def identify(peer: Peer | None, secret: str, tokens: Tokens, users: Mapping[str, str]) -> Caller:
    """Return who asks: a token comes first, then the other end of the unix socket.

    Args:
        peer: who is at the other end of a unix socket, or None.
        secret: the token that was sent, or nothing.
        tokens: those that there are.
        users: roles by user name, for users other than root and our own.
    """
    if secret:
        return tokens.caller(secret) or Caller("unknown token", None, local=peer is not None)
    if peer is None:
        return Caller("anonymous", None)
    name = f"uid:{peer.uid}"
    if peer.uid in {0, os.geteuid()}:
        return Caller(name, Role.ADMIN, local=True, own=True)
    role = users.get(_user_name(peer.uid))
    return Caller(name, role_of(role) if role else None, local=True)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
