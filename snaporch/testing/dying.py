"""A program that operates on a domain, or a group, and dies in the middle of it, or kills a hypervisor, or both.

    python -m snaporch.testing.dying ROOT DOMAIN WHERE VICTIM VERB [ARGUMENT…]

WHERE is a state, at whose beginning it happens, or a point: `before:NAME#N` or `after:NAME#N`, the N-th call of a
step of the tables, of a compensation, of what a delete is made of, or of a command to QEMU in the midst of a step
that sends several, or of a call to libvirt that changes something. `trace` says all points that there are, one to a
line, and nothing happens. VICTIM is `us`, `qemu`, the id of a process, several of these with a `+` between them, or
`both` (`us+qemu`), `stop` (SIGSTOP of this program, which goes on at a SIGCONT), or `power:OUTER`, which cuts the
power (`snaporch.testing.outage`) and then kills both. The moment (seconds since the epoch) is the last line that it
says. Its status is 0 when the operation was complete, 1 when it
failed, and 3 when WHERE never came.

DOMAIN is one name, or those of a group with commas between them: its first is the one whose hypervisor is killed,
and a power cut kills those of all.
VERB is `create NAME [STRATEGY|late|missed] [BANDWIDTH]`, `revert NAME`, `delete NAME` or `recover`.

Without arguments it reads them from its standard input, as a JSON list a line, and does each in a fork of its own;
it says the fork's process id, and after its end its status and what it said. `Mortals` is the other end of that:
most of what such a program costs is its imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from snaporch.catalog import Catalog, Change
from snaporch.drivers.libvirt.connection import Connection
from snaporch.drivers.libvirt.driver import NOTE
from snaporch.drivers.libvirt.machine import LibvirtMachine
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qmp import QMPClient
from snaporch.drivers.qmp.machine import QemuMachine
from snaporch.engine import events, gone
from snaporch.engine.verdict import Verdict
from snaporch.errors import OperationFailed, SnaporchError
from snaporch.model.record import Event, EventKind
from snaporch.model.request import CreateOptions, Strategy
from snaporch.model.rfc import CreateFlag, DeviceDisk, DiskSnapshot, DomainSnapshot, RevertFlag
from snaporch.operations import create as create_steps
from snaporch.operations import create_plan
from snaporch.operations.create import Participant
from snaporch.operations.revert import Reverter
from snaporch.orchestrator import Orchestrator, open_orchestrator
from snaporch.testing import outage

NEVER = 3
BOTH = "us+qemu"
FAILING = "failing-"
POWER = "power:"


WATCHED: dict[type, Collection[str]] = {
    Participant: Participant.performs,
    Reverter: Reverter.performs,
    Catalog: {"write"},
    Verdict: {"insist"},
    # A delete's plan is made of these.
    QemuMachine: {"settle_merges", "commit_image", "stream_image", "delete_inside"},
    LibvirtMachine: {"settle_merges", "commit_image", "stream_image"},
    LocalStorage: {"commit_image", "rebase", "seal", "remove", "delete_inside"},
}

# Those that are not alone in their step.
COMMANDS = {"getfd", "closefd", "migrate-incoming", "blockdev-del"}
COMMANDS |= {"block-commit", "block-stream", "job-complete", "job-finalize"}
# What is called of libvirt, and changes something.
COMMANDS |= {"virDomainBlockCommit", "virDomainBlockJobAbort", "virDomainBlockRebase", "virDomainCreateWithFlags"}
COMMANDS |= {"virDomainCreateXML", "virDomainDefineXML", "virDomainDestroy", "virDomainRestoreFlags"}
COMMANDS |= {"virDomainResume", "virDomainSetMetadata", "virDomainSnapshotCreateXML", "virDomainSnapshotDelete"}
COMMANDS |= {"virDomainSuspend"}


def hypervisors(root: str, domain: str, uuid: str = "") -> list[int]:
    """Return the processes that run a domain: those that were launched for it under the root.

    Args:
        root: the orchestrator's.
        domain: its name.
        uuid: what libvirt knows it by, which tells its processes; those of its copies say theirs in notes.
    """
    found, uuids = [], {uuid} - {""}
    for note in Path(root, domain).glob(f"run-*/{NOTE}"):
        with suppress(OSError, ValueError):  # it is just being written, or removed
            uuids.add(json.loads(note.read_text())["uuid"])
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_text(errors="replace").split("\0")
            if "qemu" in words[0] and any(f"{root}/{domain}/run-" in word or word in uuids for word in words[1:]):
                found.append(int(entry.name))
    return found


class Death:
    """What happens, where, and whether it has."""

    def __init__(self, root: str, domain: str, where: str, victim: str, uuids: Mapping[str, str]) -> None:
        self._root, self._domain, self._where, self._uuids = root, domain, where, uuids
        self._victim = BOTH if victim == "both" else victim
        self.came = where == "trace"
        self._calls: Counter[str] = Counter()
        if victim == "stop":
            gone.DYING_SECONDS = 0.2  # nothing dies, so nothing is waited for

    def strike(self) -> None:
        """Let it happen."""
        self.came = True
        members, power = self._domain.split(","), self._victim.startswith(POWER)
        victims = [] if power else self._victim.split("+")
        struck = members if power else members[:1] if "qemu" in victims else ()
        doomed = [pid for name in struck for pid in hypervisors(self._root, name, self._uuids.get(name, ""))]
        doomed += [int(word) for word in victims if word.isdecimal()]
        if power:
            outage.cut(Path(self._victim.removeprefix(POWER)), doomed)
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.write(1, f"{time.time():.6f}\n".encode())
        if power or {"us", "stop"}.intersection(victims):
            os.kill(os.getpid(), signal.SIGSTOP if "stop" in victims else signal.SIGKILL)

    def reach(self, place: str) -> None:
        """Be at a place: a state or a point."""
        if place == self._where and not self.came:
            self.strike()

    def watch(self) -> None:
        """Be told of all places."""
        publish = events.Broadcast.publish

        def last(broadcast: events.Broadcast, event: Event) -> None:
            publish(broadcast, event)
            if event.kind is EventKind.STATE:
                self.reach(event.state)

        events.Broadcast.publish = last  # type: ignore[assignment,method-assign]
        for owner, names in WATCHED.items():
            for name in names:
                setattr(owner, name, self._watched(name, getattr(owner, name)))
        execute = QMPClient.execute

        async def executed(client: QMPClient, command: str, *arguments: Any, **options: Any) -> Any:
            named = self._where.partition(":")[2].startswith(f"{command}#")
            call = self._watched(command, execute) if named or command in COMMANDS else execute
            return await call(client, command, *arguments, **options)

        QMPClient.execute = executed  # type: ignore[assignment,method-assign]
        libvirt_call = Connection.call

        async def called(connection: Connection, what: str, *arguments: Any, **options: Any) -> Any:
            call = self._watched(what, libvirt_call) if what in COMMANDS else libvirt_call
            return await call(connection, what, *arguments, **options)

        Connection.call = called  # type: ignore[assignment,method-assign]

    def _watched(self, name: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def watched(*arguments: Any, **options: Any) -> Any:
            self._calls[name] += 1
            point = f"{name}#{self._calls[name]}"
            if self._where == "trace":
                os.write(1, f"{point}\n".encode())
            self.reach(f"before:{point}")
            try:
                return await call(*arguments, **options)
            finally:
                self.reach(f"after:{point}")

        return watched


async def _fails(_actor: Participant | Reverter) -> Change:
    await trio.lowlevel.checkpoint()
    raise OperationFailed("all was done, and it is to be undone")


async def operate(orch: Orchestrator, domain: str, verb: str, *arguments: str) -> None:
    """Do what is to be interrupted; a verb that begins with FAILING fails at its end, and is rolled back."""
    domains = domain.split(",")
    if verb.startswith(FAILING):
        Participant.commit = Reverter.commit = _fails  # type: ignore[assignment,method-assign]
        verb = verb.removeprefix(FAILING)
    if verb == "create":
        await create(orch, domains, *arguments)
    elif verb == "revert":
        flags = RevertFlag.LAZY if "lazy" in arguments[1:] else RevertFlag(0)
        await orch.revert_group(domains, arguments[0], flags)
    elif verb == "delete":
        await orch.delete_group(domains, arguments[0])
    else:
        await orch.recover()


async def create(
    orch: Orchestrator, domains: Sequence[str], name: str, strategy: str = "auto", bandwidth: str = "0"
) -> None:
    """Create a snapshot; without LIVE as `paused`, inside the images as `internal`, disks alone as `quiesced`.

    As `late` and `missed` in the background, with a late stop: in time, or much too late.
    """
    if late := strategy in {"late", "missed"}:
        create_plan.WORTH_SECONDS = -1.0
        create_steps.LEAD_SECONDS = -1.0 if strategy == "missed" else create_steps.LEAD_SECONDS
        strategy = Strategy.BACKGROUND
    plain = strategy in {"paused", "internal", "quiesced"}
    flags = CreateFlag(0) if plain else CreateFlag.LIVE
    flags |= CreateFlag.DISK_ONLY | CreateFlag.QUIESCE if strategy == "quiesced" else CreateFlag(0)
    options = CreateOptions(
        strategy=Strategy("auto" if plain else strategy), bandwidth=int(bandwidth), late_stop=late
    )
    disks = (await orch.domain_info(domains[0])).disks if strategy == "internal" else ()
    inside = tuple(DiskSnapshot(DeviceDisk(disk.target), external=False) for disk in disks if not disk.readonly)
    await orch.create_group(domains, DomainSnapshot(name, disks=inside), flags, options)


async def _uuids(orch: Orchestrator, domains: Sequence[str]) -> dict[str, str]:
    """Return what libvirt knows domains by."""
    found = {}
    for name in domains:
        record = await orch._context.catalog.domain(name)  # noqa: SLF001 - no user needs to know
        if (last := record.handle or record.template) is not None:
            found[name] = last.data.get("uuid", "")
    return found


async def main(*command: str) -> int:
    """Operate until dead."""
    root, domain, where, victim, *arguments = command
    async with open_orchestrator(root, recover=False) as orch:
        death = Death(root, domain, where, victim, await _uuids(orch, domain.split(",")))
        death.watch()
        try:
            await operate(orch, domain, *arguments)
        except SnaporchError as error:
            if arguments[0].startswith(FAILING) and isinstance(error, OperationFailed):
                return 0 if death.came else NEVER
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            return 1
    return 0 if death.came else NEVER


class Mortals:
    """Operations that may die, each in a process of its own: a program that has all imports forks them."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def start(self, *words: str) -> int:
        """Begin an operation; return its process id."""
        if self._program.stdin is None:
            raise AssertionError("it is a pipe")
        self._program.stdin.write(f"{json.dumps(words)}\n")
        self._program.stdin.flush()
        return int(await self._line())

    async def ended(self) -> tuple[int, str]:
        """Wait for the end of the one that was begun; return its status (a signal is negative) and what it said."""
        status, said = json.loads(await self._line())
        return status, said

    async def _line(self) -> str:
        if self._program.stdout is None:
            raise AssertionError("it is a pipe")
        return await trio.to_thread.run_sync(self._program.stdout.readline, abandon_on_cancel=True)

    def close(self) -> None:
        """End the program; no operation may be under way."""
        self._program.communicate()


def serve() -> None:
    """Do what is read from standard input, see above."""
    for line in sys.stdin:
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.dup2(write, 1)
            os.closerange(3, write + 1)
            sys.exit(trio.run(main, *json.loads(line)))
        os.close(write)
        print(pid, flush=True)  # noqa: T201 - said to `Mortals`
        with os.fdopen(read) as output:
            said = output.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]), flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(trio.run(main, *sys.argv[1:]))
    serve()
