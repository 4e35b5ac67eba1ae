"""A QEMU process as its driver knows it: what is in the `data` of its handle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from snaporch.drivers.local.process import LocalProcess
from snaporch.model.domain import Handle

CONTROL = "qmp.sock"
"""The name of the control socket of a QEMU that a driver has launched, in the directory of that launch."""


LOG = "qemu.log"
"""The name of the file that the QEMUs of a domain write their words to, in the domain's directory."""

_LAST_BYTES = 64 * 1024  # of it are looked at


def last_words(log: Path, start: int) -> str:
    """Return the last lines of a log from a position on, without the program's name."""
    with suppress(OSError):
        with log.open("rb") as file:  # which QEMU writes: it may be of any size
            file.seek(max(start, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = file.read(_LAST_BYTES).decode(errors="replace").strip().splitlines()
        return "; ".join(line.partition(": ")[2] or line for line in lines[-3:])
    return ""


@attrs.frozen
class QemuProcess:
    """A QEMU process of this host.

    Attributes:
        local: the process.
        socket: the QMP socket.
        attached: something else started it; `argv` is then the command line found at the socket's other end.
        argv: see `attached`; empty where snaporch started it.
        cwd: the directory that relative paths in `argv` are relative to.
        directory: that it was launched with; empty where something else started it.
        surroundings: of an attached one: beside its command line, what a process like it needs; JSON.
        renames: files that it has made under another name, and the names that they take with another one's place.
    """

    local: LocalProcess
    socket: str
    attached: bool = False
    argv: tuple[str, ...] = ()
    cwd: str = "/"
    directory: str = ""
    surroundings: dict[str, Any] = attrs.field(factory=dict)
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def listener(self) -> int | None:
        """The process that has to listen at `socket`: what something else started, itself; None: whoever does.

        The socket of one that snaporch has launched was opened by snaporch, in a directory of its own.
        """
        return self.local.pid if self.attached and not self.directory else None

    def said(self, since: int = -1) -> tuple[int, str]:
        """Return where its log ends now, and the last words in it from a position on; of one of ours only."""
        log = Path(self.directory).parent / LOG
        if not self.directory or not log.exists():
            return 0, ""
        return log.stat().st_size, last_words(log, since) if since >= 0 else ""

    @classmethod
    def of(cls, handle: Handle) -> QemuProcess:
        """Return the process that a handle is of."""
        data = handle.data
        socket = str(data["socket"])
        directory, name = os.path.split(socket)
        launched = name == CONTROL and Path(directory).name.startswith("run-")
        return cls(
            LocalProcess(data["pid"], data["started"], data.get("boot", "")),
            socket,
            data.get("attached", False),
            tuple(data.get("argv", ())),
            data.get("cwd", "/"),
            # Version 0.1 did not keep it.
            data.get("directory", directory if launched else ""),
            data.get("surroundings", {}),
            tuple((made, final) for made, final in data.get("renames", ())),
        )

    def handle(self, driver: str) -> Handle:
        """Return the handle of the process."""
        data = attrs.asdict(self.local) | attrs.asdict(self, filter=lambda field, _: field.name != "local")
        return Handle(
            driver,
            f"{self.local.pid}:{self.local.started}",
            data | {"argv": list(self.argv), "renames": list(self.renames)},
        )
