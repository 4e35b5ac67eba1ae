"""``snaporch serve`` and ``snaporch token``: the service, and who may use it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import trio
from cyclopts import App

from snaporch.catalog.root import default_root
from snaporch.cli.logs import log_of_a_service
from snaporch.cli.session import Answer, Here, Session
from snaporch.errors import InvalidInput

if TYPE_CHECKING:
    from snaporch.service.roles import Tokens

app = App(name="token", help="Make, list and revoke the tokens by which clients come in over TCP.")


async def serve(
    *,
    config: Path | None = None,
    listen: str | None = None,
    log: Literal["json", "console"] | None = None,
    session: Here,
) -> Answer:
    """Own the root and serve it: HTTP over a unix socket, and over TCP when asked.

    SIGTERM ends it: operations come to where they can be left, and the next start goes on with them. SIGHUP reads
    the configuration anew.

    Parameters
    ----------
    config
        The configuration; by default service.toml in the root, if it is there.
    listen
        ADDRESS:PORT for TCP, in place of the configuration's.
    log
        How to log, in place of the configuration's.
    """
    from snaporch.service import server  # noqa: PLC0415
    from snaporch.service.config import NAME  # noqa: PLC0415 - other verbs do without it, and start sooner

    root = (session.root or default_root()).absolute()
    overrides = {name: value for name, value in (("listen", listen), ("log", log)) if value is not None}
    settings = server.Settings(config or root / NAME, must_exist=config is not None, overrides=dict(overrides))
    log_of_a_service(settings.load().log, session.verbose)
    session.interrupted = "the service had not begun yet"
    await server.serve(root, settings)
    return Answer({"stopped": True}, lambda human: human.line("stopped"))


def _tokens(session: Session) -> Tokens:
    from snaporch.service.roles import TOKENS, Tokens  # noqa: PLC0415

    root = session.root or default_root()
    if not root.is_dir():
        raise InvalidInput(f"there is no root {root} yet; define a domain in it, or start a service")
    return Tokens(root / TOKENS)


@app.command
async def make(name: str, /, *, role: Literal["viewer", "operator", "admin"] = "viewer", session: Here) -> Answer:
    """Make a token and print its secret, which is kept nowhere: only its hash is.

    Parameters
    ----------
    name
        Its name, for the audit log and to revoke it.
    role
        What its holder may do: look; also create, revert, delete, start and stop; also define and attach.
    """
    from snaporch.service.roles import role_of  # noqa: PLC0415

    secret = await trio.to_thread.run_sync(_tokens(session).make, name, role_of(role))
    return Answer({"name": name, "role": role, "token": secret}, lambda human: human.line(secret))


@app.command(name="list")
async def list_(*, session: Here) -> Answer:
    """List the tokens; a running service knows at once what is made or revoked."""
    found = await trio.to_thread.run_sync(_tokens(session).all)
    documents = [{"name": each.name, "role": each.role, "made": each.made} for each in found]
    day = "%Y-%m-%d %H:%M"
    lines = [f"{each.name}: {each.role}, made {time.strftime(day, time.localtime(each.made))}" for each in found]
    return Answer(documents, lambda human: human.lines(lines or ["no tokens"]))


@app.command
async def revoke(name: str, /, *, session: Here) -> Answer:
    """Revoke a token: from now on nobody gets in by it."""
    await trio.to_thread.run_sync(_tokens(session).revoke, name)
    return Answer({"name": name, "revoked": True}, lambda human: human.line(f"{name} is revoked"))
