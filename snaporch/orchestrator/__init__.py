"""The façade: the methods that library, command line and service all use, most of them one line into `operations`.

`looking`, `domains`, `snapshots`, `cloning`, `archives` and `upkeep` each have a part of them.
"""

from __future__ import annotations

from snaporch.orchestrator.orchestrator import Orchestrator, catalog_of, default_root, open_orchestrator

__all__ = ["Orchestrator", "catalog_of", "default_root", "open_orchestrator"]
