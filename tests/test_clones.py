"""What a clone's QEMU is started with, option by option."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest

from snaporch.drivers.base import Copied, Original, Place
from snaporch.drivers.qemu.clones import copied
from snaporch.drivers.qemu.spawn import free_ports
from snaporch.errors import InvalidInput, Unsupported
from snaporch.model.domain import DomainDefinition, Handle
from snaporch.model.rfc import DeviceDisk
from snaporch.operations.clone import clone_names

PLACE = Place("copy", "/root/copy", (DeviceDisk("vda", "/root/copy/vda.1.qcow2"),))
DISK = DeviceDisk("vda", "/images/vda.raw", "raw")


def made(*words: str, memory: bool = True, keep: bool = False, serial: str = "") -> Copied:
    ports = itertools.count(40_000)
    definition = DomainDefinition("web", disks=(DISK,), extra_args=words, serial=serial)
    original = Original(definition, memory=memory, keep_network=keep)
    return copied(original, PLACE, lambda _protocol, _host: next(ports))


def words(*given: str, memory: bool = True, keep: bool = False) -> Sequence[str]:
    return made(*given, memory=memory, keep=keep).definition.extra_args


def test_name_disks_and_serial_are_its_own() -> None:
    found = made(serial="/var/log/web.log")
    assert found.definition.name == "copy"
    assert found.definition.disks == PLACE.disks
    assert found.definition.serial == "/root/copy/serial.log"
    assert found.files == ("/root/copy/serial.log",)


@pytest.mark.parametrize(
    "given",
    [
        ("-cpu", "max"),
        ("-device", "virtio-rng-pci"),
        ("-object", "rng-random,id=r,filename=/dev/urandom"),
        ("-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01"),
        ("-netdev", "type=user,id=net0,restrict=on"),
        ("-drive", "file=/iso/a.iso,media=cdrom"),
        ("-blockdev", '{"driver": "file", "node-name": "rom", "filename": "/rom", "read-only": true}'),
        ("-uuid", "6e1b8a3c-3bb0-4f2e-b7e5-0c4a0a4f3a11"),
        ("-serial", "null"),
        ("-vnc", "none"),
        ("-display", "none"),
        ("-no-reboot",),
    ],
)
def test_what_is_the_guests_stays(given: Sequence[str]) -> None:
    """With memory also its addresses and ids: the guest knows them."""
    assert list(words(*given)) == list(given)


def test_forwarded_ports_are_others() -> None:
    """Each answer names what was there, and where it leads."""
    given = "user,id=net0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-10.0.2.15:53"
    found = made("-netdev", given)
    expected = "type=user,id=net0,hostfwd=tcp:127.0.0.1:40000-:22,hostfwd=udp::40001-10.0.2.15:53"
    assert list(found.definition.extra_args) == ["-netdev", expected]
    assert [(p.protocol, p.host, p.port, p.was, p.to) for p in found.ports] == [
        ("tcp", "127.0.0.1", 40_000, 2222, ":22"),
        ("udp", "", 40_001, 5353, "10.0.2.15:53"),
    ]
    in_json = {"type": "user", "id": "net0", "hostfwd": [{"str": "tcp::80-:80"}]}
    assert json.loads(words("-netdev", json.dumps(in_json))[1])["hostfwd"] == [{"str": "tcp::40000-:80"}]


def test_logs_sockets_and_screens_are_its_own() -> None:
    found = made(
        *("-chardev", "file,id=log,path=/var/log/web.log", "-chardev", "file,id=more,path=/srv/web.log"),
        *("-monitor", "unix:/run/web.sock,server=on,wait=off"),
        *("-chardev", "socket,id=c,host=127.0.0.1,port=4444,server=on,wait=off"),
        *("-vnc", "127.0.0.1:1,password=on"),
    )
    assert list(found.definition.extra_args) == [
        *("-chardev", "backend=file,id=log,path=/root/copy/web.log,append=on"),
        *("-chardev", "backend=file,id=more,path=/root/copy/1-web.log,append=on"),
        "-chardev",
        "backend=socket,server=on,wait=off,path=/root/copy/web.sock,id=snaporch-clone-2",
        *("-monitor", "chardev:snaporch-clone-2"),
        *("-chardev", "backend=socket,id=c,host=127.0.0.1,server=on,wait=off,port=40000"),
        *("-vnc", "127.0.0.1:34101,password=on"),
    ]
    assert found.files == ("/root/copy/web.log", "/root/copy/1-web.log", "/root/copy/web.sock")
    assert [port.was for port in found.ports] == [4444, 5901]


def test_a_vsock_address_is_another() -> None:
    assert words("-device", "vhost-vsock-pci,guest-cid=3")[1] != "vhost-vsock-pci,guest-cid=3"


def test_a_generation_id_is_another() -> None:
    guid = "11111111-2222-3333-4444-555555555555"
    assert words("-device", f"vmgenid,guid={guid}")[1] == "driver=vmgenid,guid=auto"
    for genid, clones in ((guid, "auto"), ("auto", "auto"), ("none", "none")):
        original = Original(DomainDefinition("web", firmware="uefi", genid=genid, disks=(DISK,)))
        found = copied(original, PLACE, lambda _protocol, _host: 1).definition
        assert (found.genid, found.firmware) == (clones, "uefi")


def test_without_memory_addresses_and_ids_are_new() -> None:
    given = ("-device", "virtio-net-pci,netdev=n,mac=52:54:00:00:00:01", "-uuid", "0" * 32, "-nic", "user,mac=1")
    one, two = (words(*given, memory=False) for _ in range(2))
    assert not {*given[1::2]} & {*one}
    assert not {*one[1::2]} & {*two[1::2]}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("-netdev", "tap,id=n"), "--network keep"),
        (("-netdev", "tap,id=n,ifname=tap0"), "no two processes can have interface tap0"),
        (("-netdev", "socket,id=n,connect=host:1"), "not known"),
        (("-netdev", "user,id=n,guestfwd=tcp:1.2.3.4:1-cmd:x"), "guestfwd"),
        (("-netdev", "user,id=n,hostfwd=odd"), "hostfwd=odd is not understood"),
        (("-drive", "file=/data.raw"), "both would write to it"),
        (("-drive", "if=pflash,file=/vars.fd"), "both would write to it; with `firmware"),
        (("-virtfs", "local,path=/srv,mount_tag=x,security_model=none"), "not known"),
        (("-device", "tpm-tis,tpmdev=t"), "state is kept by a program of somebody else's"),
        (("-device", "vfio-pci,host=0:0"), "a device of the host"),
        (("-device", "ivshmem-plain,memdev=m"), "is shared"),
        (("-object", "memory-backend-file,id=m,size=1G,mem-path=/ram,share=on"), "not known"),
        (("-chardev", "socket,id=c,path=/run/other.sock"), "not known"),
        (("-serial", "stdio"), "not known"),
        (("-incoming", "defer"), "not known"),
        (("-audiodev", "alsa,id=a"), "not known"),
    ],
)
def test_what_is_not_understood_is_refused(given: Sequence[str], why: str) -> None:
    with pytest.raises(Unsupported, match=f"web cannot be cloned: .*{why}"):
        words(*given)


def test_in_the_same_network_when_it_is_said() -> None:
    assert words("-netdev", "tap,id=n,script=no", keep=True) == ("-netdev", "tap,id=n,script=no")


def test_attached_domains_are_refused() -> None:
    original = Original(DomainDefinition("web"), Handle("qemu", "1"))
    with pytest.raises(Unsupported, match="attached"):
        copied(original, PLACE, lambda _protocol, _host: 1)


def test_ports_are_free_and_different() -> None:
    with free_ports() as free_port:
        found = [free_port("tcp", "127.0.0.1") for _ in range(20)] + [free_port("udp", "")]
    assert len(set(found)) == len(found)
    with free_ports() as free_port, pytest.raises(Unsupported, match="no port can be had at"):
        free_port("tcp", "192.0.2.1")


def test_names() -> None:
    assert clone_names("ci", None) == ("ci",)
    assert clone_names("ci", 3) == ("ci-1", "ci-2", "ci-3")
    with pytest.raises(InvalidInput):
        clone_names("x" * 63, 1)
    with pytest.raises(InvalidInput, match="uses this name itself"):
        clone_names("locks", None)
