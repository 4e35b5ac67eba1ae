"""Is KVM really there?

``/dev/kvm`` can be present and open, and QEMU start under it, while guests hang at once, or at the first interrupt
in protected mode (nested virtualization that is only half there). So the question is put to a guest: a boot
sector that does what every operating system does first (`probe.S`) and then asks QEMU to exit.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import trio

from snaporch.drivers.local.process import boot

PROBE_SECONDS = 3.0  # SeaBIOS and one boot sector take well under one, also under TCG
CODE = bytes.fromhex(  # of probe.S, assembled
    """
    fa31c08ed88ec08ed0bc007cfcbf0010b90028f3ab660f0116207d0f20c00c010f22c0ea287c080066b810008ed88ec08ed0
    bc007c0000c70580110000a07c0800c70584110000008e00000f011d267d0000cd30c7050030000003400000c70500400000
    03500000c7050050000083000000b8003000000f22d80f20e00c200f22e0b9800000c00f3280cc010f300f20c00d00000080
    0f22c0eaa17c00001800cfc7042500130000fe7c1800c7042504130000008e0000c7042580100000f17c1800c70425841000
    00008e00000f011c25267d0000cd30b0fee621fbf4833c25006000000272f566baf400b02aeef4ebfdff04250060000050b0
    20e6205848cf0000000000000000ffff0000009bcf00ffff00000093cf00ffff0000009baf001f00007d0000ff0f00100000
    00000000
    """
)
_SECTOR = CODE.ljust(510, b"\0") + b"\x55\xaa"
_EXIT = 0x2A << 1 | 1
_VERSION = 2  # of the question


async def probe(emulator: str, accel: str = "kvm") -> str:
    """Return an empty string when a guest runs under KVM (or another accelerator), else why not."""
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there or not accessible"
    with tempfile.NamedTemporaryFile(prefix="snaporch-kvm-") as image:
        image.write(_SECTOR)
        image.flush()
        command = [emulator, "-accel", accel, "-nodefaults", "-display", "none", "-m", "16M"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        command += ["-drive", f"file={image.name},format=raw,if=ide,snapshot=on"]
        try:
            with trio.fail_after(PROBE_SECONDS):
                done = await trio.run_process(
                    command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
                )
        except trio.TooSlowError:
            return f"/dev/kvm opens, but a guest under it did not come through its start in {PROBE_SECONDS:g} s"
    words = done.stderr.decode(errors="replace").strip().splitlines()
    why = words[-1] if words else f"the probe's QEMU ended with {done.returncode}"
    return "" if done.returncode == _EXIT else why


def _cache() -> Path:
    """Return where the answer is kept: it is the host's, not that of one root directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snaporch" / "kvm.json"


async def cached_probe(emulator: str) -> str:
    """As `probe`, asked once for each boot of this host and each emulator."""
    cache = _cache()
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    key = f"{boot()} {_VERSION} {emulator}"
    if key not in known:
        known = {k: v for k, v in known.items() if k.startswith(boot())} | {key: await probe(emulator)}
        with suppress(OSError):  # no home to write to: asked again next time
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = cache.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(known))
            new.rename(cache)
    return known[key]
