"""The client over a real socket: what it returns and raises is what the orchestrator does."""

from __future__ import annotations

import gc
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import httpx2
import pytest
import trio
import trio.testing

from snaporch import (
    Busy,
    Client,
    CloneOptions,
    CreateFlag,
    CreateOptions,
    DeadlineExceeded,
    DeleteFlag,
    DeviceDisk,
    DiskSnapshot,
    DomainDefinition,
    DomainSnapshot,
    DomainState,
    NotEnoughSpace,
    OnTimeout,
    Orchestrator,
    Refused,
    RevertFlag,
    ServiceGone,
    SnaporchError,
    open_client,
)
from snaporch.drivers.local.sockets import address
from snaporch.model.record import Event, EventKind
from snaporch.model.request import Strategy
from snaporch.service.config import Config
from snaporch.service.doors import doors, listening
from snaporch.service.owner import owned, tell
from snaporch.service.quiet import PASSAGES
from snaporch.service.roles import Role
from snaporch.service.server import run_http
from snaporch.service.service import Service, open_service
from snaporch.testing import SimulatedWorld, open_simulated_world

# Of the process where operations run.
HERE_ONLY = {
    "broadcast",
    "leave",
    "confine",
    "prune_journal",
    "retire",
    "room_for",
    "import_archive",
    "export",
    "export_disk",
}
SECONDS = 30.0


@attrs.frozen
class Served:
    """A service on a simulated domain, and a client of it."""

    world: SimulatedWorld
    service: Service
    client: Client
    socket: str


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Serve a root whose path is longer than a unix socket's address may be."""
    root = tmp_path / ("long-" * 20)
    path = str(root / "service.sock")
    async with open_simulated_world(root) as world:
        with owned(root) as lock, listening(Config(), path) as sockets:
            async with (
                open_service(world.orchestrator, Config(directories=("/images",))) as service,
                trio.open_nursery() as nursery,
            ):
                stopping = trio.Event()
                nursery.start_soon(run_http, service, doors(sockets, service.config, None), stopping)
                tell(lock, path)
                async with open_client(root) as client:
                    yield Served(world, service, client, path)
                service.feed.drain()
                stopping.set()


def test_the_methods_are_the_same() -> None:
    """Whatever the orchestrator has in public, the client has under the same name with the same parameters."""
    for name, method in inspect.getmembers(Orchestrator, inspect.isfunction):
        if name.startswith("_") or name in HERE_ONLY:
            continue
        ours = inspect.signature(getattr(Client, name))
        theirs = inspect.signature(method)
        assert [*ours.parameters] == [*theirs.parameters], name
        for ours_, theirs_ in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
            assert (ours_.default, ours_.kind) == (theirs_.default, theirs_.kind), name


async def test_answers_and_errors_are_the_same(served: Served) -> None:
    """Each call through the service gives what the same call in process gives."""
    client, orch = served.client, served.world.orchestrator
    record = await client.create("web1", DomainSnapshot("one", "said"), CreateFlag.LIVE)
    assert record == await orch.show("web1", "one") == await client.show("web1", "one")
    assert await client.list("web1") == await orch.list("web1")
    assert await client.tree("web1") == await orch.tree("web1") == {None: ("one",)}
    assert await client.current("web1") == "one"
    assert await client.verify("web1", "one") == await orch.verify("web1", "one")
    assert await client.intact("web1", "one")
    assert (await client.pin("web1", "one")).pinned
    assert (await client.edit("web1", "one", description="x")).snapshot.description == "x"
    assert (await client.edit("web1", "one", new_name="two")).name == "two"
    assert (await orch.edit("web1", "two", new_name="one")).id == record.id
    back, again = await client.revert("web1", "one"), await orch.revert("web1", "one")
    assert (back.name, back.way, again.way) == ("one", "beside", "beside")
    assert back.outage_seconds is not None
    assert (await client.pause("web1")).state == "paused"
    assert await client.resume("web1") == await orch.domain_info("web1")
    assert (await client.tag("web1", ["a", "b"])).tags == ("a", "b")
    assert await client.domains() == await orch.domains()
    assert await client.is_active("web1")
    journal = {record.id for record in await orch.operations()}
    assert {record.id for record in await client.operations("web1")} == journal
    assert await client.recover() == await orch.recover() == ()
    assert await client.create_group(["web1"], DomainSnapshot("two"), CreateFlag.LIVE) == (
        await orch.show("web1", "two"),
    )
    assert [back.name for back in await client.revert_group(["web1"], "two")] == ["two"]
    assert await client.fsck() == await orch.fsck()
    assert await client.doctor() == await orch.doctor()
    assert await client.estimate("web1", Strategy.PRECOPY) == await orch.estimate("web1", Strategy.PRECOPY)


INSIDE = tuple(DiskSnapshot(DeviceDisk(target), external=False) for target in ("vda", "vdb"))
# Of domain web1 with snapshots one, and two after it; web2 is inactive.
REFUSALS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "exists": lambda o: o.create("web1", DomainSnapshot("one"), CreateFlag.LIVE),
    "exists as a file": lambda o: o.create("web1", DomainSnapshot("x", memory_file="/images/web1-vda")),
    "no name": lambda o: o.create("web1", DomainSnapshot("a/b")),
    "disks of a running guest": lambda o: o.create("web1", None, CreateFlag.DISK_ONLY),
    "live without memory": lambda o: o.create("web1", None, CreateFlag.DISK_ONLY | CreateFlag.LIVE),
    "no agent": lambda o: o.create("web1", None, CreateFlag.LIVE | CreateFlag.QUIESCE),
    "live inside": lambda o: o.create("web1", DomainSnapshot(disks=INSIDE), CreateFlag.LIVE),
    "half inside": lambda o: o.create("web1", DomainSnapshot(disks=INSIDE[:1])),
    "no such disk": lambda o: o.create("web1", None, options=CreateOptions(exclude=["sdz"])),
    "left out and asked for": lambda o: o.create(
        "web1", DomainSnapshot(disks=INSIDE), options=CreateOptions(exclude=["vda"])
    ),
    "nobody": lambda o: o.create("nobody"),
    "memory of an inactive domain": lambda o: o.create("web2"),
    "quiesce an inactive domain": lambda o: o.create("web2", None, CreateFlag.DISK_ONLY | CreateFlag.QUIESCE),
    "no such group": lambda o: o.create_group(["web1", "nobody"]),
    "a group with a domain twice": lambda o: o.create_group(["web1", "web1"]),
    "a group with one inactive": lambda o: o.create_group(["web1", "web2"], DomainSnapshot("x")),
    "a precopy of a group": lambda o: o.create_group(
        ["web1", "web3"], DomainSnapshot("x"), options=CreateOptions(strategy=Strategy.PRECOPY)
    ),
    "a group of nobody": lambda o: o.create_group([]),
    "no such snapshot": lambda o: o.show("web1", "none"),
    "verify none": lambda o: o.verify("web1", "none"),
    "pin none": lambda o: o.pin("web1", "none"),
    "edit none": lambda o: o.edit("web1", "none", new_name="x"),
    "edit nothing": lambda o: o.edit("web1", "one"),
    "rename a part": lambda o: o.edit("web1", "group", new_name="x"),
    "a name that is taken": lambda o: o.edit("web1", "one", new_name="two"),
    "revert to none": lambda o: o.revert("web1", "none"),
    "running and paused": lambda o: o.revert("web1", "one", RevertFlag.RUNNING | RevertFlag.PAUSED),
    "save under a name that exists": lambda o: o.revert("web1", "one", save_current="two"),
    "revert a group with a domain twice": lambda o: o.revert_group(["web1", "web1"], "one"),
    "revert a group to none": lambda o: o.revert_group(["web1", "web3"], "one"),
    "revert a part": lambda o: o.revert("web1", "group"),
    "delete none": lambda o: o.delete("web1", "none"),
    "plan to delete none": lambda o: o.delete("web1", "none", dry_run=True),
    "children and only them": lambda o: o.delete("web1", "one", DeleteFlag.CHILDREN | DeleteFlag.CHILDREN_ONLY),
    "delete a part": lambda o: o.delete("web1", "group"),
    "delete a group's none": lambda o: o.delete_group(["web1"], "none"),
    "plan that": lambda o: o.delete_group(["web1"], "none", dry_run=True),
    "flatten none": lambda o: o.flatten("web1", "none"),
    "flatten to no depth": lambda o: o.flatten("web1", depth=0),
    "plan that flatten": lambda o: o.flatten("web1", depth=0, dry_run=True),
    "no depth": lambda o: o.limit_depth("web1", 1),
    "no domain's name": lambda o: o.domain_info("a/b"),
    "no domain": lambda o: o.operations("nobody"),
    "undefine what runs": lambda o: o.undefine("web1"),
    "start what runs": lambda o: o.start("web1"),
    "stop what does not": lambda o: o.shutdown("web2"),
    "pause what does not run": lambda o: o.pause("web2"),
    "no tag": lambda o: o.tag("web1", ["a b"]),
    "define what runs": lambda o: o.define(DomainDefinition("web1", driver="simulated")),
    "attach what runs": lambda o: o.attach("web1", "/images/no.sock", driver="simulated"),
    "no strategy": lambda o: o.estimate("web1", Strategy.AUTO),
    "estimate nobody": lambda o: o.estimate("nobody"),
    "estimate what does not run": lambda o: o.estimate("web2"),
    "fsck nobody": lambda o: o.fsck("nobody"),
}


async def test_every_refusal_is_the_same(served: Served) -> None:
    """The same class, the same text, all that the error knows; and nothing was touched."""
    client, orch, world = served.client, served.world.orchestrator, served.world
    for name in ("web2", "web3"):
        world.host.add_image(f"/images/{name}")
        disks = (DeviceDisk("vda", f"/images/{name}"),)
        await orch.define(DomainDefinition(name, memory=2**30, disks=disks, driver="simulated"))
    await orch.start("web3")
    await orch.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
    await orch.create_group(["web1", "web3"], DomainSnapshot("group"), CreateFlag.LIVE)
    await orch.create("web1", DomainSnapshot("two"), CreateFlag.LIVE)
    before = await world.everything()
    accepted, different = [], {}
    for what, call in REFUSALS.items():
        errors = []
        for who in (client, orch):
            try:
                await call(who)
            except SnaporchError as error:
                errors.append((type(error), str(error), vars(error), error.http_status, error.exit_code))
            else:
                accepted.append((what, type(who).__name__))
        if errors[:1] != errors[1:]:
            different[what] = errors
    assert (accepted, different) == ([], {})
    assert await world.everything() == before


async def test_what_is_asked_for_is_done(served: Served) -> None:
    """Strategies, limits and disks left out go through the service as they are."""
    for strategy in (Strategy.BACKGROUND, Strategy.PRECOPY):
        options = CreateOptions(strategy=strategy, exclude=["vdb"])
        record = await served.client.create("web1", DomainSnapshot(str(strategy)), CreateFlag.LIVE, options)
        assert record.strategy is strategy
        assert record.reason == "asked for"
        assert list(record.images) == ["vda"]
    late = CreateOptions(bandwidth=served.world.slow, max_seconds=0.1)
    with pytest.raises(DeadlineExceeded):
        await served.client.create("web1", DomainSnapshot("late"), CreateFlag.LIVE, late)
    paused = attrs.evolve(late, on_timeout=OnTimeout.PAUSE)
    assert (await served.client.create("web1", DomainSnapshot("late"), CreateFlag.LIVE, paused)).name == "late"


async def test_clones_are_the_same(served: Served) -> None:
    """They are made, named, and discarded, over the wire as here."""
    client, domain = served.client, served.world.domain
    await client.create(domain, DomainSnapshot("p"), CreateFlag.LIVE)
    made = await client.clone(domain, "p", "copy", CloneOptions(count=2, state=DomainState.PAUSED))
    assert [(each.name, each.state) for each in made] == [("copy-1", "paused"), ("copy-2", "paused")]
    assert (
        await client.clones(domain) == {"p": ("copy-1", "copy-2")} == await served.world.orchestrator.clones(domain)
    )
    origin = (await client.domain_info("copy-1")).origin
    assert origin is not None
    assert (origin.domain, origin.name) == (domain, "p")
    for call in (client.delete(domain, "p"), client.clone(domain, "p", domain), client.undefine("copy-1")):
        with pytest.raises(Refused):
            await call
    for each in made:
        await client.destroy(each.name)
        await client.undefine(each.name, discard=True)
    assert [info.name for info in await client.domains()] == [domain]


async def test_no_space_is_the_same(served: Served) -> None:
    """How much is needed and how much is free is known through the service, too."""
    served.world.host.mount("/images", 2**20)
    served.world.host.mount(str(served.world.orchestrator.root), 2**20)
    errors = []
    for who in (served.client, served.world.orchestrator):
        with pytest.raises(NotEnoughSpace) as caught:
            await who.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
        errors.append((str(caught.value), vars(caught.value)))
    assert errors[0] == errors[1]
    assert await served.client.list("web1") == ()


async def test_events_are_the_same(served: Served) -> None:
    """The client's channel has what the orchestrator's has, from the first state to the last."""
    seen: dict[str, list[tuple[str, str]]] = {"client": [], "orchestrator": []}

    async def follow(who: str, channel: trio.MemoryReceiveChannel[Event]) -> None:
        async for event in channel:
            if event.state != "queued":
                seen[who].append((event.kind, event.state))
            if event.state == "complete":
                return

    async with (
        served.client.events() as theirs,
        served.world.orchestrator.events() as ours,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(follow, "client", theirs)
        nursery.start_soon(follow, "orchestrator", ours)
        await served.client.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
    assert seen["client"] == seen["orchestrator"]
    assert ("state", "streaming") in seen["client"]


@pytest.mark.window("the rate of the stream")
async def test_a_cancelled_call_cancels_its_operation(served: Served) -> None:
    """When the call ends, the operation is rolled back; the next one is not busy."""
    before = (await served.world.everything())["files"]
    slow = CreateOptions(bandwidth=served.world.slow)
    with trio.CancelScope() as scope:
        async with served.client.events() as events, trio.open_nursery() as nursery:
            nursery.start_soon(served.client.create, "web1", DomainSnapshot("one"), CreateFlag.LIVE, slow)
            async for event in events:
                if event.state == "streaming":
                    with pytest.raises(Busy, match=event.operation):
                        await served.client.revert("web1", "one")
                    scope.cancel()
    assert scope.cancelled_caught
    assert (await served.world.everything())["files"] == before
    assert not await served.client.list("web1")
    assert [op.state for op in await served.client.operations()] == ["rolled-back"]


async def test_a_client_that_dies_ends_nothing(served: Served) -> None:
    """The operation is the service's; whoever asks with its id is told how it ended."""
    with address(served.socket) as where:
        transport = httpx2.AsyncHTTPTransport(uds=where)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            body = {"snapshot": {"name": "one"}, "flags": ["live"]}
            begun = (await http.post("/v1/domains/web1/snapshots", json=body)).json()
    async with open_client(served.client.root) as another:
        assert (
            await another.create("web1", DomainSnapshot("two"), options=CreateOptions(wait=True))
        ).parent == "one"
        ended = {record.id: record.state for record in await another.operations()}
    assert ended[begun["id"]] == "complete"


async def test_a_follower_that_comes_back_misses_nothing(served: Served) -> None:
    """Its connection breaks in mid-stream; the events go on after the last one that it has seen."""
    numbers: list[int] = []
    last = ""

    async def read(count: int) -> None:
        nonlocal last
        headers = {"last-event-id": last} if last else {}
        with trio.CancelScope() as broken:
            async with served.client._service.http.stream("GET", "/v1/events", headers=headers) as response:
                async for line in response.aiter_lines():
                    if line.startswith("id: "):
                        last = line[4:]
                        numbers.append(int(last.partition("-")[2]))
                    if len(numbers) >= count:
                        broken.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 3)
        while not served.service.streams:  # noqa: ASYNC110 - nothing tells that a follower has come
            await trio.sleep(0.01)
        await served.client.create("web1", DomainSnapshot("one"), CreateFlag.LIVE)
    await read(served.service.feed._next - 1)
    assert numbers == list(range(1, served.service.feed._next))


@pytest.mark.parametrize("by", ["leaving", "cancelling"])
async def test_a_follower_goes_while_more_comes(served: Served, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """It goes although it has not taken what has come; the connection is read to its end (else pytest warns)."""
    monkeypatch.setattr("snaporch.client.connection.BUFFER", 0)
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with served.client.events() as events:
            for number in range(10):
                served.service.feed.publish(Event("0", ("web1",), EventKind.PROGRESS, 0.0, "streaming", number))
            assert (await events.receive()).done == 0
            await trio.testing.wait_all_tasks_blocked(0.1)
            if by == "cancelling":
                scope.cancel()
                await trio.sleep_forever()
    gc.collect()
    while served.service.streams:  # noqa: ASYNC110 - nothing tells that a follower has gone
        await trio.sleep(0.01)


async def test_followers_are_limited_and_end(served: Served) -> None:
    """One more than may is refused; when the service stops each is told, and its connection ends."""
    served.service.reload(attrs.evolve(served.service.config, streams=1))
    async with served.client._service.http.stream("GET", "/v1/events") as response:
        lines = response.aiter_lines()
        await anext(lines)
        headers = {"authorization": f"Bearer {served.service.tokens.make('another', Role.ADMIN)}"}
        assert (await served.client._service.http.get("/v1/events", headers=headers)).status_code == 503
        served.service.feed.drain()
        said = [line async for line in lines]
    assert "event: draining" in said


async def test_slow_clients_hold_nothing_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not read what it has asked for is let go, a follower too; the others never notice."""
    monkeypatch.setattr("snaporch.service.doors.SEND_SECONDS", 5.0)
    async with AsyncExitStack() as stack:
        where, slow = stack.enter_context(address(served.socket)), []
        for _ in range(2 * PASSAGES):
            follower = stack.enter_context(trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            await follower.connect(where)
            await follower.send(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
            slow.append(follower)
        while served.service.streams < len(slow):  # noqa: ASYNC110 - nothing tells that a follower has come
            await trio.sleep(0.01)
        for number in range(5_000):
            served.service.feed.publish(Event("0", ("web1",), EventKind.PROGRESS, 0.0, "streaming", number))
        for _ in range(50):
            assert (await served.client.domain_info("web1")).name == "web1"
        assert served.service.streams == len(slow)
        with trio.fail_after(SECONDS):
            while served.service.streams:  # noqa: ASYNC110 - as above
                await trio.sleep(0.1)


async def test_a_service_that_is_gone_is_told(tmp_path: Path) -> None:
    """Where no service is, or no longer, that is what the error says."""
    with pytest.raises(ServiceGone):
        async with open_client(tmp_path):
            pass
    async with open_client(url="http://127.0.0.1:9") as nobody:
        with pytest.raises(ServiceGone):
            await nobody.domains()
