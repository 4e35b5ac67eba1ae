"""The lab's emulated machine: booted once and kept (`savevm`), then started from that within seconds."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from scripts.xen_lab.debian import LabError

SNAPSHOT = "ready"
BOOT_SECONDS = 300.0  # half a minute where nothing else runs
ANSWER_SECONDS = 120.0
PUT_BYTES = 24000
# Without eager-fpu, spec-ctrl=no lets the emulated CPU's lazy FPU corrupt dom0's programs.
_XEN = (
    "dom0_mem=768M,max:768M dom0_max_vcpus=1 console=com1 com1=115200,8n1 loglvl=info guest_loglvl=info noreboot "
    "spec-ctrl=no,eager-fpu=1 xpti=no pv-l1tf=no"
)
_LINUX = "root=/dev/vda rw console=hvc0 mitigations=off loglevel=4 panic=-1"
_DEAD = ("noreboot' set", "Kernel panic", "Panic on CPU")


@attrs.define
class Lab:
    """One machine.

    Attributes:
        home: of the release: hypervisor, kernels, root image, the kept machine.
        place: for this machine's disk, sockets and logs.
        qemu: the QEMU that emulates it. QEMU 7.2 has a fault that dom0 dies of; 10.0 has not.
    """

    home: Path
    place: Path
    qemu: str
    _process: subprocess.Popen[bytes] | None = None

    def _file(self, name: str) -> Path:
        return self.place / name

    @property
    def console(self) -> str:
        """What Xen and dom0's kernel have said."""
        path = self._file("console.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self, *more: str) -> None:
        images = self.home
        command = [
            # Ended with whoever started it: it holds more than a gigabyte of memory.
            *("setpriv", "--pdeathsig", "KILL", self.qemu, "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512"),
            *("-cpu", "max", "-smp", "2", "-m", "1536", "-display", "none", "-nodefaults", "-no-reboot"),
            *("-serial", f"file:{self._file('console.log')}", "-kernel", f"{images}/xen", "-append", _XEN),
            *("-initrd", f"{images}/vmlinuz {_LINUX},{images}/initrd"),
            *("-drive", f"file={self._file('root.qcow2')},format=qcow2,if=none,id=root,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=root", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={self._file('agent')},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=lab"),
            *("-qmp", f"unix:{self._file('qmp')},server=on,wait=off", *more),
        ]
        with self._file("qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _await(self, ready: Callable[[], bool]) -> float:
        """Wait until something is so; return after how many seconds."""
        began = time.monotonic()
        while not ready():
            if self._process is None:
                raise LabError(f"no lab is served from {self.place}")
            if self._process.poll() is not None:
                raise LabError(f"the lab's QEMU has ended: {self._file('qemu.log').read_text()[-800:]}")
            if any(words in self.console for words in _DEAD):
                raise LabError(f"Xen or dom0 has died:\n{self.console[-1500:]}")
            if time.monotonic() > began + BOOT_SECONDS:
                raise LabError(f"dom0 is not there after {BOOT_SECONDS:.0f} s:\n{self.console[-1500:]}")
            time.sleep(0.1)
        return time.monotonic() - began

    def boot(self) -> float:
        """Boot, and keep the booted machine in `home`; return the seconds that booting took."""
        self.place.mkdir(parents=True, exist_ok=True)
        disk = self._file("root.qcow2")
        base = ["-F", "raw", "-b", str(self.home / "dom0.ext4")]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, disk], check=True)
        self._start()
        seconds = self._await(lambda: "LAB ready" in self.console)
        self._monitor(f"savevm {SNAPSHOT}")
        self._monitor("stop")
        kept = self.home / "ready.qcow2"
        shutil.copyfile(disk, kept.with_suffix(".new"))
        kept.with_suffix(".new").rename(kept)
        self._monitor("cont")
        return seconds

    def resume(self) -> float:
        """Start from the kept machine; return the seconds until dom0 has answered."""
        self.place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--reflink=auto", self.home / "ready.qcow2", self._file("root.qcow2")], check=True)
        self._start("-loadvm", SNAPSHOT)
        began = time.monotonic()
        # Its clock is as old as the kept machine is.
        self.sh(f"busybox date -s @{int(time.time())} >/dev/null", ANSWER_SECONDS)
        return time.monotonic() - began

    def stop(self) -> None:
        """Switch it off."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _monitor(self, line: str) -> None:
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(str(self._file("qmp")))
            lines = connection.makefile("rwb")
            lines.readline()
            command = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
            for each in ({"execute": "qmp_capabilities"}, command):
                lines.write(json.dumps(each).encode() + b"\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
            if answer.get("return"):
                raise LabError(f"{line}: {answer['return']}")

    @contextmanager
    def _agent(self) -> Iterator[_Agent]:
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            self._await(lambda: connection.connect_ex(str(self._file("agent"))) == 0)
            agent = _Agent(connection)
            agent.greet()
            yield agent

    def follow(self, command: str, seconds: float = 600.0) -> Iterator[str | int]:
        """Run a command in dom0; yield its output as it comes, and at last its exit status."""
        with self._agent() as agent:
            for answer in agent.ask(seconds + 60, sh=command, timeout=seconds):
                yield answer["out"] if "out" in answer else answer["rc"]

    def sh(self, command: str, seconds: float = 600.0) -> str:
        """Run a command in dom0 and return its output.

        Raises:
            LabError: its exit status is not 0.
        """
        *words, status = self.follow(command, seconds)
        text = "".join(map(str, words))
        if status:
            raise LabError(f"{command!r} in dom0: exit status {status}\n{text[-4000:]}")
        return text

    def put(self, *paths: Path, to: str) -> None:
        """Copy files and directories to a directory in dom0."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz", compresslevel=3) as archive:
            for path in paths:
                archive.add(path, path.name)
        name, content = f"/tmp/put-{time.monotonic_ns()}", data.getvalue()  # noqa: S108 - in dom0, where we are alone
        unpack = f"mkdir -p {to} && busybox tar xz -C {to} -f {name} && rm {name}"
        with self._agent() as agent:
            for start in range(0, len(content), PUT_BYTES):
                piece = base64.b64encode(content[start : start + PUT_BYTES]).decode()
                list(agent.ask(ANSWER_SECONDS, put=name, data=piece))
            (*_, last) = agent.ask(ANSWER_SECONDS, sh=unpack, timeout=ANSWER_SECONDS)
        if last["rc"]:
            raise LabError(f"files could not be unpacked to {to} in dom0")


@attrs.define
class _Agent:
    """A connection to dom0's agent."""

    socket: socket.socket
    _rest: bytes = b""

    def ask(self, seconds: float, **job: Any) -> Iterator[dict[str, Any]]:
        """Yield all answers to a job; each is waited for so many seconds."""
        identity = f"{os.getpid()}-{time.monotonic_ns()}"
        self.socket.settimeout(seconds)
        self.socket.sendall(json.dumps(job | {"id": identity}).encode() + b"\n")
        while True:
            if not (data := self.socket.recv(1 << 16)):
                raise LabError("the lab's agent is gone")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                with suppress(ValueError):  # a line that was cut when the earlier client left
                    answer = json.loads(line)
                    if answer.get("id") == identity:
                        yield answer
                        if "rc" in answer:
                            return

    def greet(self) -> None:
        """Return when the agent has answered: while its port does not know of us yet, answers are lost."""
        patience = 1.0
        while patience <= ANSWER_SECONDS:  # a dom0 that is slow must not be asked more than it can answer
            with suppress(TimeoutError):
                list(self.ask(patience, put="/dev/null", data=""))
                return
            patience *= 2
        raise LabError("the lab's agent does not answer")


def tell(text: str) -> None:
    """Say what is being done."""
    print(f"xen-lab: {text}", file=sys.stderr, flush=True)
