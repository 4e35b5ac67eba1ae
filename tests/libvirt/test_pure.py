"""libvirt's XML and the header of its memory files; no libvirt is needed."""

from __future__ import annotations

from xml.etree.ElementTree import Element

import pytest

from snaporch.drivers.libvirt import domain_xml
from snaporch.drivers.libvirt.connection import check_uri
from snaporch.drivers.libvirt.save_image import LENGTH, OFFSET, UNFINISHED, header, read_header
from snaporch.errors import DamagedSnapshot, InvalidInput, Unsupported
from snaporch.model.rfc import DeviceDisk

DOMAIN = """\
<domain type='qemu' id='3'><name>web</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<memory unit='KiB'>1048576</memory><vcpu placement='static' current='2'>4</vcpu>
<os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type><nvram>/var/lib/web_VARS.fd</nvram></os>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/web-1.qcow2' index='2'/>
<backingStore type='file' index='1'><format type='qcow2'/><source file='/i/web.qcow2'/>
<backingStore type='file' index='3'><format type='raw'/><source file='/i/base.img'/><backingStore/></backingStore>
</backingStore><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><target dev='sda' bus='sata'/><readonly/></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/data'/>
<target dev='vdb' bus='virtio'/><alias name='virtio-disk1'/></disk>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/><model type='virtio'/>
</interface>
<serial type='file'><source path='/tmp/serial.log'/><target port='0'/></serial>
<channel type='unix'><source mode='bind' path='/run/a.sock'/><target type='virtio' name='org.qemu.guest_agent.0'/>
</channel><graphics type='vnc' port='5900'/>
<redirdev bus='usb' type='tcp'><source mode='bind' host='127.0.0.1' service='4000'/></redirdev>
<audio id='1' type='pulseaudio' serverName='/run/p.sock'/>
</devices></domain>"""


def changed(old: str, new: str) -> Element:
    """Return the domain's document with something replaced in it."""
    assert old in DOMAIN
    return domain_xml.parse(DOMAIN.replace(old, new))


def test_reads_a_domain() -> None:
    """Disks with their chains, memory, CPUs; an empty drive is no disk."""
    root = domain_xml.parse(DOMAIN)
    vda, vdb = domain_xml.disks(root)
    assert vda.chain == ("/i/web-1.qcow2", "/i/web.qcow2", "/i/base.img")
    assert (vda.target, vda.format, vda.alias, vda.readonly) == ("vda", "qcow2", "virtio-disk0", False)
    assert vdb.device == DeviceDisk("vdb", "/dev/vg/data", "raw")
    assert domain_xml.targets(root) == ("vda", "sda", "vdb")
    assert (domain_xml.memory(root), domain_xml.vcpus(root)) == (2**30, 2)
    assert domain_xml.has_agent(root)
    assert domain_xml.machine_type(root) == "pc-q35-10.0"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("<disk type='block'", "<disk type='network'", "type 'network'"),
        ("type='raw'/><source dev", "type='vmdk'/><source dev", "format is vmdk"),
        ("name='qemu' type='raw'/><source dev", "name='qemu'/><source dev", "not given"),
        ("<target dev='vdb'", "<encryption format='luks'/><target dev='vdb'", "encrypted"),
        ("<target dev='vdb'", "<transient/><target dev='vdb'", "transient"),
        ("<source dev='/dev/vg/data'/>", "<source dev='/d'><slices/></source>", "slice"),
        ("<source dev='/dev/vg/data'/>", "", "no source"),
    ],
)
def test_refuses_disks_that_it_does_not_understand(old: str, new: str, why: str) -> None:
    """Each with the reason and the disk."""
    with pytest.raises(Unsupported, match=f"vdb.*{why}"):
        domain_xml.disks(changed(old, new))


def test_leaves_the_chain_to_the_images() -> None:
    """A memory file names active images alone: who puts another there is not led past what is between."""
    text = domain_xml.without_chains(DOMAIN)
    assert "/i/web-1.qcow2" in text
    assert "backingStore" not in text
    assert "/i/web.qcow2" not in text


def test_puts_disks_on_other_images() -> None:
    """What is named changes, and nothing else; a disk that is there already keeps its chain."""
    images = [DeviceDisk("vda", "/o/vda.qcow2"), DeviceDisk("vdb", "/dev/vg/data", "raw")]
    text = domain_xml.with_disks(DOMAIN, images)
    vda, vdb = domain_xml.disks(domain_xml.parse(text))
    assert (vda.chain, vda.format) == (("/o/vda.qcow2",), "qcow2")
    assert vdb.chain == ("/dev/vg/data",)
    with pytest.raises(Unsupported, match="vdz"):
        domain_xml.with_disks(DOMAIN, [DeviceDisk("vdz", "/o/vdz.qcow2")])


def test_a_copy_reaches_nothing_outside() -> None:
    """No network, serial file, socket, display or variables of the domain's own; the devices are the same."""
    images = [DeviceDisk("vda", "/o/vda.qcow2"), DeviceDisk("vdb", "/o/vdb.qcow2")]
    text = domain_xml.copied(DOMAIN, "copy", "99999999-2222-3333-4444-555555555555", images, "/o", incoming=True)
    root = domain_xml.parse(text)
    for gone in (
        "default",
        "/tmp/serial.log",  # noqa: S108
        "/run/a.sock",
        "/run/p.sock",
        "4000",
        "5900",
        "/var/lib/web_VARS.fd",
        "<name>web<",
    ):
        assert gone not in text
    nic = root.find("devices/interface")
    assert nic is not None
    assert nic.get("type") == "ethernet"
    assert [child.tag for child in nic] == ["mac", "model", "link"]
    assert '<qemu:arg value="defer"' in text


def test_memory_that_cannot_be_saved() -> None:
    """A passed-through device, encrypted memory, virtiofs: the reason is there before anything is tried."""
    assert domain_xml.memory_blocker(domain_xml.parse(DOMAIN)) == ""
    for new in (
        "<hostdev mode='subsystem'/><graphics",
        "<tpm model='tpm-tis'><backend type='passthrough'/></tpm><graphics",
        "<filesystem type='mount'><driver type='virtiofs'/></filesystem><graphics",
    ):
        assert domain_xml.memory_blocker(changed("<graphics", new))


def test_header() -> None:
    """What is written is read; anything else is told apart."""
    written = header(DOMAIN, running=True)
    assert len(written) == OFFSET
    read = read_header(written, "/m")
    assert (read.xml, read.offset, read.was_running) == (DOMAIN, OFFSET, True)
    with pytest.raises(DamagedSnapshot, match="never finished"):
        read_header(UNFINISHED + written[16:], "/m")
    with pytest.raises(DamagedSnapshot, match="does not begin"):
        read_header(bytes(OFFSET), "/m")
    with pytest.raises(DamagedSnapshot, match="too short"):
        read_header(written[: LENGTH - 1], "/m")
    with pytest.raises(Unsupported, match="zstd"):
        read_header(written[:28] + b"\5\0\0\0" + written[32:], "/m")
    with pytest.raises(Unsupported, match="more than fit"):
        header("x" * OFFSET, running=True)


@pytest.mark.parametrize(
    "uri",
    ["qemu:///embed?root=/x", "qemu+ssh://host/system", "qemu+tls:///system", "xen:///", "qemu://h/system", "test"],
)
def test_uris_of_other_hosts(uri: str) -> None:
    """Descriptors cannot be passed to them: refused with the reason."""
    with pytest.raises(InvalidInput, match="of this host"):
        check_uri(uri)
    assert check_uri("qemu:///system?socket=/s")
