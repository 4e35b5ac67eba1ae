"""The lab's Linux guest: Debian's kernel for all machines, and the drivers that a machine needs."""

from __future__ import annotations

import fcntl
import hashlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from snaporch.guest.build import build_linux, cpio_entry, kernel_package, module, unpack

KERNEL = "linux-image-amd64"
HERE = Path(__file__).parent
PROGRAM = stat.S_IFREG | 0o755
DIRECTORY = stat.S_IFDIR | 0o755


def kernel_files(cache: Path) -> Path:
    """Return where Debian's kernel and its modules are; they are unpacked first where they are not there."""
    place = cache / "machine-lab"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            unpack(kernel_package(KERNEL), place, place)
            (place / "done").touch()
    return place


def _depends(place: Path) -> dict[str, list[str]]:
    """Return what each module needs, by name."""
    found: dict[str, list[str]] = {}
    for path in place.rglob("*.ko"):
        content = path.read_bytes()
        start = content.find(b"\0depends=")
        words = content[start + 9 : content.index(b"\0", start + 9)].decode() if start >= 0 else ""
        found[path.stem.replace("-", "_")] = [word.replace("-", "_") for word in words.split(",") if word]
    return found


def _in_order(names: Sequence[str], depends: dict[str, list[str]], seen: list[str]) -> list[str]:
    for name in names:
        if name not in seen:
            _in_order(depends.get(name, []), depends, seen)
            seen.append(name)
    return seen


def linux(cache: Path, place: Path, modules: Sequence[str]) -> tuple[Path, Path]:
    """Return the kernel, and an initramfs with these modules and those that they need, made in a directory."""
    files = kernel_files(cache)
    listed = files / "depends"
    if not listed.exists():
        lines = (f"{name} {' '.join(needs)}\n" for name, needs in sorted(_depends(files).items()))
        listed.write_text("".join(lines))
    depends = {words[0]: words[1:] for words in map(str.split, listed.read_text().splitlines())}
    name = hashlib.sha256(" ".join(modules).encode()).hexdigest()[:8]
    made = place / f"initrd-{name}"
    made.write_bytes(build_linux(cache / "guest").initrd.read_bytes() + b"".join(_entries(files, modules, depends)))
    return next(files.glob("boot/vmlinuz-*")), made


def _entries(files: Path, modules: Sequence[str], depends: dict[str, list[str]]) -> Iterator[bytes]:
    yield cpio_entry("more", DIRECTORY)
    for number, name in enumerate(_in_order(modules, depends, [])):
        content = module(files, name) or module(files, name.replace("_", "-"))
        if content is not None:
            yield cpio_entry(f"more/{number:02}-{name}.ko", PROGRAM, content)
    yield cpio_entry("init", PROGRAM, (HERE / "init.sh").read_bytes())
    yield cpio_entry("TRAILER!!!", 0)
