"""snaporch: live whole-system snapshots of virtual machines, orchestrated with structured concurrency.

    async with snaporch.open_orchestrator("/srv/snapshots") as orch:
        await orch.create("web1", DomainSnapshot("before-upgrade"), CreateFlag.LIVE)
        ...
        await orch.revert("web1", "before-upgrade")

All public names are here; each is described where it is defined.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snaporch.facade import *  # noqa: F403
    from snaporch.facade import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Give a name of the facade, which is imported with the first: what needs but a part of it starts sooner."""
    facade = import_module("snaporch.facade")
    return globals()[name] if name in globals() else getattr(facade, name)


def __dir__() -> list[str]:
    """Return the names of the facade."""
    return [*__getattr__("__all__")]
