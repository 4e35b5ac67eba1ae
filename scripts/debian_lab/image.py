"""Makes a Debian 12 that boots at once in QEMU: its kernel and initrd, and two disks.

mmdebstrap unpacks and configures the packages as on any machine. The disks are file systems without a partition,
made by `mke2fs -d`. They are made once, and kept: a proof works on copies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs

HERE = Path(__file__).parent
SUITE = "bookworm"
PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "linux-image-cloud-amd64", "initramfs-tools", "zstd", "kmod"),
    *("postgresql", "postgresql-contrib", "qemu-guest-agent", "python3", "python3-psycopg2", "tpm2-tools"),
)
SIZES = {"vda": "3G", "vdb": "1G"}
FILES: Mapping[str, str] = {
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n/dev/vdb /srv/second ext4 defaults 0 2\n",
    "etc/hostname": "guest\n",
    "etc/postgresql/15/main/conf.d/lab.conf": "shared_buffers = 1MB\njit = off\ntimezone = UTC\n",
    "etc/postgresql/15/main/pg_hba.conf": "local all all trust\n",
    "etc/modules-load.d/lab.conf": "virtio_console\ntpm_crb\n",
    "etc/systemd/system/judge.service": """\
[Unit]
Description=Counts in a database and on both disks, and compares
After=postgresql@15-main.service
RequiresMountsFor=/srv/second

[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/judge.py
Restart=no

[Install]
WantedBy=multi-user.target
""",
}
MASKED = ("serial-getty@ttyS0", "getty@tty1", "apt-daily.timer", "apt-daily-upgrade.timer", "fstrim.timer")


@attrs.frozen
class Image:
    """What a definition needs.

    Attributes:
        kernel: boots directly.
        initrd: with the modules for its disks.
        disks: raw images, by target.
    """

    kernel: Path
    initrd: Path
    disks: Mapping[str, Path]

    @property
    def there(self) -> bool:
        """Whether it was made."""
        return all(path.exists() for path in (self.kernel, self.initrd, *self.disks.values()))


def run(*words: str | Path) -> str:
    """Return what a command says; it has to go well."""
    done = subprocess.run(words, check=False, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        command = " ".join(map(str, words[:4]))
        sys.exit(f"{command} …: exit status {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def made(home: Path, mirror: str) -> Image:
    """Return the image, which is made where this version of it is not there."""
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        sys.exit("a Debian is made by root, with mmdebstrap: apt install mmdebstrap")
    judge = (HERE / "judge.py").read_bytes()
    version = hashlib.sha256(b"".join([judge, repr((PACKAGES, SIZES, FILES, MASKED)).encode()])).hexdigest()[:12]
    place = home / f"debian-{version}"
    image = Image(place / "vmlinuz", place / "initrd", {target: place / f"{target}.img" for target in SIZES})
    if image.there:
        return image
    new = place.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    root = new / "root"
    include = f"--include={','.join(PACKAGES)}"
    run("mmdebstrap", "--variant=minbase", include, "--format=directory", SUITE, root, mirror)
    _configure(root, judge)
    shutil.copy(next(root.glob("boot/vmlinuz-*")), new / "vmlinuz")
    shutil.copy(next(root.glob("boot/initrd.img-*")), new / "initrd")
    second = root / "srv/second"
    for target, tree in {"vdb": second, "vda": root}.items():
        run("/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, new / f"{target}.img", SIZES[target])
        shutil.rmtree(tree)
        if tree is second:
            tree.mkdir()
    new.rename(place)
    return image


def _configure(root: Path, judge: bytes) -> None:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/local/lib/judge.py").write_bytes(judge)
    for name in ("var/lib/judge", "srv/second/tables"):
        (root / name).mkdir(parents=True)
    run("chroot", root, "chown", "postgres:postgres", "/srv/second/tables")
    run("chroot", root, "chmod", "700", "/srv/second/tables")
    checksums = "/usr/lib/postgresql/15/bin/pg_checksums --enable -D /var/lib/postgresql/15/main"
    run("chroot", root, "su", "postgres", "-c", checksums)
    run("chroot", root, "systemctl", "enable", "judge.service")
    run("chroot", root, "systemctl", "mask", *MASKED)
    run("chroot", root, "passwd", "-d", "root")
