"""What a process has around it, and the states that a guest is found in."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from machine_lab.cells import CELLS, Cell, cell
from machine_lab.lab import Lab

ENVIRONMENT = "Surroundings of the process"
STATE = "States of the guest"
NOBODY = "65534"
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
STATE_SECONDS = 90.0


def _machine(lab: Lab, *more: str) -> list[object]:
    return [*lab.base(), *more, *lab.disks(lab.image("a.qcow2"))]


@cell(ENVIRONMENT)
def env_daemonize(lab: Lab) -> None:
    """Relative paths, and a process whose directory is another one then."""
    work = lab.place / "w"
    work.mkdir()
    lab.image("w/a.qcow2")
    words = ["-qmp", "unix:q.sock,server=on,wait=off", "-daemonize", "-pidfile", f"{lab.place}/w/vm.pid"]
    lab.qmp = work / "q.sock"
    lab.start([*lab.base(control=False), *words, *lab.disks("a.qcow2")], cwd=work)
    lab.flow()


def _owned(lab: Lab) -> str:
    """Give the image, the log and the directory to nobody."""
    image = lab.image("a.qcow2")
    lab.log.touch()
    for path in (lab.place, image, lab.log):
        os.chown(path, int(NOBODY), int(NOBODY))
    return image


@cell(ENVIRONMENT)
def env_runas(lab: Lab) -> None:
    image = _owned(lab)
    user = ["-runas", "nobody"] if lab.qemu.version == "7.2" else ["-run-with", "user=nobody"]
    lab.start([*lab.base(), *lab.disks(image), *user])
    lab.flow()


@cell(ENVIRONMENT)
def env_user(lab: Lab) -> None:
    """QEMU of another user, snaporch as root."""
    lab.start([*lab.base(), *lab.disks(_owned(lab))], prefix=AS_NOBODY)
    lab.flow()


@cell(ENVIRONMENT)
def env_user_root_dir(lab: Lab) -> None:
    """As before; that user can reach snaporch's directory."""
    image = _owned(lab)
    lab.root.mkdir()
    lab.root.chmod(0o777)
    lab.start([*lab.base(), *lab.disks(image)], prefix=AS_NOBODY)
    lab.flow()


@cell(ENVIRONMENT)
def env_mntns(lab: Lab) -> None:
    """Its directory is not the host's."""
    inside, seen = lab.place / "in", lab.place / "vm"
    inside.mkdir()
    seen.mkdir()
    lab.image("in/a.qcow2")
    lab.image("vm/a.qcow2")
    script = f'mount --bind {inside} {seen} && exec "$@"'
    lab.start([*lab.base(), *lab.disks(f"{seen}/a.qcow2")], prefix=("unshare", "-m", "sh", "-c", script, "x"))
    lab.flow()


@cell(ENVIRONMENT)
def env_chroot(lab: Lab) -> None:
    root = ["-chroot", "/var/empty"] if lab.qemu.version == "7.2" else ["-run-with", "chroot=/var"]
    lab.start(_machine(lab, *root))
    lab.flow()


def _copied(lab: Lab) -> list[str]:
    """QEMU's program in the machine's own directory."""
    program = Path("/proc/self/exe") if not lab.qemu.emulator else Path(lab.qemu.emulator)
    words: list[str] = []
    if (cache := program.parent.parent) and (cache / "usr/bin/qemu-system-x86_64").exists() and cache.name != "usr":
        program = cache / "usr/bin/qemu-system-x86_64"
        for name in ("qemu", "seabios"):
            words += ["-L", str(cache / "usr/share" / name)]
    lab.emulator = str(lab.place / "qemu-system-x86_64")
    shutil.copy(program, lab.emulator)
    return words


@cell(ENVIRONMENT)
def env_binary_gone(lab: Lab) -> None:
    lab.start([*_copied(lab), *_machine(lab)])
    if lab.attach() and lab.create("c1", "--live"):
        Path(lab.emulator).unlink()
        lab.create("c2", "--live")
        lab.back("c1")


@cell(ENVIRONMENT)
def env_binary_upgraded(lab: Lab) -> None:
    lab.start([*_copied(lab), *_machine(lab)])
    if lab.attach() and lab.create("c1", "--live"):
        Path(lab.emulator).unlink()
        Path(lab.emulator).write_text("#!/bin/sh\necho QEMU emulator version 3.1.0\n")
        Path(lab.emulator).chmod(0o755)
        lab.create("c2", "--live")
        lab.back("c1")


@cell(ENVIRONMENT)
def env_qmp_tcp(lab: Lab) -> None:
    lab.start([*_machine(lab), "-qmp", "tcp:127.0.0.1:24999,server=on,wait=off"])
    for address in ("127.0.0.1:24999", "tcp:127.0.0.1:24999"):
        lab.run("domain", "attach", "vm", "--qmp", address)
    lab.alive("refused attach")


@cell(ENVIRONMENT)
def env_qmp_busy(lab: Lab) -> None:
    """Somebody else is connected."""
    lab.start(_machine(lab))

    def taken() -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(lab.qmp))
        link.recv(1000)
        return link

    with taken():
        lab.run("domain", "attach", "vm", "--qmp", lab.qmp)
        lab.steps[-1].fault = ""  # nobody can look meanwhile
    lab.attach()
    with taken():
        lab.create("c1", "--live")
        lab.steps[-1].fault = ""
    lab.create("c1", "--live")
    lab.alive("busy socket")


@cell(ENVIRONMENT)
def env_netns(lab: Lab) -> None:
    """Its ports are not the host's."""
    name = lab.place.name[-10:]
    lab.sh("ip", "netns", "add", name)
    lab.cleanup.append(lambda: lab.sh("ip", "netns", "del", name))
    network = ["-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:24022-:22", "-device", "virtio-net-pci,netdev=n0"]
    lab.start(_machine(lab, *network), prefix=("ip", "netns", "exec", name))
    lab.flow(verify=False)


@cell(ENVIRONMENT)
def env_limits(lab: Lab) -> None:
    """Niceness, CPUs, what the kernel ends first, files, file modes, and a control group."""
    group = Path("/sys/fs/cgroup", lab.place.name)
    script = 'echo 500 > /proc/self/oom_score_adj; ulimit -n 4096; umask 027; exec nice -n 5 taskset -c 1 "$@"'
    try:
        group.mkdir()
    except OSError as error:
        lab.notes.append(f"no control group: {error}")
    else:
        script = f"echo $$ > {group}/cgroup.procs; {script}"
        lab.cleanup.append(group.rmdir)
    lab.start(_machine(lab), prefix=("sh", "-c", script, "x"))
    lab.flow(verify=False)


@cell(ENVIRONMENT)
def env_env(lab: Lab) -> None:
    """A variable that decides what the program finds: without it there is no such device."""
    lab.start(_machine(lab, "-device", "virtio-gpu-pci"), env=os.environ | {"SNAPORCH_LAB": "1"})
    lab.flow(verify=False)
    if pids := lab.pids():
        kept = b"SNAPORCH_LAB=1" in Path(f"/proc/{pids[-1]}/environ").read_bytes()
        lab.check("its environment", good=kept, words="SNAPORCH_LAB")


@cell(ENVIRONMENT)
def env_restarted(lab: Lab) -> None:
    """Its user starts it again with the old command line: it runs on the image that is frozen."""
    words = _machine(lab)
    lab.start(words)
    if not (lab.attach() and lab.create("c1", "--live")):
        return
    lab.ask("quit")
    time.sleep(1)
    lab.start(words, wait=False)
    attached = lab.attach()
    taken = attached and lab.create("c2", "--live")
    lab.check("seen", good=not taken, words="a checkpoint was taken of a guest that ruins another one")


# --- states ---


def _state(
    name: str,
    states: Sequence[str],
    *more: str,
    modules: Sequence[str] = (),
    guest: str = "",
    after: Callable[[Lab], None] | None = None,
) -> None:
    """A guest that gets into a state by itself: each verb is done, or refused while the state is as before."""

    def run(lab: Lab) -> None:
        lab.start([*lab.base(lab.linux(modules, more=guest)), *more, *lab.disks(lab.image("a.qcow2"))])
        _attached_in(lab, states)
        before = lab.status()
        for verb in (("create", "vm", "c1", "--live"), ("create", "vm", "c2"), ("domain", "show", "vm")):
            done = lab.run(*verb)
            if lab.status() != before:
                lab.fault(f"state after {verb[0]}", f"wrong: {before}, then {lab.status()}")
                return
            if done is not None and verb[0] == "create":
                old = lab.number()
                lab.run("revert", "vm", verb[2])
                lab.check("state after revert", good=lab.status() == before, words=f"{before}, then {lab.status()}")
                lab.notes.append(f"number {old}, then {lab.number()}")
        if after is not None:
            after(lab)

    CELLS[name] = Cell(name, STATE, run)


def _attached_in(lab: Lab, states: Sequence[str]) -> None:
    attached = lab.attach()
    end = time.monotonic() + STATE_SECONDS
    while lab.status() not in states and time.monotonic() < end:
        time.sleep(0.2)
    lab.notes.append(f"attached {attached}, state {lab.status()}")
    lab.check("the state", good=lab.status() in states, words=f"it is {lab.status()}")


def _wakes(lab: Lab) -> None:
    since = len(lab.text())
    answer = lab.ask("system_wakeup")
    lab.check("it wakes", good=lab.heard(30, since), words=f"{answer} {lab.status()}")


def _ready_again(lab: Lab) -> None:
    lab.check("it boots", good=lab.heard(60, len(lab.text())), words=lab.status())


_state("st-s3", ["suspended"], guest="lab.s3=15 no_console_suspend", after=_wakes)
_state(
    "st-panic-pause",
    ["guest-panicked"],
    *("-device", "pvpanic", "-action", "panic=pause"),
    modules=("pvpanic_mmio",),
    guest="lab.panic=15",
)
_state(
    "st-panic-shutdown",
    ["guest-panicked", "shutdown"],
    *("-device", "pvpanic", "-action", "panic=shutdown", "-no-shutdown"),
    modules=("pvpanic_mmio",),
    guest="lab.panic=15",
)
_state("st-shutdown", ["shutdown"], "-no-shutdown", guest="lab.off=15")
_state(
    "st-watchdog",
    ["watchdog"],
    *("-device", "i6300esb", "-action", "watchdog=pause"),
    modules=("i6300esb",),
    guest="lab.watchdog=15 lab.i6300esb=heartbeat=2",
)
_state("st-reboot", ["running"], guest="lab.reboot=15", after=_ready_again)


@cell(STATE)
def st_prelaunch(lab: Lab) -> None:
    """Before its first instruction."""
    lab.start([*lab.base(), "-S", *lab.disks(lab.image("a.qcow2"))], wait=False)
    lab.attach()
    if lab.create("c1"):
        lab.check("state after create", good=lab.status() in {"prelaunch", "paused"}, words=lab.status())
        lab.create("c2")
        lab.run("revert", "vm", "c1")
        lab.check("state after revert", good=lab.status() in {"prelaunch", "paused"}, words=lab.status())
    lab.run("domain", "resume", "vm")
    lab.check("it boots", good=lab.heard(30), words=lab.status())


@cell(STATE)
def st_inmigrate(lab: Lab) -> None:
    lab.start([*lab.base(), "-incoming", "defer", *lab.disks(lab.image("a.qcow2"))], wait=False)
    lab.attach()
    lab.create("c1")
    lab.check("state", good=lab.status() == "inmigrate", words=lab.status())


@cell(STATE)
def st_preconfig(lab: Lab) -> None:
    lab.start([*lab.base(), "--preconfig", *lab.disks(lab.image("a.qcow2"))], wait=False)
    lab.attach()
    lab.check("it lives", good=bool(lab.pids()), words="it is gone")


@cell(STATE)
def st_ioerror(lab: Lab) -> None:
    """The host's file system is full, and the guest waits; then there is room."""
    small = lab.place / "small"
    small.mkdir()
    lab.sh("mount", "-t", "tmpfs", "-o", "size=4M", "none", small)
    lab.cleanup.append(lambda: lab.sh("umount", "-l", small))
    lab.image("small/a.qcow2")
    guest = lab.tiny("bulk=2 span=32")
    lab.start([*lab.base(guest), "-drive", f"if=virtio,file={small}/a.qcow2"], wait=False)
    _attached_in(lab, ["io-error"])
    lab.create("c1", "--live")
    lab.check("state after create", good=lab.status() == "io-error", words=lab.status())
    lab.sh("mount", "-o", "remount,size=200M", small)
    lab.run("domain", "resume", "vm")
    lab.alive("room was made")
    if lab.create("c2", "--live"):
        lab.alive("create c2")
        time.sleep(2)
        lab.back("c2")
