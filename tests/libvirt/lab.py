"""A libvirtd of our own, for one session of tests: `running_libvirt`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import libvirt

IN_LAB = Path(__file__).with_name("in_lab")
START_SECONDS = 60.0  # the first time libvirtd asks every QEMU what it can do
STOP_SECONDS = 30.0
LIBVIRTD_CONF = """\
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:{state}/libvirtd.log"
"""
# No systemd, polkit, cgroups, AppArmor, virtlogd: what a libvirtd without them needs.
QEMU_CONF = """\
user = "{user}"
group = "{user}"
dynamic_ownership = {ownership}
security_driver = "none"
namespaces = {namespaces}
cgroup_controllers = []
stdio_handler = "file"
"""


@attrs.define
class Libvirt:
    """A libvirtd that runs in a mount namespace of its own.

    Attributes:
        version: of libvirt.
        prefix: where it is unpacked.
        qemu: the prefix of its QEMU, or ``-`` for the system's.
        state: the directory for all that it writes.
        process: the daemon.
    """

    version: str
    prefix: Path
    qemu: str
    state: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What to connect to."""
        return f"qemu:///system?socket={self.state}/run/libvirt-sock"

    @property
    def place(self) -> list[str]:
        """The words before a command that is to run where this libvirt is installed."""
        return [str(IN_LAB), str(self.prefix), self.qemu, str(self.state)]

    def configure(self, user: str = "root", namespaces: str = "[]") -> None:
        """Write libvirtd's configuration; it holds from its next start on."""
        place = self.state / "etc/libvirt"
        place.mkdir(parents=True, exist_ok=True)
        (place / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(state=self.state))
        ownership = int(user != "root")
        text = QEMU_CONF.format(user=user, ownership=ownership, namespaces=namespaces)
        (place / "qemu.conf").write_text(text)

    def start(self) -> None:
        """Start the daemon, and wait until it answers."""
        command = ["libvirtd", "-f", "/etc/libvirt/libvirtd.conf", "-p", str(self.state / "libvirtd.pid")]
        with (self.state / "libvirtd.out").open("ab") as out:
            self.process = subprocess.Popen(
                [IN_LAB, self.prefix, self.qemu, self.state, *command],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                libvirt.open(self.uri).close()
            except libvirt.libvirtError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.words()) from None
                time.sleep(0.02)
            else:
                return

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the daemon; its guests run on."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(STOP_SECONDS)
            self.process = None

    def words(self) -> str:
        """Return what the daemon has said."""
        logs = [self.state / "libvirtd.out", self.state / "libvirtd.log"]
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())

    def virsh(self, *words: str) -> str:
        """Run virsh, and return what it says.

        Raises:
            AssertionError: it failed.
        """
        done = self.run("virsh", "-q", "-c", "qemu:///system", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command where this libvirt is installed."""
        return subprocess.run([*self.place, *command], check=False, capture_output=True, text=True, **options)


@contextmanager
def running_libvirt(version: str, prefix: Path, qemu: str) -> Iterator[Libvirt]:
    """Have a libvirtd run; none of it is left afterwards, its guests neither."""
    if os.geteuid() != 0:
        raise AssertionError("a libvirtd of our own takes root: run the tests as root, or leave out tests/libvirt")
    # In memory, and its path is short: there are sockets in it.
    state = Path(tempfile.mkdtemp(prefix="libvirt-", dir="/dev/shm"))
    made = Libvirt(version, prefix, qemu, state)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it prints them otherwise
    try:
        made.configure()
        made.start()
        yield made
    finally:
        _end_guests(made)
        made.kill(signal.SIGTERM)
        shutil.rmtree(state, ignore_errors=True)


def _end_guests(daemon: Libvirt) -> None:
    """End every guest that is still there."""
    with suppress(libvirt.libvirtError):
        connection = libvirt.open(daemon.uri)
        try:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with suppress(libvirt.libvirtError):
                    domain.destroy()
        finally:
            connection.close()
