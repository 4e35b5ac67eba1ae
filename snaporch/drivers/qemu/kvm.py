"""Is KVM really there?

``/dev/kvm`` can be present and open, and QEMU start under it, while guests hang at once (nested virtualization
that is only half there). So the question is put to a guest: a boot sector that asks QEMU to exit.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import trio

PROBE_SECONDS = 3.0  # SeaBIOS and one boot sector take well under one
# mov dx, 0xf4; mov al, 0x2a; out dx, al; hlt; jmp $-1: QEMU's isa-debug-exit leaves with (0x2a << 1) | 1.
_CODE = bytes.fromhex("baf400 b02a ee f4 ebfd")
_SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"
_EXIT = 0x2A << 1 | 1


async def probe(emulator: str) -> str:
    """Return an empty string when a guest runs under KVM, else why not."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there or not accessible"
    with tempfile.NamedTemporaryFile(prefix="snaporch-kvm-") as image:
        image.write(_SECTOR)
        image.flush()
        command = [emulator, "-accel", "kvm", "-nodefaults", "-display", "none", "-m", "16M"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        command += ["-drive", f"file={image.name},format=raw,if=ide,snapshot=on"]
        try:
            with trio.fail_after(PROBE_SECONDS):
                done = await trio.run_process(
                    command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
                )
        except trio.TooSlowError:
            return f"/dev/kvm opens, but a guest under it did nothing for {PROBE_SECONDS:g} s"
    words = done.stderr.decode(errors="replace").strip().splitlines()
    why = words[-1] if words else f"the probe's QEMU ended with {done.returncode}"
    return "" if done.returncode == _EXIT else why


def _cache() -> Path:
    """Return where the answer is kept: it is the host's, not that of one root directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snaporch" / "kvm.json"


async def cached_probe(emulator: str) -> str:
    """As `probe`, asked once for each boot of this host and each emulator."""
    cache = _cache()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    key = f"{boot} {emulator}"
    if key not in known:
        known = {k: v for k, v in known.items() if k.startswith(boot)} | {key: await probe(emulator)}
        with suppress(OSError):  # no home to write to: asked again next time
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = cache.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(known))
            new.rename(cache)
    return known[key]
