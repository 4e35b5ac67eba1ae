"""What a verb gets and what it gives: the global options, and an answer in both its forms."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import trio
from cyclopts import Parameter

from snaporch.catalog.known import Known, open_known
from snaporch.catalog.root import default_root
from snaporch.catalog.schema import CATALOG, can_be_written
from snaporch.cli.logs import log_of_a_command
from snaporch.errors import Busy
from snaporch.service.owner import owner

if TYPE_CHECKING:
    from snaporch.client import Client
    from snaporch.orchestrator import Orchestrator


@attrs.define
class Session:
    """The global options, and what an error has to name.

    Attributes:
        root: the root directory; None is the default one.
        as_json: standard output is to be one JSON document.
        verbose: how many times ``-v`` was given.
        subject: the domain and the snapshot that a create, revert or delete is about: an error's document names
            them, and says how the operation ended.
        only_reads: the verb changes nothing: its answer is all that there is of it.
        interrupted: what there is to say when a signal has ended the verb; for those without a subject.
    """

    root: Path | None = None
    as_json: bool = False
    verbose: int = 0
    subject: dict[str, Any] = attrs.field(factory=dict)
    only_reads: bool = False
    interrupted: str = "ended"

    def about(self, domains: Sequence[str], name: str) -> None:
        """Say what a create, revert or delete is about."""
        names = {"domain": domains[0]} if len(domains) == 1 else {"domains": list(domains)}
        self.subject = names | {"name": name}

    @asynccontextmanager
    async def open(self, *, recover: bool = True, make: bool = False) -> AsyncIterator[Orchestrator | Client]:
        """Open the orchestrator on the root, as `open_here`, or a client of the service that owns it."""
        if owner(self.root or default_root()) is not None:
            from snaporch.client import open_client  # noqa: PLC0415 - slow, and needed only here

            async with open_client(self.root) as client:
                yield client
            return
        async with self.open_here(recover=recover, make=make) as orchestrator:
            yield orchestrator

    @asynccontextmanager
    async def open_here(self, *, recover: bool = True, make: bool = False) -> AsyncIterator[Orchestrator]:
        """Open the orchestrator on the root, in this process: also beside a service, as both keep to the locks.

        Args:
            recover: see `open_orchestrator`.
            make: make a root that is not there; without, it is as one that has nothing in it, and none is made.
        """
        open_orchestrator = self._library()
        with self._place(make=make) as root:
            async with open_orchestrator(root, recover=recover, realtime=True) as orchestrator:
                yield orchestrator

    def _library(self) -> Callable[..., AbstractAsyncContextManager[Orchestrator]]:
        """Return `open_orchestrator`, and have what is logged from now on written as was asked for."""
        from snaporch.orchestrator import open_orchestrator  # noqa: PLC0415 - slow: not for what is only read

        log_of_a_command(self.verbose)
        return open_orchestrator

    @contextmanager
    def _place(self, *, make: bool) -> Iterator[Path | None]:
        """Give the root; where there is none and none is to be made, an empty directory for as long as it takes."""
        root = self.root or default_root()
        if make or os.path.lexists(root):
            yield self.root
            return
        makers = "`domain define`, `domain attach`, `import` and `serve`"
        self.say(f"snaporch: there is no root {root} yet: {makers} make it")
        with TemporaryDirectory(prefix="snaporch-") as nothing:
            yield Path(nothing)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Known | Client]:
        """Open for a verb that only wants what the catalog says; as `look`, without all that it has no use for.

        A service on the root is asked only where the catalog is closed to this user.
        """
        root = self.root or default_root()
        if os.access(root / CATALOG, os.R_OK) and not (owner(root) is None and await self._is_cut_short(root)):
            async with open_known(root) as known:
                yield known
        else:
            async with self.look() as orchestrator:
                yield orchestrator

    @asynccontextmanager
    async def look(self) -> AsyncIterator[Orchestrator | Client]:
        """Open for a verb that only reads: also where the root is read-only, or full, or somebody holds its lock.

        What was cut short is mended first, as by every verb, where that can be done at once.
        """
        root = self.root or default_root()
        if not os.path.lexists(root):
            async with self.open_here() as nothing:
                yield nothing
            return
        async with AsyncExitStack() as stack:
            orchestrator: Orchestrator | Client | None = None
            if owner(root) is not None or (await self._is_cut_short(root) and can_be_written(root / CATALOG)):
                with suppress(Busy):  # a snaporch of an earlier version is at work, and the catalog is still its
                    orchestrator = await stack.enter_async_context(self.open())
            if orchestrator is None:
                orchestrator = await stack.enter_async_context(self._library()(root, read_only=True))
            yield orchestrator

    async def _is_cut_short(self, root: Path) -> bool:
        async with open_known(root) as known:
            return bool(await known.operations(outcome="running"))

    def tell(self, text: str) -> None:
        """Print a line for people, to standard output: not with ``--json``."""
        with suppress(OSError):  # it is a remark: what cannot be seen is said by the answer
            print(text, flush=True)  # noqa: T201 - the command line's own words

    @property
    def asks(self) -> bool:
        """Whether somebody sits at the terminal who can be asked: not with ``--json``."""
        return not self.as_json and bool(sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty())

    async def agrees(self, question: str) -> bool:
        """Ask whoever sits at the terminal, yes or no; where nobody does, the answer is yes."""
        if not self.asks:
            return True
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201 - the command line's own words
        answer = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        return answer.strip().lower() in {"y", "yes"}

    def line(self, text: str) -> None:
        """Print a line of an answer that has no end, to standard output; raises as `print` does."""
        print(text, flush=True)  # noqa: T201 - the answer

    def say(self, text: str) -> None:
        """Print a line for people, to standard error, if that can be written to."""
        try:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 - the command line's own words
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is left to be flushed at the end goes there


Here = Annotated[Session, Parameter(parse=False)]
"""A verb's parameter that gets the session; it is no option."""


@attrs.frozen
class Answer:
    """What a verb prints.

    Attributes:
        document: anything that the converter makes JSON of.
        human: makes the same for people, as something that rich prints, given the module `snaporch.cli.human`:
            that is imported only when it is wanted, as rich is slow to import.
        status: the exit status; an answer may be bad news.
    """

    document: Any
    human: Callable[[ModuleType], Any]
    status: int = 0
