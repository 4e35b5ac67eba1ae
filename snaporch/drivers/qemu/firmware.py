"""UEFI firmware for QEMU: which there is, as the descriptors say that come with it, and its variable stores.

A descriptor (QEMU's docs/interop/firmware.json) names the program, which QEMU maps read-only, and a template of
the variable store, which belongs to one machine. Program and store are of one build and size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from snaporch.errors import Unsupported

DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
# What a machine would need more for it, or a user would not expect of it.
_NOT_PLAIN = frozenset({"requires-smm", "enrolled-keys", "amd-sev-snp", "intel-tdx"})


@attrs.frozen
class Firmware:
    """A firmware that can be used.

    Attributes:
        code: the program.
        template: of a variable store; raw.
        size: of a variable store, in bytes.
    """

    code: str
    template: str
    size: int


def firmwares(directories: Sequence[Path] = DIRECTORIES) -> Iterator[Firmware]:
    """Yield the UEFI firmware of this host for x86-64 without Secure Boot, in the order of the descriptors' names.

    A descriptor in an earlier directory stands for one of its name in a later one.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        with suppress(OSError):
            for path in directory.iterdir():
                if path.suffix == ".json":
                    found.setdefault(path.name, path)
    for _, path in sorted(found.items()):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a descriptor of another kind
            described = json.loads(path.read_text())
            if _plain(described):
                code, template = (
                    described["mapping"][part]["filename"] for part in ("executable", "nvram-template")
                )
                if os.access(code, os.R_OK):
                    yield Firmware(code, template, os.stat(template).st_size)


def _plain(described: dict[str, Any]) -> bool:
    mapping = described["mapping"]
    return (
        "uefi" in described["interface-types"]
        and mapping["device"] == "flash"
        and mapping.get("mode", "split") == "split"
        and mapping["executable"]["format"] == mapping["nvram-template"]["format"] == "raw"
        and any(target["architecture"] == "x86_64" for target in described["targets"])
        and not _NOT_PLAIN & {*described["features"]}
    )


def firmware_for(size: int | None = None, directories: Sequence[Path] = DIRECTORIES) -> Firmware:
    """Return the first firmware, or the first that has variable stores of a size.

    Raises:
        Unsupported: there is none.
    """
    there = list(firmwares(directories))
    if not there:
        raise Unsupported("there is no UEFI firmware for QEMU here (Debian: apt install ovmf)")
    for each in there:
        if size in {None, each.size}:
            return each
    sizes = ", ".join(f"{each.size:,}" for each in there)
    raise Unsupported(
        f"no UEFI firmware here has variable stores of {size:,} bytes: those that there are have {sizes}"
    )


def make_store(firmware: Firmware, path: str) -> None:
    """Make a variable store, durable on return.

    Raises:
        FileExistsError: there is a file; it is untouched.
    """
    with (
        open(firmware.template, "rb") as template,
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as store,
    ):
        try:
            shutil.copyfileobj(template, store)
            store.flush()
            os.fsync(store.fileno())
        except BaseException:
            os.unlink(path)
            raise
