"""A guest as virt-manager makes it: many devices, some of which reach outside, and of which a copy has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.errors import Unsupported
from snaporch.model.rfc import CreateFlag
from tests.conftest import _qemus
from tests.libvirt.lab import Libvirt
from tests.libvirt.test_story import active
from tests.libvirt.world import open_libvirt_world
from tests.live.world import NAME

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]

SPICE = """\
<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
<graphics type='spice' autoport='yes' passwd='secret'><listen type='address'/><image compression='off'/></graphics>
<sound model='ich9'/><audio id='1' type='spice'/>
<redirdev bus='usb' type='spicevmc'/><redirdev bus='usb' type='spicevmc'/><video><model type='qxl'/></video>"""
COMMON = """\
<controller type='usb' model='qemu-xhci' ports='15'/><controller type='scsi' model='virtio-scsi'/>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='sda' bus='sata'/><readonly/></disk>
<interface type='user'><model type='virtio'/></interface>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<input type='tablet' bus='usb'/><watchdog model='i6300esb' action='reset'/><memballoon model='virtio'/>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"""


@pytest.mark.parametrize("daemon", ["9.0"], indirect=True)
async def test_defaults(daemon: Libvirt, kernel: Path, tmp_path: Path) -> None:
    """q35, virtio-scsi, SPICE, USB redirection, an agent's channel: taken, tried in a copy, gone back to."""
    qemu, extra = _qemus()["7.2"], COMMON + SPICE
    cpu = "<cpu mode='host-model'/>"
    async with open_libvirt_world(
        tmp_path / "w", daemon, qemu, kernel, machine="q35", extra=extra, cpu=cpu
    ) as world:
        await world.create("one")
        report = await world.orch.verify(NAME, "one", boot=True)
        assert report.boot == "ran", report
        await world.revert("one")
        await world.check_consistent()
        assert world.libvirt_disks() == await active(world) | {"sda": "-"}
        with pytest.raises(Unsupported, match="no guest agent answers"):
            await world.create("quiet", flags=CreateFlag.LIVE | CreateFlag.QUIESCE)
