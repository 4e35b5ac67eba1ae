"""More that the driver does, in dom0, for `scripts/proof xen cases [CASE…]`: each case is a line of JSON."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from snaporch import CreateFlag, DomainDefinition, DomainSnapshot, DomainState
from snaporch.drivers.xen.client import HelperClient, open_helper
from snaporch.orchestrator import catalog_of, open_orchestrator
from tests.xen.in_dom0.proof import judged, said
from tests.xen.in_dom0.world import MIB, NAME, PLACE, WORKLOAD, World, destroy_all, make_disks, open_world

LIVE = CreateFlag.LIVE
CFG = """\
name = "{name}"
type = "pv"
kernel = "/guest/vmlinuz"
ramdisk = "/guest/initrd"
extra = "{append}"
memory = 128
disk = [{disks}]
vif = ["mac={mac},vifname={vif},script=vif-lab"]
"""
MAC, VIF = "00:16:3e:00:00:07", "web0"
SCRIPTS = Path("/etc/xen/scripts")
VIF_SCRIPT = """\
#!/bin/bash
dir=$(dirname "$0")
. "$dir/vif-common.sh"
[ ! -e /guest/no-network ] || fatal "there is no network today"
[ "$command" != online ] || { do_or_die ip link set dev "$dev" up; success; }
"""
Case = Callable[[dict[str, Any]], Awaitable[None]]


@asynccontextmanager
async def theirs() -> AsyncIterator[World]:
    """A guest with a network device that `xl` has started, attached to."""
    PLACE.mkdir(exist_ok=True)
    script = SCRIPTS / "vif-lab"
    script.write_text(VIF_SCRIPT)
    script.chmod(0o755)
    disks = make_disks(PLACE)
    cfg = PLACE / "guest.cfg"
    cfg.write_text(
        CFG.format(
            name=NAME,
            append=f"{WORKLOAD} snaporch.rate=20",
            disks=", ".join(
                f'"format=qcow2,vdev={disk.target},access=rw,backendtype=qdisk,target={disk.path}"'
                for disk in disks
            ),
            mac=MAC,
            vif=VIF,
        )
    )
    subprocess.run(["xl", "create", str(cfg)], check=True, stdout=sys.stderr)
    async with open_orchestrator(PLACE / "root") as orch:
        world = World(PLACE, orch)
        await world.reports(2)
        await orch.attach(NAME, driver="xen")
        yield world


async def _nics(world: World) -> list[dict[str, Any]]:
    domid = (await world.domain()).domid
    async with open_helper(NAME) as helper:
        return list((await helper.ask("config", domid=domid))["nics"])


def _has(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists()


async def attached(found: dict[str, Any]) -> None:
    """A domain that `xl` has started, with a network device: found, attached to, checkpoint, there and back."""
    async with theirs() as world:
        orch = world.orch
        found["discovered"] = [(each.name, each.domain) for each in await orch.discover("xen")]
        assert found["discovered"] == [(NAME, NAME)]
        assert _has(VIF)
        await orch.create(NAME, DomainSnapshot("one"), LIVE)
        far = await world.check_consistent()
        await world.check_told()
        found["verify"] = attrs.asdict(await orch.verify(NAME, "one", boot=True))
        assert found["verify"]["booted"], found["verify"]
        await world.check_consistent()
        await world.check_alone()
        Path("/guest/no-network").touch()
        before = await world.images()
        found["script fails"] = await said(orch.revert(NAME, "one"))
        Path("/guest/no-network").unlink()
        assert found["script fails"] != "complete"
        assert await world.images() == before
        await world.check_alone()
        await world.check_consistent()
        assert _has(VIF)
        since = world.positions()
        await orch.revert(NAME, "one")
        await world.wait_report(lambda reports: reports[0].seq < far.seq, since)
        await world.check_consistent()
        await world.check_alone()
        nics = await _nics(world)
        assert [(nic["mac"], nic.get("ifname")) for nic in nics] == [(MAC, VIF)], nics
        assert _has(VIF)
        assert not _has(f"vif{(await world.domain()).domid}.0")
        await world.check_told()


async def merged(_found: dict[str, Any]) -> None:
    """Deleted and flattened while the guest runs, and when it is inactive."""
    async with open_world() as world:
        orch = world.orch
        for name in "abc":
            await orch.create(NAME, DomainSnapshot(name), LIVE)
        await orch.delete(NAME, "b")
        await world.check_consistent()
        await orch.flatten(NAME)
        await world.check_consistent()
        await world.check_told()
        info = await orch.domain_info(NAME)
        assert {len(disk.chain) for disk in info.disks} == {1}
        await orch.revert(NAME, "a")
        await world.check_consistent()
        await orch.destroy(NAME)
        await orch.delete(NAME, "c")
        await orch.flatten(NAME)
        await world.ready()
        await world.check_consistent()
        await orch.revert(NAME, "a")
        await world.check_consistent()
        await world.check_told()


async def group(found: dict[str, Any]) -> None:
    """Two guests at one point; both go back to it."""
    async with open_world() as world:
        orch, other = world.orch, "guest-b"  # its log is among the first one's, which is looked at by positions
        place = PLACE / "b"
        place.mkdir()
        definition = (await catalog_of(orch).domain(NAME)).definition
        assert isinstance(definition, DomainDefinition)
        await orch.define(attrs.evolve(definition, name=other, memory=96 * MIB, disks=make_disks(place)))
        await orch.start(other)
        await world.reports(2)
        records = await orch.create_group((NAME, other), DomainSnapshot("both"), LIVE)
        found["points"] = [record.point for record in records]
        found["paused"] = [record.timings.pause for record in records]
        await world.reports(3)
        await orch.revert_group((NAME, other), "both")
        await world.reports(6)
        found["states"] = [str((await orch.domain_info(name)).state) for name in (NAME, other)]
        assert found["states"] == ["running", "running"]
        for log, size in world.positions().items():
            assert size, log


async def suspended(found: dict[str, Any]) -> None:
    """A guest that somebody has left suspended (``---ss-``) is found, and runs again."""
    async with open_world() as world:
        domid = (await world.domain()).domid
        file = PLACE / "left"
        file.touch()
        helper = HelperClient("left")
        await helper.ask("save", domid=domid, path=str(file), live=False)
        os.kill(helper._program.process.pid, signal.SIGKILL)
        await helper.close()
        file.unlink()
        found["state"] = str(await world.state())
        assert found["state"] == "paused"
        found["create"] = await said(world.orch.create(NAME, DomainSnapshot("no"), LIVE))
        assert found["create"] != "complete"
        await world.orch.resume(NAME)
        await world.check_consistent()


async def saved(found: dict[str, Any]) -> None:
    """A domain that `xendomains` has saved is left alone until its memory is loaded, or given up."""
    place = Path("/var/lib/xen/save")
    async with open_world() as world:
        orch = world.orch
        await orch.create(NAME, DomainSnapshot("one"), LIVE)
        place.mkdir(parents=True, exist_ok=True)
        file = place / NAME
        await trio.run_process(["xl", "save", NAME, str(file)])
        found["start"] = await said(orch.start(NAME))
        found["revert"] = await said(orch.revert(NAME, "one"))
        found["delete"] = await said(orch.delete(NAME, "one"))
        for verb in ("start", "revert", "delete"):
            assert str(file) in found[verb], found[verb]
        await trio.run_process(["xl", "restore", str(file)])
        file.unlink()
        assert await world.state() is DomainState.RUNNING
        await world.check_consistent()
        await orch.create(NAME, DomainSnapshot("two"), LIVE)
        await world.check_consistent()


async def memory(found: dict[str, Any]) -> None:
    """Where two guests have no room beside each other, that is said with both figures, or the way is another."""
    async with open_world() as world:
        orch = world.orch
        await orch.create(NAME, DomainSnapshot("one"), LIVE)
        async with open_helper(NAME) as helper:
            mine = await helper.ask("config", domid=(await world.domain()).domid)
            kib = ((await helper.ask("memory", config=mine))["free"] >> 10) - (80 << 10)
        config = {
            "c_info": {"type": "pv", "name": "large", "uuid": "00000000-0000-0000-0000-000000000001"},
            "b_info": {
                "max_memkb": kib,
                "target_memkb": kib,
                "max_vcpus": 1,
                "kernel": "/guest/vmlinuz",
                "type.pv": {},
            },
        }
        async with open_helper("large") as helper:
            await helper.ask("create", config=config)
        found["said"] = await said(orch.revert(NAME, "one"))
        await world.check_consistent()


CASES: dict[str, Case] = {
    "attached": attached,
    "merged": merged,
    "group": group,
    "suspended": suspended,
    "saved": saved,
    "memory": memory,
}


async def _all(wanted: Sequence[str]) -> None:
    for name, case in CASES.items():
        if not wanted or name in wanted:
            await destroy_all()
            async with judged(case=name) as found:
                await case(found)


if __name__ == "__main__":
    trio.run(_all, sys.argv[1:])
