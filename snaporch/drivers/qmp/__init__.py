"""QMP, the protocol that controls QEMU.

`open_qmp` connects to a QEMU, `QMPClient` executes commands and hands out events.
`snaporch.drivers.qmp.wire` is the same without I/O.
"""

from __future__ import annotations

from snaporch.drivers.qmp.calls import Statistics
from snaporch.drivers.qmp.client import QMPClient, open_qmp, open_qmp_stream
from snaporch.drivers.qmp.subscription import EVENT_BUFFER, Subscription
from snaporch.drivers.qmp.wire import LINE_LIMIT, Decoder, Event, Failure, Greeting, Message, Reply, encode

__all__ = [
    "EVENT_BUFFER",
    "LINE_LIMIT",
    "Decoder",
    "Event",
    "Failure",
    "Greeting",
    "Message",
    "QMPClient",
    "Reply",
    "Statistics",
    "Subscription",
    "encode",
    "open_qmp",
    "open_qmp_stream",
]
