"""What snaporch knows: domains, snapshots, operations, files, in SQLite under the root."""

from __future__ import annotations

from snaporch.catalog.lock import domain_lock
from snaporch.catalog.store import Catalog, open_catalog

__all__ = ["Catalog", "domain_lock", "open_catalog"]
