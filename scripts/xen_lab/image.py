"""Makes what the lab boots: hypervisor, dom0's kernel, initrd and root image, and a guest for it to run.

The packages are only unpacked: no maintainer script runs, there is no chroot, and it needs no root.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

from scripts.xen_lab.debian import LabError, Release, run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
# In the order in which they must be loaded; a kernel may have some of them built in.
_DOM0_MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4", "virtio_console"),
    *("xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "xen-netback"),
)
_GUEST_MODULES = ("xen-blkfront", "xen-netfront")
_DIRECTORY = stat.S_IFDIR | 0o755
_PROGRAM = stat.S_IFREG | 0o755
_LEFT_OUT = (
    *(f"./usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "icons", "zoneinfo", "perl*")),
    *("./usr/share/qemu/*.fd", "./usr/share/qemu/edk2*", "./usr/lib/udev/hwdb.d/*", "./boot/*.efi"),
    *("./lib/systemd/*", "./usr/lib/systemd/*", "./usr/lib/debug/*"),
    *(f"./{_LIBRARIES}/gconv/*", f"./{_LIBRARIES}/perl*"),
)
_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost dom0\n",
    "hostname": "dom0\n",
}


def build(release: Release, debs: Path, home: Path) -> None:
    """Make `xen`, `vmlinuz`, `initrd`, `dom0.ext4` in `home`.

    Raises:
        LabError: a tool is missing or failed.
    """
    for tool in ("mke2fs", "gcc", "dpkg-deb", "tar"):
        if shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            raise LabError(f"the lab needs {tool}")
    root, kernels = home / "root", home / "kernels"
    for directory in (root, kernels):
        shutil.rmtree(directory, ignore_errors=True)
    _unpack_all(debs, root)
    _write_system(root)
    dom0 = _kernel(debs, kernels, cloud=False)
    guest = _kernel(debs, kernels, cloud=True)
    shutil.copy(next(dom0.glob("boot/vmlinuz-*")), home / "vmlinuz")
    (home / "xen").write_bytes(gzip.decompress(next(root.glob("boot/xen-4.*-amd64.gz")).read_bytes()))
    busybox = next(path for name in ("bin", "usr/bin") if (path := root / name / "busybox").is_file())
    (home / "initrd").write_bytes(_initrd(busybox, HERE / "dom0/initrd-init", dom0, _DOM0_MODULES))
    (root / "guest").mkdir()
    workload = _workload(kernels)
    (root / "guest/initrd").write_bytes(
        _initrd(busybox, HERE / "guest-init", guest, _GUEST_MODULES, workload=workload)
    )
    shutil.copy(next(guest.glob("boot/vmlinuz-*")), root / "guest/vmlinuz")
    shutil.rmtree(root / "boot")
    shutil.rmtree(kernels)
    _install_site(release, root / "lab/site")
    compile_all(root, root / "usr/lib", root / "lab")
    _make_image(root, home / "dom0.ext4")


def _unpack_all(debs: Path, root: Path) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):  # merged /usr, before anything is unpacked
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for deb in sorted(debs.glob("*.deb")):
        if not deb.name.startswith("linux-image-"):
            _unpack(deb, root, (f"--exclude={pattern}" for pattern in _LEFT_OUT))


def _unpack(deb: Path, root: Path, options: Iterable[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as archive:
        command = ["tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", str(root), *options]
        run(command, stdin=archive.stdout)


def _kernel(debs: Path, kernels: Path, *, cloud: bool) -> Path:
    deb = next(path for path in debs.glob("linux-image-*.deb") if ("cloud" in path.name) is cloud)
    root = kernels / deb.stem
    _unpack(deb, root, ())
    return root


def _write_system(root: Path) -> None:
    """Write what maintainer scripts would have made, and the lab's own programs."""
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "lab"):
        (root / name).mkdir(exist_ok=True)
    for name, text in _ETC.items():
        (root / "etc" / name).write_text(text)
    for name, target in {"etc/mtab": "/proc/mounts", "usr/bin/awk": "busybox", "usr/bin/sh": "bash"}.items():
        if not (root / name).is_symlink() and not (root / name).exists():
            (root / name).symlink_to(target)
    shutil.rmtree(root / "var/run", ignore_errors=True)
    (root / "var/run").unlink(missing_ok=True)
    (root / "var/run").symlink_to("/run")
    run(["/sbin/ldconfig", "-r", root])
    shutil.copy(HERE / "dom0/init", root / "usr/sbin/lab-init")
    (root / "usr/sbin/lab-init").chmod(0o755)
    shutil.copy(HERE / "dom0/agent.py", root / "lab")


def _module(root: Path, name: str) -> bytes | None:
    """Return a kernel module, or None if the kernel has it built in."""
    for path in root.rglob(f"{name}.ko*"):
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return None


def _initrd(busybox: Path, init: Path, kernel: Path, modules: Iterable[str], workload: Path | None = None) -> bytes:
    files = {"bin/busybox": busybox.read_bytes(), "init": init.read_bytes()}
    if workload is not None:
        files["workload"] = workload.read_bytes()
    for number, name in enumerate(modules):
        if content := _module(kernel, name):
            files[f"modules/{number:02}-{name}.ko"] = content
    entries = [_entry(name, _DIRECTORY) for name in ("bin", "dev", "modules", "new", "proc")]
    entries += [_entry(name, _PROGRAM, content) for name, content in files.items()]
    return b"".join(entries) + _entry("TRAILER!!!", 0)


def _entry(name: str, mode: int, content: bytes = b"") -> bytes:
    """Return a file of a "newc" archive: see the kernel's Documentation, initramfs buffer format."""
    encoded = name.encode() + b"\0"
    # inode, mode, user, group, links, time, size, device, special device, name size, checksum
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return b"".join(part + bytes(-len(part) % 4) for part in (header, content))


def _workload(scratch: Path) -> Path:
    """Build the workload of the project's own Linux guest."""
    sources = [ROOT / "snaporch/guest" / name for name in ("linux.c", "workload.c")] + [HERE / "guest-idle.c"]
    options = ["-std=gnu11", "-O2", "-static", "-pthread", "-s", "-Wl,--wrap=plat_idle"]
    run(["gcc", *options, "-o", scratch / "workload", *sources])
    return scratch / "workload"


def _install_site(release: Release, site: Path) -> None:
    """Put all that snaporch and its tests import beside them, at the versions that everything is tested with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [
        each for each in project["optional-dependencies"]["test"] if each.startswith(("pytest>", "pytest-trio"))
    ]
    target = ["--target", site, "--only-binary=:all:", "--python-version", release.python]
    pip = [ROOT / ".venv/bin/pip", "install", "-q", "--disable-pip-version-check"]
    run([*pip, *target, "-c", ROOT / "scripts/constraints.txt", *project["dependencies"], *tests])


def compile_all(root: Path, *directories: Path, strip: Path | None = None) -> None:
    """Compile Python files by dom0's own Python; in dom0, emulated, that would take most of a minute.

    Args:
        root: the unpacked dom0.
        directories: in which the files are.
        strip: what is to be dom0's root directory; by default `root`.
    """
    python = next(path for path in (root / "usr/bin").glob("python3.*") if path.suffix[1:].isdigit())
    loader = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", root / _LIBRARIES, python]
    options = ["-q", "-j", "2", "--invalidation-mode", "unchecked-hash", "-s", strip or root, "-p", "/"]
    # Some of what is installed is not meant to be compiled, and compileall then says 1.
    subprocess.run(
        [*loader, "-m", "compileall", *options, *directories],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHOME": str(root / "usr"), "LC_ALL": "C.UTF-8"},
    )


def _make_image(root: Path, image: Path) -> None:
    image.unlink(missing_ok=True)
    features = ["-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0"]
    run(["/sbin/mke2fs", "-q", "-t", "ext4", *features, "-d", root, image, "2048M"])
