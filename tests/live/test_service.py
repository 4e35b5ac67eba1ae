"""The service is stopped and killed in the middle of creates: the next one completes or undoes them."""

from __future__ import annotations

import signal
from contextlib import suppress
from functools import partial

import pytest
import trio

from snaporch import CreateFlag, CreateOptions, DomainSnapshot, SnaporchError, open_client
from snaporch.client import Client
from snaporch.engine.states import State
from tests.cli.conftest import Program
from tests.live.world import NAME, SECONDS, SLOW, SLOW_BANDWIDTH, MakeWorld
from tests.service.test_server import serving

pytestmark = pytest.mark.live

# Where a create is, and what the service is sent then; what has become of it at the end, where that is certain.
CUTS = (
    (State.PREPARING, signal.SIGTERM, None),
    (State.STREAMING, signal.SIGTERM, State.COMPLETE),
    (State.ARMING, signal.SIGKILL, None),
    (State.PREPARING, signal.SIGKILL, None),
    (State.STREAMING, signal.SIGKILL, State.COMPLETE),
    (State.COMMITTING, signal.SIGKILL, None),
)


async def create_and_cut(program: Program, name: str, state: State, how: signal.Signals) -> None:
    """Begin a create by a service, and send that a signal when the create is in a state."""

    async def create(client: Client) -> None:
        options = CreateOptions(bandwidth=SLOW_BANDWIDTH)
        with suppress(SnaporchError):  # it is left, or the service is gone; the journal says what has become of it
            await client.create(NAME, DomainSnapshot(name), CreateFlag.LIVE, options)

    with serving(program) as process:
        async with open_client(program.directory / "root") as client:
            async with client.events() as events, trio.open_nursery() as nursery:
                nursery.start_soon(create, client)
                async for event in events:
                    if event.state == state:
                        process.send_signal(how)
                        break
            await trio.to_thread.run_sync(partial(process.wait, SECONDS))
        assert process.returncode == (0 if how is signal.SIGTERM else -how)


@pytest.mark.window("the rate of the stream")
async def test_cut_short_in_any_state(make_world: MakeWorld) -> None:
    """The guest never stops for it; what can go on goes on, under its id, and can be gone back to.

    Half of the cuts with each QEMU: they are the service's.
    """
    world = await make_world(append=SLOW)
    program = Program(world.directory)
    for number, (state, how, wanted) in list(enumerate(CUTS))[world.qemu.old :: 2]:
        name = f"cut-{number}"
        await create_and_cut(program, name, state, how)
        await world.check_runs()
        with serving(program):
            async with open_client(world.root) as client:
                with trio.fail_after(SECONDS):
                    while (last := (await client.operations())[-1]).ended is None:  # noqa: ASYNC110 - it is asked
                        await trio.sleep(0.05)
                assert last.subject == name
                assert last.state in {State.COMPLETE, State.ROLLED_BACK}
                assert wanted in {None, last.state}
                there = name in [record.name for record in await client.list(NAME)]
                assert there == (last.state == State.COMPLETE)
                if there:
                    assert (await client.verify(NAME, name)).ok
                    await client.revert(NAME, name)
                    await world.check_consistent()
