"""What a guard does for a Xen guest: the action of `snaporch.drivers.local.guard`.

    BINDING DOMAIN RIVAL VERDICT

BINDING is the path of `snaporch.drivers.xen.binding`; DOMAIN and RIVAL are ``DOMID:UUID``.

DOMAIN is suspended, or paused by snaporch. Where VERDICT (unless it is ``-``) says ``complete``, RIVAL has taken
its place, and nothing is done. Where it says ``end``, snaporch is about to end DOMAIN: nothing is done as long as
snaporch is only stopped. Else VERDICT is ``undone`` from now on, RIVAL (unless it is ``-``) is destroyed:
never two of them; and the guest runs. A guest that is down for another reason (it has rebooted, say) is left alone.

This is only posted for a guest that ran, so it never lets one run that its user had paused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

UNDONE = "undone"
END = "end"


def _state(libxl: Any, domain: str) -> dict[str, Any]:
    """Return how exactly this domain is; empty where it is gone."""
    domid, _, uuid = domain.partition(":")
    state = libxl.info(int(domid)) or {}
    return dict(state) if state.get("uuid") == uuid else {}


def act(arguments: Sequence[str], *, dead: bool, decide: Callable[..., str]) -> bool:
    """See the head of this file; False where there is nothing to do yet, and snaporch is only stopped."""
    path, domain, rival, verdict = arguments
    binding: Any = ModuleType("binding")
    SourceFileLoader("binding", path).exec_module(binding)
    try:
        libxl = binding.Libxl()
        state = _state(libxl, domain)
        suspended = state.get("shutdown") and state.get("shutdown_reason") == "suspend"
        if not suspended and not state.get("paused"):
            return dead or not state
        word = decide(verdict, UNDONE) if verdict != "-" else UNDONE
        if word == END and not dead:
            return False
        if word not in {UNDONE, END}:
            return True
        if rival != "-" and _state(libxl, rival):
            libxl.destroy(int(rival.partition(":")[0]))
        if word == END:
            decide(verdict, UNDONE, over=END)
        if suspended:
            libxl.resume(state["domid"])
        if state.get("paused"):
            libxl.unpause(state["domid"])
    except binding.LibxlError as error:
        raise OSError(str(error)) from error
    return True
