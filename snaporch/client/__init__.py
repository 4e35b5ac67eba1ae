"""A client of the service, with the methods of `snaporch.Orchestrator`."""

from __future__ import annotations

from snaporch.client.client import Client, open_client

__all__ = ["Client", "open_client"]
