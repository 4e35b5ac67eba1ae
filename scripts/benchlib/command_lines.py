"""Command lines of QEMU made at random, and the way back in the machines that they make."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import attrs
import trio

from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qmp import open_qmp
from snaporch.errors import ConnectionGone, Refused
from snaporch.model.domain import MachineShape
from snaporch.model.rfc import DomainSnapshot
from snaporch.orchestrator import Orchestrator, catalog_of, open_orchestrator

SECONDS = 60.0
NAME = "vm"


class Qemu(Protocol):
    """Which QEMU it is: the paths of its programs."""

    @property
    def emulator(self) -> str:
        """Of the emulator."""

    @property
    def img(self) -> str:
        """Of qemu-img."""


@attrs.define
class Maker:
    """Makes one command line in a directory."""

    place: Path
    qemu: Qemu
    dice: random.Random
    count: int = 0

    def image(self, format_: str = "qcow2", base: str = "") -> str:
        """Make an image and return its path; some names have a comma."""
        self.count += 1
        path = str(self.place / f"{self.count}{self.dice.choice(['', ',x'])}.{format_}")
        words = [self.qemu.img, "create", "-q", "-f", format_]
        words += ["-b", base, "-F", "qcow2", path] if base else [path, "8M"]
        subprocess.run(words, check=True)
        return path

    def chain(self) -> str:
        """Make an image over up to two others."""
        path = self.image()
        for _ in range(self.dice.randrange(3)):
            path = self.image(base=path)
        return path

    def disk(self) -> list[str]:
        """Return a disk in one of many spellings."""
        ways: Sequence[Callable[[], list[str]]] = (
            self.nested,
            self.nodes,
            self.dotted,
            self.drive,
            self.bare_file,
            self.filtered,
        )
        return self.dice.choice(ways)()

    def _name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def _device(self, node: str) -> list[str]:
        options = {"driver": "virtio-blk-pci", "drive": node, "id": f"dev-{node}"}
        if self.dice.random() < 0.5:  # noqa: PLR2004 - each half of the time
            return ["-device", json.dumps(options)]
        return ["-device", ",".join(f"{key}={value}" for key, value in options.items())]

    def nested(self) -> list[str]:
        """One object, its file inside."""
        node, more = self._name(), self.dice.choice([{}, {"discard": "unmap"}, {"l2-cache-size": 2**20}])
        file = {"driver": "file", "filename": self.chain()}
        return [
            "-blockdev",
            json.dumps({"driver": "qcow2", "node-name": node, "file": file} | more),
            *self._device(node),
        ]

    def nodes(self) -> list[str]:
        """Each file and each layer a node of its own, the last one's backing a null."""
        base = self.image()
        top, node = self.image(base=base), self._name()
        objects: list[dict[str, object]] = [
            {"driver": "file", "filename": base, "node-name": f"{node}-s2", "read-only": True},
            {"driver": "qcow2", "file": f"{node}-s2", "node-name": f"{node}-2", "read-only": True, "backing": None},
            {"driver": "file", "filename": top, "node-name": f"{node}-s1", "auto-read-only": True},
            {"driver": "qcow2", "file": f"{node}-s1", "node-name": node, "backing": f"{node}-2"},
        ]
        return [word for each in objects for word in ("-blockdev", json.dumps(each))] + self._device(node)

    def dotted(self) -> list[str]:
        """One object in keys with dots."""
        node = self._name()
        path = self.chain().replace(",", ",,")
        text = f"driver=qcow2,node-name={node},detect-zeroes=on,file.driver=file,file.filename={path}"
        return ["-blockdev", text, *self._device(node)]

    def filtered(self) -> list[str]:
        """A filter over the layer: inside it, or a node of its own."""
        node = self._name()
        layer: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": self.chain()}}
        if self.dice.random() < 0.5:  # noqa: PLR2004 - each half of the time
            filter_: dict[str, object] = {"driver": "copy-on-read", "node-name": node}
            group = []
        else:
            filter_ = {"driver": "throttle", "node-name": node, "throttle-group": f"g-{node}"}
            group = ["-object", f"throttle-group,id=g-{node},x-iops-total=1000"]
        if self.dice.random() < 0.5:  # noqa: PLR2004 - each half of the time
            return [*group, "-blockdev", json.dumps(filter_ | {"file": layer}), *self._device(node)]
        under = layer | {"node-name": f"{node}-l"}
        words = ["-blockdev", json.dumps(under), "-blockdev", json.dumps(filter_ | {"file": f"{node}-l"})]
        return [*group, *words, *self._device(node)]

    def bare_file(self) -> list[str]:
        """A raw file without a layer."""
        node = self._name()
        options = {"driver": "file", "node-name": node, "filename": self.image("raw")}
        return ["-blockdev", json.dumps(options), *self._device(node)]

    def drive(self) -> list[str]:
        """A -drive."""
        path = self.chain().replace(",", ",,")
        name = self.dice.choice([f"file={path}", f"file=file:{path}", f"driver=qcow2,file.filename={path}"])
        return ["-drive", f"{name},if=virtio,{self.dice.choice(['cache=none', 'discard=unmap', 'werror=stop'])}"]

    def line(self) -> list[str]:
        """Return the whole command line."""
        words = ["-m", self.dice.choice(["32", "size=48M", "32,slots=2,maxmem=1G"])]
        words += ["-smp", self.dice.choice(["1", "2", "2,sockets=1,cores=2"])]
        for _ in range(self.dice.randrange(1, 4)):
            words += self.disk()
        others = [
            ["-cdrom", self.image("raw")],
            ["-drive", "if=none,id=empty,media=cdrom", "-device", "ide-cd,drive=empty"],
            ["-netdev", "user,id=u0", "-device", "virtio-net-pci,netdev=u0"],
            ["-nic", "user,model=e1000"],
            ["-serial", f"file:{self.place}/serial.log"],
            [
                "-chardev",
                f"null,id=c0,logfile={self.place}/chardev.log",
                "-device",
                "isa-serial,chardev=c0,index=1",
            ],
            ["-debugcon", f"file:{self.place}/debug.log"],
            ["-vnc", f"unix:{self.place}/vnc.sock"],
            ["-monitor", f"unix:{self.place}/mon.sock,server,nowait"],
            ["-device", "virtio-rng-pci", "-device", "qemu-xhci"],
            ["-snapshot"],
        ]
        for each in self.dice.sample(others, self.dice.randrange(4)):
            words += each
        return words


def reported(shape: MachineShape) -> object:
    """Return what must be the same: of a disk that is written to, what is below its overlay."""
    disks = [
        (disk.target, disk.readonly, disk.virtual_size, disk.chain if disk.readonly else disk.chain[-1:])
        for disk in shape.disks
    ]
    return shape.memory, shape.vcpus, shape.devices, disks


async def shape_of(orch: Orchestrator, driver: QemuDriver) -> MachineShape:
    """Return what the domain's machine is made of."""
    record = await catalog_of(orch).domain(NAME)
    if record.handle is None:
        raise AssertionError("it runs")
    async with driver.connect(record.handle, NAME) as machine:
        return await machine.shape()


async def starts(process: subprocess.Popen[bytes], socket: Path) -> bool:
    """Return when a QEMU answers at a socket; False where it does not start."""
    with trio.fail_after(SECONDS):
        while process.poll() is None:
            try:
                async with open_qmp(socket, label=NAME) as qmp:
                    await qmp.execute("query-status")
                    return True
            except ConnectionGone:
                await trio.sleep(0.05)
    return False


async def tried(place: Path, qemu: Qemu, words: list[str]) -> str:
    """Go back in one machine; return what came of it."""
    socket, root = place / "qmp.sock", place / "root"
    root.mkdir(mode=0o700)
    fixed = ["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-M", "q35"]
    control = ["-qmp", f"unix:{socket},server=on,wait=off"]
    command = [qemu.emulator, *fixed, *words, *control]
    first = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: ASYNC220 - nothing else runs
    driver = QemuDriver(storage=LocalStorage(qemu.img))
    async with open_orchestrator(root, drivers={"qemu": driver}) as orch:
        try:
            if not await starts(first, socket):
                return "no such machine"
            await orch.attach(NAME, str(socket))
            before = await shape_of(orch, driver)
            try:
                await orch.create(NAME, DomainSnapshot("c1"))
                await orch.revert(NAME, "c1")
            except Refused:
                same = first.poll() is None and reported(await shape_of(orch, driver)) == reported(before)
                return "refused" if same else "CHANGED BY A REFUSAL"
            after = await shape_of(orch, driver)
            return "went back" if reported(after) == reported(before) else f"WRONG: {before}, {after}"
        except Refused:
            return "not attached" if first.poll() is None else "ENDED BY A REFUSAL"
        finally:
            with trio.CancelScope(shield=True):
                first.kill()
                first.wait()
                for domain in await catalog_of(orch).domains():
                    await orch.destroy(domain.name)


def is_wrong(outcome: str) -> bool:
    """Return whether what came of a machine is what must not be."""
    return outcome.startswith(("WRONG", "CHANGED", "ENDED"))
