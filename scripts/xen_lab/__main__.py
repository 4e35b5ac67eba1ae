"""Xen and a Debian dom0 inside an emulated machine: no KVM, no network, nothing installed.

python -m scripts.xen_lab build [4.17|4.20]            into .cache/xen-VERSION: 1 minute the first time
python -m scripts.xen_lab serve 4.17 PLACE             start from the kept machine, stay until interrupted
python -m scripts.xen_lab sh PLACE 'xl list'           in dom0; exit status as there
python -m scripts.xen_lab put PLACE TO FILE…           files to a directory in dom0
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from scripts.xen_lab.debian import RELEASES, LabError, fetch
from scripts.xen_lab.image import HERE, ROOT, build
from scripts.xen_lab.machine import Lab, tell

_SOURCES = ("debian.py", "image.py", "guest-init", "guest-idle.c", "dom0/init", "dom0/initrd-init", "dom0/agent.py")
_VERSIONS = ROOT / ".cache/qemu-versions"


def home_of(xen: str) -> Path:
    """Return where the lab of a Xen is kept."""
    return ROOT / f".cache/xen-{xen}"


def qemu() -> str:
    """Return the QEMU that emulates the lab's machine."""
    found = dict(line.split()[:2] for line in _VERSIONS.read_text().splitlines())
    if "10.0" not in found:
        raise LabError("the lab needs QEMU 10.0; scripts/setup unpacks it")
    return found["10.0"]


def _fingerprint() -> str:
    guest = ROOT / "snaporch/guest"
    files = [
        *(HERE / name for name in _SOURCES),
        guest / "linux.c",
        guest / "workload.c",
        ROOT / "scripts/constraints.txt",
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def is_built(xen: str) -> bool:
    """Return whether the lab is there and is what its sources say."""
    stamp = home_of(xen) / "stamp"
    return stamp.exists() and stamp.read_text() == _fingerprint()


def build_lab(xen: str) -> None:
    """Build the lab of a Xen, unless it is there.

    Raises:
        LabError: it cannot be; the text says why.
    """
    home, release = home_of(xen), RELEASES[xen]
    if is_built(xen):
        return
    began = time.monotonic()
    (home / "stamp").unlink(missing_ok=True)
    tell(f"downloading Xen {xen} and a dom0 of Debian {release.suite}")
    debs = fetch(release, home)
    tell("making the image")
    build(release, debs, home)
    shutil.rmtree(debs)
    shutil.rmtree(home / "apt/archives")
    tell("booting it once")
    with tempfile.TemporaryDirectory(prefix="xen-lab-") as place:
        lab = Lab(home, Path(place), qemu())
        try:
            tell(f"dom0 was there after {lab.boot():.1f} s")
        finally:
            lab.stop()
    (home / "stamp").write_text(_fingerprint())
    tell(f"the lab of Xen {xen} is ready after {time.monotonic() - began:.0f} s")


def _serve(xen: str, place: Path) -> None:
    lab = Lab(home_of(xen), place, qemu())
    try:
        tell(f"dom0 answers after {lab.resume():.1f} s")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        lab.stop()


def _sh(place: Path, command: str, seconds: float) -> int:
    for each in Lab(place, place, "").follow(command, seconds):
        if isinstance(each, int):
            return each
        sys.stdout.write(each)
        sys.stdout.flush()
    return 1


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m scripts.xen_lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build").add_argument("xen", choices=list(RELEASES), nargs="?", default="4.17")
    serve = verbs.add_parser("serve")
    serve.add_argument("xen", choices=list(RELEASES))
    serve.add_argument("place", type=Path)
    shell = verbs.add_parser("sh")
    shell.add_argument("place", type=Path)
    shell.add_argument("command")
    shell.add_argument("--seconds", type=float, default=600.0)
    put = verbs.add_parser("put")
    put.add_argument("place", type=Path)
    put.add_argument("to")
    put.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.verb == "build":
            build_lab(arguments.xen)
        elif arguments.verb == "serve":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            _serve(arguments.xen, arguments.place.resolve())
        elif arguments.verb == "sh":
            return _sh(arguments.place, arguments.command, arguments.seconds)
        else:
            Lab(arguments.place, arguments.place, "").put(*arguments.files, to=arguments.to)
    except LabError as error:
        sys.stderr.write(f"xen-lab: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
