"""Measures the service under many clients: no event lost, quick answers, flat memory, pauses no longer than alone.

    scripts/bench service [--rounds N] [--creates N] [--followers N] [--pollers N] [--out FILE]

A round is a few creates of a real guest with nobody else there, and then the same again while 200 clients follow
events, 50 ask once a second, and 20 simulated domains are created from. A few more clients ask for what costs the
service nothing: what they wait is the host's doing; all who ask have real-time priority, so that what is measured
is not how long they wait for a CPU themselves. After each round, with nobody there, old snapshots are deleted,
as on any host that goes on for long. The service, the followers and the pollers are a process each,
on one host, over a unix socket; the followers, which in earnest are elsewhere, have a low priority.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import attrs
import structlog
import trio
from benchlib.lab import CACHE, ROOT, Qemu, pick, qemus, workplace

from snaporch import CreateFlag, DeviceDisk, DomainDefinition, DomainSnapshot, open_client, open_orchestrator
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.simulated import SimulatedDriver, SimulatedHost
from snaporch.engine.realtime import take_priority
from snaporch.guest.build import build_tiny
from snaporch.service.config import Config
from snaporch.service.doors import doors, listening
from snaporch.service.owner import SOCKET, owned, tell
from snaporch.service.server import run_http
from snaporch.service.service import open_service

GUEST, SIMULATED = "guest", 20
KEPT = 3  # snapshots of each domain that the next round begins with
MIB = 2**20
POLL_SECONDS = 1.0
ELSEWHERE = 10  # how nice followers are: in earnest they are on other hosts, and do not take the service's CPUs
ASKED = ("/v1/operations?limit=20", f"/v1/domains/{GUEST}/snapshots?limit=20")  # in turns
TRIVIAL, TRIVIAL_POLLERS = "/v1/health", 5
FOLLOW = b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n"
_ID = re.compile(rb"^id: \w+-(\d+)$", re.MULTILINE)


# --- the service: a process of its own ----------------------------------------------------------------------


async def serve(root: Path, image_tool: str, *, realtime: bool) -> None:
    """Serve a root with a real and a simulated driver until standard input ends."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # nobody reads it
    host = SimulatedHost()
    config = Config(directories=("/images", str(root.parent)), running=SIMULATED + 2, realtime=realtime)
    if config.realtime:
        take_priority()
    drivers = {"qemu": QemuDriver(storage=LocalStorage(image_tool)), "simulated": SimulatedDriver(host)}
    path, stopping = str(root / SOCKET), trio.Event()
    async with open_orchestrator(root, drivers=drivers, realtime=config.realtime) as orchestrator:
        for number in range(SIMULATED):
            disk = host.add_image(f"/images/sim{number}")
            disks = (DeviceDisk("vda", disk.path),)
            definition = DomainDefinition(f"sim{number}", memory=2**30, disks=disks, driver="simulated")
            await orchestrator.define(definition)
            await orchestrator.start(definition.name)
        with owned(root) as lock, listening(config, path) as sockets:
            async with open_service(orchestrator, config) as service, trio.open_nursery() as nursery:
                nursery.start_soon(run_http, service, doors(sockets, config, None), stopping)
                tell(lock, path)
                print("ready", flush=True)
                await trio.to_thread.run_sync(sys.stdin.read)
                service.feed.drain()
                stopping.set()


# --- the clients: two processes -----------------------------------------------------------------------------


async def follow(path: str, count: int) -> None:
    """Follow events `count` times until the service says that it is enough; print what was seen as JSON."""
    seen: list[list[int]] = [[] for _ in range(count)]
    os.nice(ELSEWHERE)

    async def one(numbers: list[int], task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114
        stream = await trio.open_unix_socket(path)
        await stream.send_all(FOLLOW)
        rest = await stream.receive_some()
        task_status.started()
        async for chunk in stream:
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            numbers += [int(found) for found in _ID.findall(whole + newline)]

    async with trio.open_nursery() as nursery:
        for numbers in seen:
            await nursery.start(one, numbers)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()
    bad = sum(numbers != list(range(numbers[0], numbers[0] + len(numbers))) for numbers in seen if numbers)
    lengths = [len(numbers) for numbers in seen]
    print(json.dumps({"events": max(lengths), "least": min(lengths), "bad": bad}), flush=True)


async def poll(path: str, count: int) -> None:
    """Ask once a second `count` times side by side; print how long the answers took, in seconds, by URL."""
    took: dict[str, list[float]] = {url: [] for url in (*ASKED, TRIVIAL)}
    take_priority()

    async def one(delay: float, urls: tuple[str, ...]) -> None:
        await trio.sleep(delay)
        stream = await trio.open_unix_socket(path)
        for url in cycle(urls):
            began = time.perf_counter()
            await stream.send_all(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive_some()
            head, _, body = answer.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            while len(body) < length:
                body += await stream.receive_some()
            took[url].append(time.perf_counter() - began)
            await trio.sleep(POLL_SECONDS)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number * POLL_SECONDS / count, ASKED)
        for number in range(TRIVIAL_POLLERS):
            nursery.start_soon(one, number * POLL_SECONDS / TRIVIAL_POLLERS, (TRIVIAL,))
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()
    print(json.dumps(took), flush=True)


# --- the measurement ----------------------------------------------------------------------------------------


@attrs.frozen
class Found:
    """What was measured: pauses alone and under load, answers, followers and memory of each round."""

    quiet: list[float]
    loaded: list[float]
    took: dict[str, list[float]]
    follows: list[dict[str, int]]
    sizes: list[int]


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[subprocess.Popen[str]]:
    """Run a part of this program; it ends when its standard input does."""
    pipe = subprocess.PIPE
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:  # noqa: ASYNC220 - it says when it is ready
        assert process.stdout is not None and process.stdin is not None  # noqa: S101, PT018 - they are pipes
        await trio.to_thread.run_sync(process.stdout.readline)
        yield process
        if not process.stdin.closed:
            process.stdin.close()


async def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """End a child and return what it says."""
    assert process.stdout is not None and process.stdin is not None  # noqa: S101, PT018 - they are pipes
    process.stdin.close()
    found: dict[str, Any] = json.loads(await trio.to_thread.run_sync(process.stdout.read))
    return found


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


async def creates(root: Path, prefix: str, count: int) -> list[float]:
    """Create a few snapshots of the real guest, one after the other; return their pauses."""
    pauses = []
    async with open_client(root) as client:
        for number in range(count):
            record = await client.create(GUEST, DomainSnapshot(f"{prefix}-{number}"), CreateFlag.LIVE)
            pauses.append(record.timings.pause or 0.0)
    return pauses


async def simulated(root: Path, prefix: str) -> None:
    """Create a snapshot of every simulated domain, all at once."""
    async with open_client(root) as client, trio.open_nursery() as nursery:
        for number in range(SIMULATED):
            nursery.start_soon(client.create, f"sim{number}", DomainSnapshot(prefix), CreateFlag.LIVE)


async def prune(root: Path) -> None:
    """Delete the oldest snapshots of every domain."""
    async with open_client(root) as client:
        for domain in await client.domains():
            for record in (await client.list(domain.name))[:-KEPT]:
                await client.delete(domain.name, record.name)


async def measure(options: argparse.Namespace, place: Path, qemu: Qemu) -> Found:
    """Run everything in `place`, and return what was found."""
    root = place / "root"
    root.mkdir(mode=0o700)
    image = str(place / "vda.qcow2")
    await trio.run_process([qemu.img, "create", "-q", "-f", "qcow2", image, "64M"])
    kernel = build_tiny(CACHE / "guest")
    shutil.copy(kernel, place / "kernel")  # into a directory that the service may use
    made = DomainDefinition(
        GUEST,
        memory=256 * MIB,
        accel="tcg",
        machine="q35",
        emulator=qemu.emulator,
        kernel=str(place / "kernel"),
        append="rate=200 dirty=20 ram=64",
        disks=(DeviceDisk("vda", image),),
    )
    quiet: list[float] = []
    loaded: list[float] = []
    took: dict[str, list[float]] = {url: [] for url in (*ASKED, TRIVIAL)}
    follows: list[dict[str, int]] = []
    sizes: list[int] = []
    how = ["--serve", str(root), "--image-tool", qemu.img, *["--normal"] * options.normal]
    async with child(*how) as service, open_client(root) as client:
        await client.define(made)
        await client.start(GUEST)
        path = str(root / SOCKET)
        try:
            await trio.sleep(2.0)  # the guest boots
            await creates(root, "warm", options.creates)
            for number in range(options.rounds):
                quiet += await creates(root, f"quiet{number}", options.creates)
                async with (
                    child("--follow", path, "--count", str(options.followers)) as followers,
                    child("--poll", path, "--count", str(options.pollers)) as pollers,
                ):
                    await trio.sleep(1.0)  # all are connected
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(simulated, root, f"round{number}")
                        loaded += await creates(root, f"loaded{number}", options.creates)
                    sizes.append(resident(service.pid))
                    await trio.sleep(1.0)  # the last events are read
                    for url, seconds in (await result(pollers)).items():
                        took[url] += seconds
                    follows.append(await result(followers))
                await prune(root)
        finally:
            with trio.move_on_after(10, shield=True):
                await client.destroy(GUEST)
    return Found(quiet, loaded, took, follows, sizes)


def quantile(seconds: list[float], part: float) -> float:
    """Return a quantile in milliseconds."""
    return sorted(seconds)[int(len(seconds) * part)] * 1000


def page(found: Found, options: argparse.Namespace, qemu: Qemu) -> str:
    """Return what was found as Markdown."""
    alone, loaded = (statistics.median(pauses) * 1000 for pauses in (found.quiet, found.loaded))
    every = [seconds for url in ASKED for seconds in found.took[url]]
    rounds = len(found.follows)
    bad = sum(each["bad"] for each in found.follows)
    short = sum(each["events"] != each["least"] for each in found.follows)
    sizes = ", ".join(f"{size / MIB:.1f}" for size in found.sizes)
    rows = [
        ("followers that missed an event or had one out of order", "0", f"{bad} of {options.followers * rounds}"),
        ("rounds in which not all followers had the same events", "0", f"{short} of {rounds}"),
        ("events to each follower, all rounds", "", f"{sum(each['events'] for each in found.follows)}"),
        ("GET, median", "", f"{quantile(every, 0.5):.1f} ms"),
        ("GET, 99th percentile", "< 50 ms", f"{quantile(every, 0.99):.1f} ms of {len(every):,} requests"),
        *((f"`{url}`, 99th percentile", "", f"{quantile(found.took[url], 0.99):.1f} ms") for url in ASKED),
        (f"`{TRIVIAL}`, median", "", f"{quantile(found.took[TRIVIAL], 0.5):.1f} ms"),
        (f"`{TRIVIAL}`, 99th percentile", "", f"{quantile(found.took[TRIVIAL], 0.99):.1f} ms"),
        ("pause of a real create, alone, median", "", f"{alone:.1f} ms"),
        ("pause of a real create, under load, median", "", f"{loaded:.1f} ms"),
        ("ratio of the two", "<= 1", f"{loaded / alone:.2f}"),
        ("memory of the service after each round", "flat", f"{sizes} MiB"),
    ]
    lines = [f"| {name} | {target} | {value} |" for name, target, value in rows]
    head = (
        f"# The service under load\n\n`scripts/bench service`: {options.rounds} rounds, QEMU {qemu.version} under "
        f"TCG, {os.cpu_count()} CPUs for everything. {options.followers} clients follow events and\n"
        f"{options.pollers} ask every {POLL_SECONDS:g} s, over a unix socket, while {SIMULATED} simulated domains "
        f"and a real guest ({options.creates} times) are created from.\n{TRIVIAL_POLLERS} more ask `{TRIVIAL}`, "
        "which costs nothing: what they wait is the host's doing. Alone and under load take turns\nin one run. "
        f"Load average at the end: {os.getloadavg()[0]:.1f}.\n\n"
    )
    return head + "\n".join(["| what | target | found |", "|---|---|---|", *lines]) + "\n"


def main() -> None:
    """Measure, or be a part of that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--creates", type=int, default=5, help="of the real guest, alone and again under load")
    parser.add_argument("--followers", type=int, default=200)
    parser.add_argument("--pollers", type=int, default=50)
    parser.add_argument("--normal", action="store_true", help="the service without real-time priority")
    parser.add_argument("--qemu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/evidence/bench/service.md")
    for part in ("--serve", "--follow", "--poll", "--image-tool", "--count"):
        parser.add_argument(part, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(partial(serve, Path(options.serve), options.image_tool, realtime=not options.normal))
    elif options.follow:
        trio.run(follow, options.follow, int(options.count))
    elif options.poll:
        trio.run(poll, options.poll, int(options.count))
    else:
        qemu = pick(qemus(CACHE), options.qemu)
        with workplace(CACHE / "lab") as place:
            found = trio.run(measure, options, place, qemu)
        text = page(found, options, qemu)
        options.out.write_text(text)
        print(text)


if __name__ == "__main__":
    main()
