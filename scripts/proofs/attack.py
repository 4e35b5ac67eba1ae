"""Attacks a service of its own, over loopback: requests of every role, connections, images and lines.

    scripts/proof attack [--requests 5000] [--connections 2000] [--images 5000] [--seed N] [--patience 1]

For each role so many requests, made from the table of URLs with values that mean harm: halves of characters, NUL,
numbers without end, paths that lead elsewhere, JSON without bottom. Meanwhile connections are opened that say
nothing, or half of something, and root asks over the unix socket, which is timed. Then headers of qcow2 images with
bits changed, and lines that are not QMP. In the end no answer was a 5xx but a refusal for want of places (503) or
room (507), the root holds what it held and its domains' directories, and root's answers came within patience.

Exit status: 0 when all is so, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import httpx2
import structlog
import trio
import trio.lowlevel

from snaporch.drivers.local.lineage import lineage
from snaporch.drivers.qmp.wire import Decoder
from snaporch.errors import ProtocolError, Refused
from snaporch.service.api import ROUTES
from snaporch.service.call import Route
from snaporch.service.config import Config
from snaporch.service.doors import doors, listening
from snaporch.service.roles import TOKENS, Role, Tokens
from snaporch.service.server import run_http
from snaporch.service.service import open_service
from snaporch.testing import open_simulated_world

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *("\ud800", "a\0b", "", " ", "..", "../../etc/shadow", "/etc/shadow", "/proc/self/root/etc/shadow", "json:{}"),
    *("nbd://127.0.0.1:1/x", "plans", "service.toml", "tokens.json", "web1", "web1,web1", "-x", "%s%n", "💥" * 20),
    *("pc,initrd=/etc/shadow", "x" * 70_000, "ROOT/plans/x.toml", "ROOT/tokens.json", "/images/../etc/x"),
    *(
        0,
        -1,
        2**31,
        2**63,
        2**64,
        10**30,
        0.5,
        -1e308,
        1e308,
        True,
        False,
        None,
        [],
        {},
        DEEP,
        [None],
        ["web1"] * 3,
    ),
    *({"a": DEEP}, {"target": "vda", "path": "/etc/shadow"}, [{"disk": {"target": "vda"}, "external_sn": {}}]),
)
WORDS = (b"", b"GET / HT", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 999)
FINE_5XX = {503, 507}
SECONDS = 30.0
KNOWN = {"locks", "reserve.bin", "tokens.json", "tokens.lock", "web1", "web2", "service.sock"}
KNOWN |= {f"catalog.sqlite3{ending}" for ending in ("", "-wal", "-shm")}
AT_ONCE = 4  # requests of each role
SELDOM, SOMETIMES, OFTEN = 0.05, 0.2, 0.5
LONGEST = 100  # of a part of a URL


@attrs.define
class Tally:
    """What came back: how often which status, what was wrong, and how long root waited."""

    statuses: Counter[int] = attrs.field(factory=Counter)
    wrong: list[str] = attrs.field(factory=list)
    waits: list[float] = attrs.field(factory=list)


def body_of(row: Route, root: str, rng: random.Random) -> bytes:
    """Return a body for a row of the table: a few of its keys, with what means harm."""
    if row.body is None or rng.random() < SELDOM:
        return rng.choice([b"", b"[" * 100_000, b"\xff\xfe", b'{"a":', b"null", b"9" * 5_000])
    names = [field.name for field in attrs.fields(row.body)]
    chosen = {name: rng.choice(VALUES) for name in rng.sample(names, rng.randint(0, len(names)))}
    if rng.random() < SOMETIMES:
        chosen["unknown"] = rng.choice(VALUES)
    if row.path == "/v1/domains" and rng.random() > SOMETIMES:
        chosen["name"] = rng.choice(["web1", "web2", "plans", "locks"])
    return json.dumps(chosen).replace("ROOT", root).encode()


def requests(count: int, root: str, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """Yield method, URL and body of requests."""
    for _ in range(count):
        row = rng.choice(ROUTES)
        url = row.path
        for name in ("domain", "name", "id"):
            value = rng.choice(
                ["web1", *(each for each in VALUES if isinstance(each, str) and len(each) < LONGEST)]
            )
            url = url.replace(f"{{{name}}}", quote(value.encode(errors="surrogatepass"), safe="") or "x")
        asked = {name: rng.choice(VALUES) for name in row.query if name != "wait" and rng.random() < OFTEN}
        query = "&".join(
            f"{name}={quote(str(value)[:99].encode(errors='surrogatepass'))}" for name, value in asked.items()
        )
        yield row.method, f"{url}?{query}", body_of(row, root, rng)


async def ask(url: str, secret: str, made: list[tuple[str, str, bytes]], tally: Tally) -> None:
    """Send requests, one after the other."""
    headers = {"authorization": f"Bearer {secret}"}

    async def answered(method: str, path: str, body: bytes) -> httpx2.Response:
        try:
            return await http.request(method, path, content=body)
        except httpx2.RemoteProtocolError:
            # An answer to half a request is the last one of its connection, which may end just as it is used again.
            async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=SECONDS) as another:
                return await another.request(method, path, content=body)

    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=SECONDS) as http:
        for method, path, body in made:
            try:
                answer = await answered(method, path, body)
            except httpx2.TransportError as error:
                tally.wrong.append(f"{method} {path}: {error!r}")
                continue
            tally.statuses[answer.status_code] += 1
            if answer.status_code >= 500 and answer.status_code not in FINE_5XX:  # noqa: PLR2004 - HTTP's number
                tally.wrong.append(f"{method} {path} {body[:200]!r}: {answer.status_code} {answer.text[:300]}")


async def connect(port: int, count: int, rng: random.Random) -> None:
    """Open connections that say nothing, or half of something, and let go of most of them."""
    held: list[socket.socket] = []
    for _ in range(count):
        with suppress(OSError):
            made = socket.create_connection(("127.0.0.1", port))
            made.setblocking(False)
            made.send(
                rng.choice([b"", b"GET / HT", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 999])
            )
            held.append(made)
        for each in held[200:] if len(held) > 400 else ():  # noqa: PLR2004 - as many as are held at once
            each.close()
        del held[400:]
        await trio.lowlevel.checkpoint()
    for each in held:
        each.close()


async def watch(path: str, tally: Tally) -> None:
    """Ask as root, again and again, and note how long that takes."""
    transport = httpx2.AsyncHTTPTransport(uds=path)
    async with httpx2.AsyncClient(transport=transport, base_url="http://x", timeout=SECONDS) as http:
        while True:
            began = time.monotonic()
            (await http.get("/v1/whoami")).raise_for_status()
            tally.waits.append(time.monotonic() - began)
            await trio.sleep(0.02)


async def attackers(options: argparse.Namespace, root: Path, port: int, secrets: Sequence[str]) -> Tally:
    """Do what attackers do."""
    rng, tally = random.Random(options.seed), Tally()  # noqa: S311 - no secret
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, port, options.connections, rng)
        for secret in secrets:
            made = list(requests(options.requests, str(root), rng))
            for part in range(AT_ONCE):
                nursery.start_soon(ask, f"http://127.0.0.1:{port}", secret, made[part::AT_ONCE], tally)
    return tally


async def serve(config: Config, root: Path, sockets: Sequence[socket.socket], over: int, tally: Tally) -> None:
    """Serve, and ask as root, until the attackers are gone: then `over` is at its end."""
    async with open_simulated_world(root) as world, open_service(world.orchestrator, config) as service:
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(run_http, service, doors(sockets, config, None), stopping))
            async with trio.open_nursery() as watching:
                watching.start_soon(watch, str(root / "service.sock"), tally)
                await trio.lowlevel.wait_readable(over)
                watching.cancel_scope.cancel()
            stopping.set()


def attack(options: argparse.Namespace, root: Path) -> Tally:
    """Serve in this process, attack it in another, and return what came of it."""
    config = Config(listen="127.0.0.1:0", directories=("/images",))
    with listening(config, str(root / "service.sock")) as sockets:
        secrets = [Tokens(root / TOKENS).make(role.name.lower(), role) for role in Role]
        over, said = os.pipe()
        if (child := os.fork()) == 0:
            status = 1
            try:
                tally = trio.run(attackers, options, root, sockets[-1].getsockname()[1], secrets)
                found = {"statuses": list(tally.statuses.items()), "wrong": tally.wrong}
                Path(root.parent, "tally").write_text(json.dumps(found))
                status = 0
            finally:
                os._exit(status)
        os.close(said)
        tally = Tally()
        trio.run(serve, config, root, sockets, over, tally)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            tally.wrong.append("the attackers failed")
        else:
            found = json.loads(Path(root.parent, "tally").read_text())
            tally.statuses.update(dict(found["statuses"]))
            tally.wrong += found["wrong"]
    return tally


def images(count: int, place: Path, rng: random.Random, tally: Tally) -> None:
    """Read images whose headers have been changed: each is read, or refused."""
    path = place / "a.qcow2"
    backing = ["-b", "/etc/shadow", "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", *backing, str(path), "1M"], check=True)
    whole = path.read_bytes()[:4096]
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(rng.choice([8, 120, 512]))] = rng.randrange(256)
        path.write_bytes(changed[: rng.choice([len(changed), rng.randrange(200)])])
        try:
            lineage(str(path), "qcow2")
        except Refused:
            continue
        except Exception as error:  # noqa: BLE001 - that there is any is what is looked for
            tally.wrong.append(f"an image: {error!r}")


def lines(count: int, rng: random.Random, tally: Tally) -> None:
    """Decode lines that are not QMP: each is a message, or not QMP."""
    for _ in range(count):
        line = json.dumps({rng.choice(["return", "error", "event", "QMP", "id"]): rng.choice(VALUES)}).encode()
        try:
            Decoder().feed(rng.choice([line, line[::-1], line[:-1], b"[" * 50_000, b"\xff" * 99]) + b"\n")
        except ProtocolError:
            continue
        except Exception as error:  # noqa: BLE001 - as above
            tally.wrong.append(f"a line {line[:99]!r}: {error!r}")


def main() -> int:
    """Attack, say what came of it, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5_000, help="of each role")
    parser.add_argument("--connections", type=int, default=2_000)
    parser.add_argument("--images", type=int, default=5_000, help="images, and lines")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1.0, help="seconds for root's 99th percentile")
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "root")
        root.mkdir(mode=0o700)
        tally, rng = attack(options, root), random.Random(options.seed)  # noqa: S311 - no secret
        images(options.images, Path(place), rng, tally)
        lines(options.images, rng, tally)
        tally.wrong += [f"{path} is there" for path in root.iterdir() if path.name not in KNOWN]
    waits = sorted(tally.waits)
    slow = waits[int(len(waits) * 0.99)] if waits else float("inf")
    print(f"answers by status: {dict(sorted(tally.statuses.items()))}")
    print(f"root's answers: {len(waits)}, 99th percentile {slow:.3f} s, longest {waits[-1]:.3f} s")
    print("\n".join(tally.wrong[:20]) or "nothing was wrong")
    return 1 if tally.wrong or slow >= options.patience else 0


if __name__ == "__main__":
    sys.exit(main())
