"""Builds the test guests.

``python -m snaporch.guest.build [tiny|linux] --cache DIR`` prints the paths of what it built. Names contain
a hash of the sources, so that a change rebuilds and nothing else does; files appear complete or not at all,
so that any number of callers may build at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from snaporch.errors import SnaporchError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "GuestBuildError",
    "Kind",
    "LinuxGuest",
    "build_linux",
    "build_tiny",
    "cpio_entry",
    "kernel_package",
    "main",
    "missing_tools",
    "module",
    "unpack",
]

Kind: TypeAlias = Literal["tiny", "linux"]

_SOURCES = Path(__file__).parent
_TINY_SOURCES = ("tiny_start.S", "tiny.c", "workload.c", "workload.h", "tiny.ld", "build.py")
_LINUX_SOURCES = ("linux.c", "workload.c", "workload.h", "init.sh", "quiesce.sh", "build.py")
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_TINY_FLAGS = (
    "-m32",
    "-march=i686",
    "-mgeneral-regs-only",  # nobody sets up SSE
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
)
_LINUX_FLAGS = ("-std=gnu11", "-O2", "-static", "-pthread", "-s")
_KERNEL_PACKAGE = "linux-image-cloud-amd64"
# In the order in which they must be loaded; a kernel may have some of them built in.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)
_AGENT = "usr/sbin/qemu-ga"
# A command and the Debian package that has it.
_TOOLS: dict[Kind, dict[str, str]] = {
    "tiny": {"gcc": "gcc", "ld": "binutils"},
    "linux": {"gcc": "gcc", "ld": "binutils", "dpkg-deb": "dpkg", "apt-get": "apt", "ldd": "libc-bin"},
}
_APT_HINT = "if apt's lists are missing or old, run: apt-get update"
_DIRECTORY = stat.S_IFDIR | 0o755
_PROGRAM = stat.S_IFREG | 0o755
_LIBC = Path("/usr/include/stdio.h")


class GuestBuildError(SnaporchError):
    """A guest could not be built; the text has the tool's own words."""


@attrs.frozen
class LinuxGuest:
    """What ``qemu -kernel ... -initrd ...`` needs.

    Attributes:
        kernel: Debian's.
        initrd: with the workload.
        quiesce: another one, with a file system that is written to and the QEMU guest agent: see quiesce.sh.
    """

    kernel: Path
    initrd: Path
    quiesce: Path


def missing_tools(kind: Kind) -> list[str]:
    """Return the Debian packages that building this guest needs and this machine lacks."""
    missing = [package for command, package in _TOOLS[kind].items() if shutil.which(command) is None]
    if kind == "linux" and not _LIBC.exists():
        missing.append("libc6-dev")
    return missing


def build_tiny(cache: Path) -> Path:
    """Return the bare-metal guest, a multiboot kernel for ``qemu -kernel``, built if it is not in the cache.

    Raises:
        GuestBuildError: the compiler is missing or failed.
    """
    target = cache / f"tiny-{_hash(_TINY_SOURCES)}.elf"
    if target.exists():
        return target
    _need_tools("tiny")
    with _scratch(cache) as scratch:
        built = scratch / "tiny.elf"
        sources = [str(_SOURCES / name) for name in _TINY_SOURCES if name.endswith((".c", ".S"))]
        script = f"-Wl,-T,{_SOURCES / 'tiny.ld'}"
        _run(["gcc", *_TINY_FLAGS, *_WARNINGS, script, "-o", str(built), *sources])
        built.replace(target)
    return target


def build_linux(cache: Path) -> LinuxGuest:
    """Return Debian's cloud kernel and an initramfs with the workload, built if they are not in the cache.

    The packages are downloaded and unpacked, not installed.

    Raises:
        GuestBuildError: a tool is missing or failed, or apt knows no such package.
    """
    target = cache / f"linux-{_hash(_LINUX_SOURCES)}"
    guest = LinuxGuest(kernel=target / "vmlinuz", initrd=target / "initrd", quiesce=target / "initrd-quiesce")
    if target.exists():
        return guest
    _need_tools("linux")
    with _scratch(cache) as scratch:
        root = scratch / "root"
        for package in (kernel_package(_KERNEL_PACKAGE), "busybox-static", "qemu-guest-agent"):
            unpack(package, root, scratch)
        workload = scratch / "workload"
        sources = [str(_SOURCES / name) for name in _LINUX_SOURCES if name.endswith(".c")]
        _run(["gcc", *_LINUX_FLAGS, *_WARNINGS, "-o", str(workload), *sources])
        built = scratch / "linux"
        built.mkdir()
        next((root / "boot").glob("vmlinuz-*")).replace(built / "vmlinuz")
        initrd = _initramfs(root, workload)
        (built / "initrd").write_bytes(initrd)
        (built / "initrd-quiesce").write_bytes(initrd + _agent(root))
        try:
            built.rename(target)
        except OSError:
            if not target.exists():  # else another caller was quicker, which is as good
                raise
    return guest


def _hash(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((_SOURCES / name).read_bytes())
    return digest.hexdigest()[:12]


def _need_tools(kind: Kind) -> None:
    if packages := missing_tools(kind):
        raise GuestBuildError(f"the {kind} guest needs tools; run: apt-get install {' '.join(packages)}")


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Yield a directory on the cache's file system, so that a rename puts what is built in its place."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as name:
        yield Path(name)


def _run(command: list[str], *, cwd: Path | None = None) -> str:
    result = subprocess.run(  # noqa: S603  no shell, and no argument comes from outside
        command, cwd=cwd, check=False, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}
    )
    if result.returncode != 0:
        raise GuestBuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")
    return result.stdout


def kernel_package(name: str) -> str:
    """Return the package with the kernel itself, on which a kernel's package depends."""
    try:
        text = _run(["apt-cache", "depends", name])
    except GuestBuildError as error:
        raise GuestBuildError(f"{error}\nthe Linux guest needs Debian's {name}; {_APT_HINT}") from None
    for line in text.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise GuestBuildError(f"apt-cache names no kernel for {name}; {_APT_HINT}")


def unpack(package: str, root: Path, scratch: Path) -> None:
    """Download a Debian package to a directory of its own in `scratch`, and unpack it in `root`."""
    downloads = scratch / package
    downloads.mkdir()
    # As root, apt downloads as another user, who may not write here.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    try:
        _run(["apt-get", *sandbox, "download", package], cwd=downloads)
    except GuestBuildError as error:
        raise GuestBuildError(f"{error}\n{_APT_HINT}") from None
    for archive in downloads.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(archive), str(root)])


def _initramfs(root: Path, workload: Path) -> bytes:
    """Return the archive, not compressed: unpacking costs an emulated CPU more than reading does."""
    busybox = next(path for name in ("bin", "usr/bin") if (path := root / name / "busybox").is_file())
    archive = b"".join(
        [
            *(cpio_entry(name, _DIRECTORY) for name in ("bin", "dev", "modules", "proc")),
            cpio_entry("bin/busybox", _PROGRAM, busybox.read_bytes()),
            cpio_entry("init", _PROGRAM, (_SOURCES / "init.sh").read_bytes()),
            cpio_entry("workload", _PROGRAM, workload.read_bytes()),
        ]
    )
    for number, name in enumerate(_MODULES):
        if content := module(root, name):
            archive += cpio_entry(f"modules/{number}-{name}.ko", _PROGRAM, content)
    return archive + cpio_entry("TRAILER!!!", 0)


def _agent(root: Path) -> bytes:
    """Return the archive of the guest agent, to be appended; its libraries are here, as QEMU needs them too."""
    words = _run(["ldd", str(root / _AGENT)])
    if "not found" in words:
        raise GuestBuildError(f"the guest agent needs libraries that are not here:\n{words}")
    libraries = [word.lstrip("/") for line in words.splitlines() for word in line.split() if word.startswith("/")]
    files = {name: Path("/", name).read_bytes() for name in libraries} | {
        _AGENT: (root / _AGENT).read_bytes(),
        "quiesce.sh": (_SOURCES / "quiesce.sh").read_bytes(),
    }
    directories = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    entries = [cpio_entry(name, _DIRECTORY) for name in directories]
    entries += [cpio_entry(name, _PROGRAM, content) for name, content in files.items()]
    return b"".join(entries) + cpio_entry("TRAILER!!!", 0)


def module(root: Path, name: str) -> bytes | None:
    """Return a kernel module, or None if the kernel has it built in."""
    for path in root.rglob(f"{name}.ko*"):
        content = path.read_bytes()
        return lzma.decompress(content) if path.suffix == ".xz" else content
    return None


def cpio_entry(name: str, mode: int, content: bytes = b"") -> bytes:
    """Return a file of the "newc" format: see the kernel's Documentation, initramfs buffer format."""
    encoded = name.encode() + b"\0"
    # inode, mode, user, group, links, time, size, device, special device, name size, checksum
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(header) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def main() -> None:
    """Build what the command line asks for and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m snaporch.guest.build", description="Build the test guests.")
    parser.add_argument("kind", nargs="?", choices=["tiny", "linux"], help="both if left out")
    parser.add_argument("--cache", type=Path, required=True, help="the directory for what is built")
    arguments = parser.parse_args()
    try:
        if arguments.kind != "linux":
            print(build_tiny(arguments.cache))  # noqa: T201
        if arguments.kind != "tiny":
            guest = build_linux(arguments.cache)
            print(guest.kernel, guest.initrd, sep="\n")  # noqa: T201
    except GuestBuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
