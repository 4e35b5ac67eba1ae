"""libvirt-python, imported when it is needed, and its event loop.

libvirt's event loop is registered once for the process and for ever, while there may be many Trio runs. So it is
libvirt's own loop, in one daemon thread; its callbacks reach a Trio run by `trio.lowlevel.TrioToken.run_sync_soon`.
"""

from __future__ import annotations

import threading
from typing import Any

from snaporch.errors import Unsupported

_once = threading.Lock()
_started = False


def load() -> tuple[Any, Any]:
    """Return the modules ``libvirt`` and ``libvirt_qemu``, their event loop running.

    Raises:
        Unsupported: they are not installed, or do not find the library.
    """
    global _started  # noqa: PLW0603 - the loop is the process's
    try:
        import libvirt  # noqa: PLC0415 - an extra
        import libvirt_qemu  # noqa: PLC0415
    except ImportError as error:
        raise Unsupported(
            f"libvirt's Python binding is not to be had here ({error}). Debian: apt install python3-libvirt, and a "
            "virtual environment made with --system-site-packages; or apt install libvirt-dev pkg-config gcc "
            "python3-dev, and pip install 'snaporch[libvirt]'"
        ) from None
    with _once:
        if not _started:
            libvirt.registerErrorHandler(lambda _context, _error: None, None)  # else each is printed as well
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=_run, args=(libvirt,), daemon=True, name="libvirt events").start()
            _started = True
    return libvirt, libvirt_qemu


def _run(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
