"""Proves that a clean Debian has snaporch installed, used, upgraded and purged, by pipx and as a package.

    scripts/proof package [--suite bookworm] [--tree FILE.tar]

mmdebstrap makes a tree of nothing but Debian; everything runs in it, as root, on a copy of this checkout. A guest
is started by the package, and lives through an upgrade, a removal and a purge; so do its snapshots. There is no
systemd in the tree: what the package does to a service that runs is not shown here.

Exit status: 0 all of it went so, 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from benchlib.lab import CACHE, ROOT, workplace

from snaporch.guest.build import build_tiny

PACKAGES = ("python3", "python3-venv", "pipx", "python3-libvirt", "qemu-utils", "qemu-system-x86")
VARIABLES = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
GUEST = """
name = "web"
memory = "64MiB"
accel = "tcg"
kernel = "/srv/kernel"
append = "dirty=5 ram=16"
serial = "/srv/serial.log"
disks = [{target = "vda", path = "/srv/vda.qcow2"}]
"""


def run(*words: str) -> str:
    """Return what a command says, on both of its streams; it has to go well."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(words, text=True, check=False, **pipes)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def mirror(suite: str) -> str:
    """Return where Debian is taken from: as scripts/setup does."""
    if named := os.environ.get("SNAPORCH_DEBIAN_MIRROR"):
        return named
    form = "$(COMPONENT) $(REPO_URI)"
    words = run("apt-get", "indextargets", "--no-release-info", "--format", form, "Created-By: Packages")
    found = [line.split()[1] for line in words.splitlines() if line.startswith("main ") and "debian" in line]
    return next((each for each in found if "security" not in each), "") or sys.exit(
        f"no mirror of {suite} is known"
    )


@attrs.frozen
class Tree:
    """A directory with a Debian of its own."""

    place: Path

    def do(self, *words: str) -> str:
        """Return what a command says in the tree."""
        pip = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
        return run("chroot", str(self.place), "/usr/bin/env", "-i", *VARIABLES, *pip, *words)

    def put(self, source: Path, target: str) -> None:
        """Copy a file into the tree."""
        (self.place / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, self.place / target)

    def guest(self) -> str:
        """Return the process id of the guest; it has to be there."""
        pid = self.do("snaporch", "--json", "domain", "show", "web").partition('"pid": ')[2].partition(",")[0]
        return pid if pid.isdecimal() else sys.exit("the guest is not there")


def said(tree: Tree) -> int:
    """Return how much the guest has said by now."""
    return (tree.place / "srv/serial.log").stat().st_size


def check_alive(tree: Tree, when: str) -> None:
    """See that the guest goes on counting."""
    mark, end = said(tree), time.monotonic() + 120
    while said(tree) <= mark:
        if time.monotonic() > end:
            sys.exit(f"{when}: the guest says nothing any more")
        time.sleep(0.1)
    print(f"  the guest runs on {when}", flush=True)


@contextmanager
def clean(suite: str, made: Path | None, place: Path) -> Iterator[Tree]:
    """Yield a clean Debian with this checkout in /src."""
    tar = made or place / "debian.tar"
    if made is None:
        include = f"--include={','.join(PACKAGES)}"
        run("mmdebstrap", "--variant=apt", include, suite, str(tar), mirror(suite))
    root = place / "debian"
    root.mkdir()
    run("tar", "-xpf", str(tar), "-C", str(root), "--exclude=./dev/*")
    mounts = [root / "proc", root / "dev"]
    for mount in mounts:
        run("mount", "--bind", f"/{mount.name}", str(mount))
    try:
        tree = Tree(root)
        tree.put(Path("/etc/resolv.conf"), "etc/resolv.conf")
        tree.put(Path("/etc/ssl/certs/ca-certificates.crt"), "etc/ssl/certs/ca-certificates.crt")
        (root / "src").mkdir()
        run("git", "-C", str(ROOT), "archive", "-o", str(place / "src.tar"), "HEAD")
        run("tar", "-xf", str(place / "src.tar"), "-C", str(root / "src"))
        yield tree
    finally:
        for mount in mounts:
            run("umount", "--lazy", str(mount))


def by_pipx(tree: Tree) -> None:
    """Install it as README says, use it, and remove it."""
    begun = time.monotonic()
    tree.do("pipx", "install", "/src")
    took = time.monotonic() - begun
    tree.do("/root/.local/bin/snaporch", "doctor")
    home = "/root/.local/pipx/venvs/snaporch"
    home = home if (tree.place / home[1:]).exists() else "/root/.local/share/pipx/venvs/snaporch"
    size = tree.do("du", "-sm", home).split()[0]
    libraries = tree.do(f"{home}/bin/python", "-m", "pip", "list", "--format=freeze").count("==")
    print(f"pipx install: {took:.0f} s, {size} MB, {libraries} distributions, pip's own among them", flush=True)
    tree.do("pipx", "uninstall", "snaporch")


def as_package(tree: Tree) -> None:
    """Install the package, use it, upgrade, remove and purge it."""
    first = tree.do("/src/scripts/deb", "/srv", "0.1.0").split()[-1]
    second = tree.do("/src/scripts/deb", "/srv", "0.1.0+next").split()[-1]
    tree.do("dpkg", "-i", first)
    print(f"installed {first}: {(tree.place / first[1:]).stat().st_size / 1e6:.1f} MB", flush=True)
    tree.do("/usr/lib/snaporch/bin/python3", "-c", "import libvirt, snaporch.drivers.libvirt.driver")
    for file in ("bash-completion/completions/snaporch", "zsh/vendor-completions/_snaporch"):
        if "snaporch completion words" not in (tree.place / "usr/share" / file).read_text():
            sys.exit(f"{file} completes nothing")
    tree.put(build_tiny(CACHE / "guest"), "srv/kernel")
    (tree.place / "srv/web.toml").write_text(GUEST)
    tree.do("qemu-img", "create", "-q", "-f", "qcow2", "/srv/vda.qcow2", "8M")
    tree.do("snaporch", "domain", "define", "/srv/web.toml")
    tree.do("snaporch", "domain", "start", "web")
    check_alive(tree, "after its start")
    tree.do("snaporch", "create", "web", "before", "--live")
    pid = tree.guest()
    tree.do("dpkg", "-i", second)
    check_alive(tree, "after the upgrade")
    if tree.guest() != pid:
        sys.exit("the guest is another process after the upgrade")
    tree.do("snaporch", "create", "web", "after", "--live")
    tree.do("snaporch", "revert", "web", "before")
    tree.do("dpkg", "-r", "snaporch")
    check_alive(tree, "after the removal")
    tree.do("dpkg", "-i", second)
    tree.do("snaporch", "revert", "web", "after")
    told = tree.do("dpkg", "-P", "snaporch")
    check_alive(tree, "after the purge")
    if "/var/lib/snaporch is kept" not in told or (tree.place / "usr/lib/snaporch").exists():
        sys.exit(f"purged, with the words: {told}")
    tree.do("dpkg", "-i", second)
    tree.do("snaporch", "verify", "web", "before")
    tree.do("snaporch", "domain", "destroy", "web")
    print("used, upgraded, removed and purged: guest and snapshots are all there", flush=True)


def main() -> None:
    """Prove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--tree", type=Path, help="a tree that mmdebstrap has made before, with what is needed")
    args = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        sys.exit("this proof needs to be root, and mmdebstrap: apt install mmdebstrap")
    with workplace(Path("/tmp")) as place, clean(args.suite, args.tree, place) as tree:  # noqa: S108 - short paths
        print((tree.place / "etc/debian_version").read_text().strip(), flush=True)
        by_pipx(tree)
        as_package(tree)


if __name__ == "__main__":
    main()
