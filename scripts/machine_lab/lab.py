"""One machine: started as people start it, taken through snaporch's command line, and looked at after each verb."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
from benchlib.lab import CACHE, Qemu

from machine_lab.guest import linux
from snaporch.guest.build import build_tiny
from snaporch.guest.report import count_starts, parse, parse_errors

VERB_SECONDS = 240.0
UP_SECONDS = 300.0
HEARD_SECONDS = 60.0  # a guest that says nothing for so long is dead
BETWEEN_SECONDS = 1.5  # from a checkpoint to the revert: some numbers
TINY = "rate=50 dirty=2 ram=16 report=250"
LINUX = (
    "console=ttyS0 quiet panic=0 mitigations=off tsc=reliable snaporch.rate=5 snaporch.ram=16 snaporch.report=250"
)
REFUSED = 2  # the exit status of a verb that has touched nothing
PANIC = re.compile(r"Kernel panic[^\n]*|I/O error[^\n]*")


class NoGuestError(Exception):
    """The machine could not be brought up: nothing is to be judged."""


@attrs.define
class Step:
    """What one verb did, or what was found after it.

    Attributes:
        what: the verb, or what was looked at.
        status: the exit status; None where something was looked at.
        fault: what is not as it should be: ``wrong: ...`` or ``lost: ...``.
        words: what was said.
    """

    what: str
    status: int | None = None
    fault: str = ""
    words: str = ""


@attrs.define
class Lab:
    """A directory for one machine.

    Attributes:
        place: the directory.
        qemu: which QEMU.
        steps: what was done and found.
        notes: what is worth knowing besides.
    """

    place: Path
    qemu: Qemu
    steps: list[Step] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    emulator: str = ""
    name: str = "vm"
    root: Path = attrs.field(init=False)
    qmp: Path = attrs.field(init=False)
    log: Path = attrs.field(init=False)
    process: subprocess.Popen[bytes] | None = None
    cleanup: list[Callable[[], object]] = attrs.field(factory=list)
    _others: list[subprocess.Popen[bytes]] = attrs.field(factory=list)
    _mark: int = 0
    _before: object = None

    def __attrs_post_init__(self) -> None:
        self.emulator = self.emulator or self.qemu.emulator
        self.root, self.qmp, self.log = (self.place / name for name in ("root", "qmp.sock", "serial.log"))

    # --- what a machine is made of ---

    def sh(self, *words: object, check: bool = True, **options: Any) -> str:
        """Run a program, and return what it says."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command, check=check, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
        )
        return done.stdout

    def image(self, name: str, kind: str = "qcow2", size: str = "64M", *, base: str = "", options: str = "") -> str:
        """Make an image; a base is named as it is given."""
        more = ["-b", base, "-F", "qcow2"] if base else []
        more += ["-o", options] if options else []
        words = [self.qemu.img, "create", "-q", "-f", kind, *more, name, *([] if base else [size])]
        self.sh(*words, cwd=self.place)
        return str(self.place / name)

    def tiny(self, more: str = "") -> list[str]:
        """The tiny guest: virtio disks on the root bus."""
        return ["-kernel", str(build_tiny(CACHE / "guest")), "-append", f"{TINY} {more}"]

    def linux(self, modules: Sequence[str] = (), *, disks: int = 1, more: str = "") -> list[str]:
        """The Linux guest, with the drivers that it needs; `more` are words of its command line."""
        kernel, initrd = linux(CACHE, self.place, ("virtio_pci", *modules))
        append = f"{LINUX} lab.disks={disks} {more}"
        return ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append]

    def base(
        self,
        guest: Sequence[str] | None = None,
        *,
        machine: str = "q35",
        memory: str = "192",
        smp: str = "1",
        nodefaults: bool = True,
        serial: bool = True,
        control: bool = True,
    ) -> list[str]:
        """What nearly every command line has."""
        words = ["-machine", machine, "-accel", "tcg", "-smp", smp, "-m", memory, "-display", "none"]
        words += ["-nodefaults"] if nodefaults else []
        words += guest if guest is not None else self.tiny()
        words += ["-serial", f"file:{self.log}"] if serial else []
        return words + (["-qmp", f"unix:{self.qmp},server=on,wait=off"] if control else [])

    def disks(self, *images: str, options: str = "") -> list[str]:
        """Virtio disks in the plainest spelling."""
        found: list[str] = []
        for number, image in enumerate(images):
            found += ["-drive", f"if=none,id=dr{number},file={image}{options}"]
            found += ["-device", f"virtio-blk-pci,drive=dr{number}"]
        return found

    def beside(self, *words: object, env: Mapping[str, str] | None = None) -> None:
        """Start a program that the machine needs beside itself."""
        command = [str(word) for word in words]
        log = (self.place / "beside.log").open("ab")
        self._others.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=env
            )
        )
        time.sleep(1)

    def start(
        self,
        words: Sequence[object],
        *,
        wait: bool = True,
        prefix: Sequence[str] = (),
        fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Start it, and wait until the guest says that it works."""
        command = [*prefix, self.emulator, *map(str, words)]
        (self.place / "command").write_text("\n".join(command))
        errors = (self.place / "qemu.err").open("ab")
        self.process = subprocess.Popen(
            command,
            cwd=cwd or self.place,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
            pass_fds=fds,
            env=env,
        )
        self._others.append(self.process)
        if wait:
            self.up()
        elif not self._answers():
            raise NoGuestError((self.place / "qemu.err").read_text(errors="replace")[-300:])

    def up(self) -> None:
        """Wait until the guest says that it works."""
        if not self.heard(UP_SECONDS):
            said = (self.place / "qemu.err").read_text(errors="replace") if self.process else ""
            raise NoGuestError(f"{said[-300:]} {self.text()[-200:]}")
        self._mark = len(self.text())

    def _answers(self) -> bool:
        for _ in range(200):
            if self.status() != "gone":
                return True
            time.sleep(0.1)
        return False

    # --- looking ---

    def text(self) -> str:
        """Return all that the guest has said."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def heard(self, seconds: float, since: int = 0) -> bool:
        """Wait until the guest reports; return whether it did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if parse(self.text()[since:]):
                return True
            if self.process is not None and self.process.poll() not in {None, 0} and not self.pids():
                return False
            time.sleep(0.1)
        return False

    def number(self) -> int:
        """Return for how long the guest has worked, in milliseconds of its own, as it has said last."""
        found = parse(self.text())
        return found[-1].up_ms if found else -1

    def ask(self, command: str, **arguments: Any) -> Any:
        """Ask QEMU; an error's text, or None where it is not there."""
        with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as link:
            link.settimeout(20)
            link.connect(str(self.control()))
            lines = link.makefile("rw")
            lines.readline()
            for words in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                lines.write(json.dumps(words) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
            return answer.get("return", answer.get("error", {}).get("desc"))
        return None

    def control(self) -> Path:
        """Return QEMU's control socket: a defined domain has a second one."""
        return self.qmp if self.qmp.exists() else next(iter(self.root.rglob("query.sock")), self.qmp)

    def status(self) -> str:
        """Return QEMU's run state, or that it is gone."""
        answer = self.ask("query-status")
        return str(answer["status"]) if isinstance(answer, dict) else "gone"

    def looks(self) -> object:
        """Return what a refusal leaves as it was: the run state, and the image of each disk."""
        blocks = self.ask("query-block") or []
        found = [(block["device"], block.get("inserted", {}).get("file")) for block in blocks]
        return self.status(), sorted(found, key=str)

    def pids(self) -> list[int]:
        """Return the QEMUs of this place."""
        found = []
        for path in Path("/proc").iterdir():
            with suppress(OSError):
                words = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
                if b"qemu" in words.split(b"\0", 1)[0] and f"{self.place}/".encode() in words:
                    found.append(int(path.name))
        return sorted(found)

    def facts(self, pid: int) -> dict[str, str]:
        """Return what a process has of its host that another one should have too."""
        place, found = Path("/proc", str(pid)), {}
        text = (place / "status").read_text()
        for name in ("Uid", "Gid", "Groups", "CapEff", "Cpus_allowed_list", "Umask", "Seccomp"):
            match = re.search(rf"^{name}:[ \t]*(.*)$", text, re.MULTILINE)
            found[name] = match[1].strip() if match else ""
        found |= {name: os.readlink(place / "ns" / name) for name in ("net", "mnt", "pid", "user")}
        found |= {name: os.readlink(place / name) for name in ("cwd", "root", "exe")}
        found["nice"] = str(os.getpriority(os.PRIO_PROCESS, pid))
        found["oom"] = (place / "oom_score_adj").read_text().strip()
        found["cgroup"] = (place / "cgroup").read_text().strip()
        limits = re.search(r"Max open files\s+(\S+)", (place / "limits").read_text())
        return found | {"files": limits[1] if limits else ""}

    # --- judging ---

    def fault(self, what: str, words: str) -> None:
        """Note that something is not as it should be."""
        self.steps.append(Step(what, fault=words))

    def check(self, what: str, *, good: bool, words: str) -> None:
        """Note what was looked at."""
        self.steps.append(Step(what, fault="" if good else f"wrong: {words}", words=words))

    def alive(self, after: str, *, lost: bool = True) -> bool:
        """Look whether the guest runs and is whole."""
        since = len(self.text())
        talks = self.heard(HEARD_SECONDS, since)
        text = self.text()[self._mark :]
        self._mark = len(self.text())
        bad = [*parse_errors(text), *PANIC.findall(text)]
        if parse(text) and parse(text)[-1].errors and not bad:
            bad = ["it counts errors"]
        if count_starts(text):
            bad.append("it began anew")
        step = Step(f"guest after {after}")
        if not talks:
            step.fault = f"{'lost' if lost else 'wrong'}: it says nothing; {self.status()}"
        elif bad:
            step.fault = f"wrong: {'; '.join(bad[:2])}"
        self.steps.append(step)
        return not step.fault

    # --- verbs ---

    def run(self, *words: object) -> Any:
        """Run a verb; return its JSON where it was done, and else None."""
        command = [sys.executable, "-m", "snaporch", "--root", str(self.root), "--json", *map(str, words)]
        env = os.environ | {
            "PATH": f"{Path(self.qemu.emulator).parent}:{os.environ['PATH']}",
            "SNAPORCH_QEMU": self.qemu.emulator,
        }
        self._before = self.looks()
        try:
            done = subprocess.run(
                command,
                cwd="/",
                env=env,
                capture_output=True,
                text=True,
                timeout=VERB_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            self.steps.append(Step(" ".join(map(str, words)), 1, "wrong: it does not end"))
            return None
        said = done.stderr.strip()
        fault = "wrong: a traceback" if "Traceback" in said else ""
        if done.returncode == REFUSED and (after := self.looks()) != self._before:
            fault = f"wrong: refused, but not as before: {self._before} {after}"
        answer = f" {done.stdout.strip()[:300]}" if done.returncode == 1 else ""
        self.steps.append(Step(" ".join(map(str, words)), done.returncode, fault, said[-600:] + answer))
        return (json.loads(done.stdout) if done.stdout.strip() else {}) if done.returncode == 0 else None

    def attach(self) -> bool:
        """Attach to it."""
        return self.run("domain", "attach", self.name, "--qmp", self.qmp) is not None

    def create(self, name: str, *words: str) -> bool:
        """Take a checkpoint; without one the guest is looked at."""
        return self.run("create", self.name, name, *words) is not None

    def revert(self, name: str) -> bool:
        """Go back; with FORCE where the refusal advises it."""
        if self.run("revert", self.name, name) is not None:
            return True
        refused = self.steps[-1]
        self.alive(f"refused revert to {name}")
        if refused.status == REFUSED and "--force" in refused.words:
            return self.run("revert", self.name, name, "--force") is not None
        return False

    def shown(self) -> dict[str, Any]:
        """Return what `domain show` says, without a step of its own."""
        found = self.run("domain", "show", self.name)
        self.steps.pop()
        return found or {}

    def back(self, name: str) -> bool:
        """Go back to a snapshot, and look whether the guest did."""
        old = self.pids()
        facts = self.facts(old[-1]) if old else {}
        said, since = self.number(), len(self.text())
        if not self.revert(name):
            self.alive(f"failed revert to {name}")
            return False
        if not self.alive(f"revert to {name}"):
            return False
        first = parse(self.text()[since:])
        lowest = min(report.up_ms for report in first) if first else -1
        self.check("went back", good=0 < lowest < said, words=f"from {said} to {lowest}")
        if new := self.pids():
            other = {
                key: (facts[key], now) for key, now in self.facts(new[-1]).items() if facts.get(key, now) != now
            }
            if other:
                self.fault("its process", f"wrong: another process: {other}")
        return True

    def flow(
        self, *, attached: bool = False, whole: bool = False, verify: bool = True, words: Sequence[str] = ()
    ) -> None:
        """Take it from attach to revert; `whole`: then delete, and a second one that stands."""
        if not attached and not self.attach():
            self.alive("refused attach")
            return
        if not self.create("c1", "--live", *words):
            self.alive("refused create")
            return
        self.alive("create c1")
        time.sleep(BETWEEN_SECONDS)
        if verify:
            self.verify("c1")
        if self.back("c1") and whole:
            self.run("delete", self.name, "c1")
            self.alive("delete c1")
            if self.create("c2", *words):
                self.alive("create c2")
                time.sleep(BETWEEN_SECONDS)
                self.back("c2")

    def verify(self, name: str) -> None:
        """A good snapshot is never called damaged, and the running guest feels nothing."""
        self.run("verify", self.name, name, "--boot")
        step = self.steps[-1]
        if step.status == 1:
            step.fault = "wrong: a good snapshot is called damaged"
        elif step.status == REFUSED:
            step.status = None  # it cannot be tried here: an answer
        self.alive("verify --boot")

    def define(self, extra: Sequence[str], *, images: Sequence[str] = ("a.qcow2",)) -> bool:
        """Define and start a domain."""
        kernel, append = self.tiny()[1::2]
        lines = [
            *(f'name = "{self.name}"', 'memory = "192MiB"', 'accel = "tcg"', 'machine = "q35"'),
            *(f'kernel = "{kernel}"', f'append = "{append}"', f'serial = "{self.log}"'),
            f"extra_args = {json.dumps(extra)}",
        ]
        for letter, image in zip("abc", images, strict=False):
            lines += ["[[disks]]", f'target = "vd{letter}"', f'path = "{self.image(image)}"']
        (self.place / "vm.toml").write_text("\n".join(lines) + "\n")
        if self.run("domain", "define", self.place / "vm.toml") is None:
            return False
        if self.run("domain", "start", self.name) is None:
            return False
        self.up()
        return True

    def close(self) -> None:
        """End everything."""
        for pid in self.pids():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in self._others:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for each in self.cleanup:
            with suppress(OSError, subprocess.CalledProcessError):
                each()
        shutil.rmtree(self.place, ignore_errors=True)
