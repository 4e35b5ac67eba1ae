"""What a machine needs from a connection to its QEMU: a QMP socket, or a manager that passes commands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from snaporch.drivers.qmp.subscription import Subscription
from snaporch.drivers.qmp.wire import Greeting


class QMP(Protocol):
    """A connection that speaks QMP; see `snaporch.drivers.qmp.client.QMPClient` for what each member promises."""

    check: Callable[[str, str, Any], None] | None
    """May refuse an answer: called with the label, the command and the value."""

    @property
    def label(self) -> str:
        """The domain's name, for errors."""

    @property
    def greeting(self) -> Greeting:
        """What QEMU has said of itself."""

    def fileno(self) -> int | None:
        """Return the connection's descriptor; None where it has none of its own."""

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
    ) -> Any:
        """Execute a command and return its answer."""

    def subscribe(self, *names: str) -> AbstractContextManager[Subscription]:
        """Receive the events of these names from the moment of entering on."""
