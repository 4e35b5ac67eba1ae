"""What snaporch knows: domains, snapshots, operations, files, in SQLite under the root."""

from __future__ import annotations

from snaporch.catalog.lock import domain_lock
from snaporch.catalog.page import Page
from snaporch.catalog.store import Catalog, open_catalog
from snaporch.catalog.writing import Change, merged

__all__ = ["Catalog", "Change", "Page", "domain_lock", "merged", "open_catalog"]
