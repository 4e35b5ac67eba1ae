"""What a command line holds of the host, what the next process is given, and the stand-ins of a trial."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from snaporch.drivers.base import Machine
from snaporch.drivers.qemu.driver import QemuDriver
from snaporch.drivers.qemu.hostside import follow, holds, refusal
from snaporch.drivers.qemu.isolation import isolate, stand_ins, wants_network
from snaporch.drivers.qemu.options import Keys, Option, parse
from snaporch.errors import Unsupported
from snaporch.model.domain import DomainDefinition, DomainRecord
from snaporch.model.way import Way, WayBack

CONTROL = "/d/qmp.sock"


def options(text: str) -> list[Option]:
    return list(parse(("qemu", *text.split())))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("-qmp unix:/d/qmp.sock,server", ""),
        ("-chardev socket,id=a,path=a,server=true", "socket /d/a"),
        ("-chardev socket,id=a,path=a", ""),
        ("-serial tcp::4444,server=on", "port :4444"),
        ("-s", "port :1234"),
        ("-gdb tcp:localhost:9", "port localhost:9"),
        ("-serial udp:1.2.3.4:5@:6", "port :6"),
        ("-serial pty", ""),
        ("-parallel /dev/parport0", "serial /dev/parport0"),
        ("-netdev tap,id=n,ifname=t0", "interface t0"),
        ("-netdev tap,id=n", ""),
        ('-netdev {"type":"tap","fd":"5","id":"n"}', "an inherited descriptor"),
        ("-netdev tap,id=n,vhost=on,vhostfds=4:5", "an inherited descriptor"),
        ("-netdev vhost-user,id=n,chardev=c", "the connection of c to the process behind it"),
        ("-netdev user,id=n,hostfwd=a,hostfwd=b", "port a; port b"),
        ('-netdev {"type":"user","id":"n","hostfwd":[{"str":"a"}]}', "port a"),
        ("-nic user,hostfwd=a", "port a"),
        ("-netdev socket,id=n,listen=:5", "port :5"),
        ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=s", "socket /d/s"),
        ("-netdev stream,id=n,addr.type=unix,addr.path=s", ""),
        ("-vnc :7", "port 5907"),
        ("-vnc :7,to=9", ""),
        ("-vnc none", ""),
        ("-spice port=5930", "port 5930"),
        ("-device vhost-vsock-pci,guest-cid=3", "vsock address 3"),
        ("-chardev socket,id=t,path=/t -tpmdev emulator,id=x,chardev=t", "the TPM at /t"),
        ("-drive file=a,copy-on-read=on", "the right to write to its images (copy-on-read)"),
    ],
)
def test_what_one_process_alone_can_have(text: str, what: str) -> None:
    assert "; ".join(held.what for held in holds(options(text), "/d", CONTROL)) == what


def test_the_word_is_named_and_no_secret_is() -> None:
    (held,) = holds(options("-spice port=5930,password=hunter2"), "/d", CONTROL)
    assert str(held) == "port 5930 (-spice port=5930,password=…)"
    assert stand_ins(holds(options("-netdev tap,id=n,ifname=t0"), "/d", CONTROL)) == [
        "interface t0: one in a private network"
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("-snapshot", "temporary"),
        ("-add-fd fd=3,set=1", "descriptors"),
        ("-run-with chroot=/var", "files"),
        ("-device vfio-pci,host=01:00.0", "state cannot be saved"),
        ('-device {"driver":"vhost-user-blk-pci","chardev":"c"}', "no snapshot would hold it"),
        ("-icount shift=auto,rr=record,rrfile=x", "records"),
        ("-tpmdev passthrough,id=t", "TPM"),
        ("-set drive.d0.file=x", "other options"),
    ],
)
def test_what_cannot_be_started_again(text: str, word: str) -> None:
    why = refusal(options(text))
    assert text.split(maxsplit=1)[0] in why
    assert word in why


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-chardev file,id=f,path=f,append=off", "-chardev backend=file,id=f,path=f,append=on"),
        ("-chardev pty,id=p,logfile=l,logappend=off", "-chardev backend=pty,id=p,logfile=l,logappend=on"),
        ("-chardev file,id=f,path=f,append=on", "-chardev file,id=f,path=f,append=on"),
        ("-serial pty", "-serial pty"),
        (
            "-monitor file:m",
            "-chardev backend=file,path=m,append=on,id=snaporch-monitor-0 -monitor chardev:snaporch-monitor-0",
        ),
    ],
)
def test_no_log_is_cut(text: str, expected: str) -> None:
    """Also where the first process was to begin them anew."""
    followed = follow(options(text), "/d", CONTROL, ".new")
    assert " ".join(word for option in followed.options for word in option.words()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "-qmp unix:qmp.sock,server=on,wait=off",
            (
                "-chardev backend=socket,server=on,wait=off,path=/d/qmp.sock.new,id=snaporch-qmp-0 "
                "-qmp chardev:snaporch-qmp-0"
            ),
        ),
        (
            "-chardev socket,id=m,path=/d/qmp.sock,server=on -mon chardev=m,mode=control",
            "-chardev backend=socket,id=m,server=on,path=/d/qmp.sock.new -mon chardev=m,mode=control",
        ),
    ],
)
def test_another_users_process_listens_itself(text: str, expected: str) -> None:
    """At a socket beside the one that others know, which takes that one's name with its place."""
    followed = follow(options(text), "/d", CONTROL, ".new", listens=True)
    assert " ".join(word for option in followed.options for word in option.words()) == expected
    assert followed.renames == ((f"{CONTROL}.new", CONTROL),)
    with pytest.raises(Unsupported, match="cannot listen beside it"):
        follow(options(text), "/d", CONTROL, "n" * 100, listens=True)


def test_the_next_process(tmp_path: Path) -> None:
    """Logs are appended to, our monitor and what says how the first one began are left out."""
    text = (
        "-S -daemonize -pidfile p -incoming defer -D x -chardev socket,id=m,path=/d/qmp.sock,server=on "
        "-mon chardev=m -qmp unix:/d/other,server=on -serial file:s -debugcon file:c -chardev file,id=f,path=f "
        "-chardev null,id=n,logfile=l -trace enable=x,file=t -m 1G"
    )
    followed = follow(options(text), "/d", CONTROL, ".new")
    assert not followed.renames
    assert [option.words() for option in followed.options] == [
        ("-qmp", "unix:/d/other,server=on"),
        ("-chardev", "backend=file,path=s,append=on,id=snaporch-serial-8"),
        ("-serial", "chardev:snaporch-serial-8"),
        ("-chardev", "backend=file,path=c,append=on,id=debugcon"),
        ("-device", "isa-debugcon,id=debugcon,chardev=debugcon"),
        ("-chardev", "backend=file,id=f,path=f,append=on"),
        ("-chardev", "backend=null,id=n,logfile=l,logappend=on"),
        ("-trace", "enable=x"),
        ("-m", "1G"),
    ]
    memory = f"-object memory-backend-file,id=r,size=1G,share=on,mem-path={tmp_path}"
    assert not follow(options(memory), "/d", CONTROL, ".new").renames, "a directory gives each its own"
    followed = follow(options(f"{memory}/ram"), "/d", CONTROL, ".new")
    assert followed.renames == ((f"{tmp_path}/ram.new", f"{tmp_path}/ram"),)
    assert f"mem-path={tmp_path}/ram.new" in str(followed.options[0].value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-netdev user,id=n,hostfwd=a", "-netdev type=user,id=n,restrict=on"),
        ("-netdev tap,id=n,ifname=t,vhost=on", "-netdev type=tap,id=n,script=no,downscript=no,vhost=on"),
        ("-netdev tap,id=n,fds=4:5", "-netdev type=tap,id=n,script=no,downscript=no,queues=2"),
        ("-nic tap,model=e1000,mac=1", "-nic type=tap,script=no,downscript=no,model=e1000,mac=1"),
        ("-nic none", "-nic none"),
        ("-net nic,model=e1000", "-net nic,model=e1000"),
        ("-chardev socket,id=c,path=/s,server=on", "-chardev backend=null,id=c"),
        ("-serial telnet::1,server", "-serial null"),
        ("-monitor stdio -vnc :1 -spice port=5 -s -qmp unix:/x,server", ""),
        (
            "-object memory-backend-file,id=r,size=1G,share=on,mem-path=/f",
            ("-object qom-type=memory-backend-memfd,id=r,size=1G,share=on"),
        ),
        ("-object rng-random,id=r", "-object rng-random,id=r"),
        ("-serial pty -debugcon file:c -parallel none", "-serial null -debugcon null -parallel none"),
        ("-chardev pty,id=p,logfile=l", "-chardev backend=null,id=p"),
        ("-drive file=a,copy-on-read=on,if=virtio", "-drive file=a,if=virtio"),
    ],
)
def test_a_trial(text: str, expected: str) -> None:
    found = list(isolate(options(text)))
    assert " ".join(word for option in found for word in option.words()) == expected
    assert wants_network(found) is ("tap" in text)


def test_a_trial_has_an_address_of_its_own() -> None:
    """In vsock, where each machine has one; and the device is the same."""
    (found,) = isolate(options("-device vhost-vsock-pci,id=v,guest-cid=3"))
    keys = Keys.parse(found.value or "", "driver")
    assert (keys.get("driver"), keys.get("id")) == ("vhost-vsock-pci", "v")
    assert int(keys.get("guest-cid")) > 2**31


async def test_a_definition_has_a_way_back_as_its_words_allow() -> None:
    """What a defined guest alone can have is known before a checkpoint is taken of it, as of an attached one."""
    words = {
        (): WayBack(Way.BESIDE),
        ("-netdev", "user,id=n,hostfwd=tcp::80-:80"): WayBack(
            Way.PROVEN, "both would have port tcp::80-:80 (-netdev user,id=n,hostfwd=tcp::80-:80)"
        ),
    }
    for given, expected in words.items():
        record = DomainRecord(DomainDefinition("vm", extra_args=given))
        assert await QemuDriver().way_back(record, cast("Machine", None)) == expected
