"""What the lab takes from Debian: the releases, and their packages by an apt of its own.

Nothing is installed, and the system's apt is neither read nor changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import attrs

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_CONF = """\
Dir::State "{apt}"; Dir::State::lists "{apt}/lists"; Dir::State::status "{apt}/status";
Dir::Cache "{apt}"; Dir::Cache::archives "{apt}/archives";
Dir::Etc::sourcelist "{apt}/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Acquire::GzipIndexes "true"; Acquire::Languages "none"; APT::Sandbox::User "root"; APT::Install-Recommends "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
_PROGRAMS = (
    "qemu-system-xen",
    "qemu-utils",
    "python3",
    "busybox-static",
    "bash",
    "coreutils",
    "procps",
    "base-files",
    "util-linux",
    "iproute2",
)


class LabError(Exception):
    """The lab cannot be made or does not work; the text is for people."""


@attrs.frozen
class Release:
    """A Debian release and its Xen.

    Attributes:
        xen: as in the packages' names.
        suite: the release's name.
        version: what the hypervisor's version must begin with.
        python: of the release.
        live: the hypervisor can save a PV guest that runs: it has shadow paging.
    """

    xen: str
    suite: str
    version: str
    python: str
    live: bool


# Never bookworm-security's 4.17: it is built without shadow paging, so that it saves no PV guest that runs.
RELEASES = {
    "4.17": Release("4.17", "bookworm", "4.17.5", "3.11", live=True),
    "4.20": Release("4.20", "trixie", "4.20", "3.13", live=False),
}


def run(command: Sequence[str | Path], **options: object) -> str:
    """Run a command and return its output.

    Raises:
        LabError: it failed; with its last words.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        words = (done.stderr + done.stdout).strip()[-1500:]
        raise LabError(f"{' '.join(map(str, command[:6]))} failed with {done.returncode}:\n{words}")
    return str(done.stdout)


def mirror() -> str:
    """Return where Debian is taken from: as set, or where the system's apt takes its own release."""
    if chosen := os.environ.get("SNAPORCH_DEBIAN_MIRROR"):
        return chosen
    form = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    for line in run(
        ["apt-get", "indextargets", "--no-release-info", "--format", form, "Created-By: Packages"]
    ).splitlines():
        release, component, uri = line.split()
        if component == "main" and "-" not in release:
            return uri
    raise LabError("apt knows no Debian mirror; set SNAPORCH_DEBIAN_MIRROR to one")


def fetch(release: Release, home: Path) -> Path:
    """Download Xen, dom0's programs with all that they need, and two kernels; return the directory of the packages.

    Raises:
        LabError: the mirror cannot be reached, or no longer has this Xen.
    """
    apt, debs = home / "apt", home / "debs"
    for directory in (apt / "lists/partial", apt / "archives/partial", debs):
        directory.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(_CONF.format(apt=apt))
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {release.suite} main\n")
    environment = {
        "env": os.environ
        | {"APT_CONFIG": str(apt / "apt.conf"), "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    }
    # As an option, the file is read after the system's, so that its #clear holds.
    run(["apt-get", "-c", apt / "apt.conf", "-q", "update"], **environment)
    check_version(release, run(["apt-cache", "policy", f"xen-hypervisor-{release.xen}-amd64"], **environment))
    xen = (f"xen-utils-{release.xen}", f"xen-hypervisor-{release.xen}-amd64", "xenstore-utils")
    # As nothing counts as installed, apt downloads all that these need, libc included.
    run(["apt-get", "install", "-y", "-q", "--download-only", *xen, *_PROGRAMS], **environment)
    for old in debs.glob("*.deb"):
        old.unlink()
    # The kernels alone: with what they recommend and need, an initramfs tool and a boot loader would come.
    kernels = [_kernel(name, environment) for name in ("linux-image-amd64", "linux-image-cloud-amd64")]
    run(["apt-get", "download", "-q", *kernels], cwd=debs, **environment)
    for deb in (apt / "archives").glob("*.deb"):
        shutil.copy(deb, debs)
    return debs


def check_version(release: Release, policy: str) -> None:
    """Look at what apt says of the hypervisor's package.

    Raises:
        LabError: it is not the one that the lab is for.
    """
    found = next((line.split()[1] for line in policy.splitlines() if "Candidate:" in line), "none")
    if not found.startswith(release.version):
        raise LabError(
            f"Debian {release.suite} no longer has Xen {release.version} (it has {found}); the Xen tests need it. "
            "Set SNAPORCH_DEBIAN_MIRROR to a mirror that has it, a snapshot.debian.org one for example"
        )


def _kernel(package: str, environment: dict[str, dict[str, str]]) -> str:
    """Return the package with the kernel itself, on which the named one depends."""
    for line in run(["apt-cache", "depends", package], **environment).splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise LabError(f"apt-cache names no kernel for {package}")
