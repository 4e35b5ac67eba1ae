"""Images of many kinds."""

from __future__ import annotations

import os

from machine_lab.cells import blockdev, cell, simple
from machine_lab.lab import Lab

IMAGE = "Images"
SECRET = ["-object", "secret,id=s0,data=abc123"]


def _plain(lab: Lab, *images: str, options: str = "") -> list[object]:
    return [*lab.base(), *lab.disks(*images, options=options)]


def _node(lab: Lab, *words: str, **options: object) -> list[object]:
    return [*lab.base(), *words, *blockdev(node_name="f0", **options), "-device", "virtio-blk-pci,drive=f0,id=vda"]


def _loop(lab: Lab, path: object) -> str:
    name = lab.sh("losetup", "-f", "--show", path).strip()
    lab.cleanup.append(lambda: lab.sh("losetup", "-d", name))
    return name


def damage(lab: Lab, path: str) -> None:
    """Damage in what a snapshot holds is seen."""
    if not lab.create("cd"):
        return
    with open(path, "r+b") as file:
        file.seek(2**20)
        file.write(b"DAMAGE" * 100)
        os.fsync(file.fileno())
    lab.run("verify", lab.name, "cd")
    step = lab.steps[-1]
    step.fault = "wrong: damage is not seen" if step.status == 0 else ""
    step.status = None


simple(IMAGE, "img-raw", lambda lab: _plain(lab, lab.image("a.raw", "raw"), options=",format=raw"), whole=True)


@cell(IMAGE)
def img_loop_drive(lab: Lab) -> None:
    name = _loop(lab, lab.image("a.raw", "raw"))
    lab.start(_plain(lab, name, options=",format=raw,cache=none"))
    lab.flow(whole=True)
    damage(lab, name)


@cell(IMAGE)
def img_loop_hostdev(lab: Lab) -> None:
    name = _loop(lab, lab.image("a.raw", "raw"))
    words = blockdev(driver="host_device", filename=name, node_name="s0")
    lab.start(_node(lab, *words, driver="raw", file="s0"))
    lab.flow(whole=True)


@cell(IMAGE)
def img_loop_qcow2(lab: Lab) -> None:
    file = lab.place / "lv.raw"
    lab.sh("truncate", "-s", "128M", file)
    name = _loop(lab, file)
    lab.sh(lab.qemu.img, "create", "-f", "qcow2", name, "64M")
    lab.start(_plain(lab, name, options=",format=qcow2"))
    lab.flow(whole=True)


@cell(IMAGE)
def img_chain_rel(lab: Lab) -> None:
    lab.image("base.qcow2")
    lab.image("mid.qcow2", base="base.qcow2")
    lab.image("top.qcow2", base="mid.qcow2")
    lab.start(_plain(lab, "top.qcow2"))
    lab.flow(whole=True)


@cell(IMAGE)
def img_chain_rel_dir(lab: Lab) -> None:
    place = lab.place / "im"
    place.mkdir()
    lab.image("im/base.qcow2")
    lab.sh(lab.qemu.img, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", place / "top.qcow2")
    lab.start(_plain(lab, "im/top.qcow2"))
    lab.flow(whole=True)


@cell(IMAGE)
def img_symlink(lab: Lab) -> None:
    lab.image("real.qcow2")
    (lab.place / "link.qcow2").symlink_to("real.qcow2")
    lab.start(_plain(lab, f"{lab.place}/link.qcow2"))
    lab.flow(whole=True)


def _encrypted(lab: Lab, kind: str = "qcow2") -> str:
    path, prefix = lab.place / f"e.{kind}", "encrypt." if kind == "qcow2" else ""
    options = f"{prefix}key-secret=s0,{prefix}iter-time=10" + (",encrypt.format=luks" if prefix else "")
    lab.sh(lab.qemu.img, "create", "-q", "-f", kind, "--object", SECRET[1], "-o", options, path, "64M")
    return str(path)


@cell(IMAGE)
def img_luks_qcow2(lab: Lab) -> None:
    options = ",format=qcow2,encrypt.format=luks,encrypt.key-secret=s0"
    lab.start([*lab.base(), *SECRET, *lab.disks(_encrypted(lab), options=options)])
    lab.flow()


@cell(IMAGE)
def img_luks_libvirt(lab: Lab) -> None:
    file = blockdev(driver="file", node_name="st", filename=_encrypted(lab))
    encrypt = {"format": "luks", "key-secret": "s0"}
    lab.start(_node(lab, *SECRET, *file, driver="qcow2", file="st", encrypt=encrypt))
    lab.flow()


@cell(IMAGE)
def img_luks_raw(lab: Lab) -> None:
    lab.start([*lab.base(), *SECRET, *lab.disks(_encrypted(lab, "luks"), options=",format=luks,key-secret=s0")])
    lab.flow()


@cell(IMAGE)
def img_datafile(lab: Lab) -> None:
    data = f"{lab.place}/a.data"
    lab.start(_plain(lab, lab.image("a.qcow2", options=f"data_file={data},data_file_raw=on")))
    lab.flow()
    damage(lab, data)


def _served(lab: Lab, *more: str) -> str:
    control = f"{lab.place}/nbd.sock"
    lab.beside("qemu-nbd", "-k", control, "-f", "qcow2", "-t", "-e", "8", *more, lab.image("n.qcow2"))
    return control


@cell(IMAGE)
def img_nbd(lab: Lab) -> None:
    lab.start([*lab.base(), "-drive", f"if=virtio,file=nbd:unix:{_served(lab)},format=raw"])
    lab.flow()


@cell(IMAGE)
def img_nbd_backing(lab: Lab) -> None:
    base, path = f"nbd+unix:///?socket={_served(lab, '-r')}", lab.place / "a.qcow2"
    lab.sh(lab.qemu.img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    lab.start(_plain(lab, str(path)))
    lab.flow()


@cell(IMAGE)
def img_compressed(lab: Lab) -> None:
    raw, path = lab.place / "t.raw", lab.place / "c.qcow2"
    raw.write_bytes(os.urandom(2**20))
    os.truncate(raw, 64 * 2**20)
    lab.sh(lab.qemu.img, "convert", "-c", "-O", "qcow2", raw, path)
    lab.start(_plain(lab, str(path)))
    lab.flow(whole=True)


DRIVE = "-device", "ide-cd,drive=cd0,bus=ide.2,id=cdr"
EMPTY = "if=none,id=cd0,media=cdrom"


def _with_drive(lab: Lab, words: str) -> list[object]:
    return [*lab.base(), "-drive", words, *DRIVE, *lab.disks(lab.image("a.qcow2"))]


simple(IMAGE, "img-cdrom-empty", lambda lab: _with_drive(lab, EMPTY), whole=True)
simple(
    IMAGE,
    "img-cdrom-iso",
    lambda lab: _with_drive(lab, f"{EMPTY},readonly=on,format=raw,file={lab.image('x.iso', 'raw', '1M')}"),
    whole=True,
)


@cell(IMAGE)
def img_cdrom_change(lab: Lab) -> None:
    lab.start(_with_drive(lab, EMPTY))
    lab.ask("blockdev-change-medium", id="cdr", filename=lab.image("x.iso", "raw", "1M"), format="raw")
    lab.flow()


@cell(IMAGE)
def img_cdrom_eject(lab: Lab) -> None:
    lab.start(_with_drive(lab, f"{EMPTY},file={lab.image('x.iso', 'raw', '1M')}"))
    if lab.attach():
        lab.ask("eject", id="cdr", force=True)
        lab.flow(attached=True)


def _over_base(lab: Lab, name: str = "a.qcow2") -> str:
    if not (lab.place / "base.qcow2").exists():
        lab.image("base.qcow2")
    return lab.image(name, base="base.qcow2")


simple(IMAGE, "img-cor", lambda lab: _plain(lab, _over_base(lab), options=",copy-on-read=on"), whole=True)
simple(
    IMAGE,
    "img-cor-node",
    lambda lab: _node(
        lab,
        driver="copy-on-read",
        file={"driver": "qcow2", "node-name": "q0", "file": {"driver": "file", "filename": _over_base(lab)}},
    ),
)
simple(IMAGE, "img-shared-base", lambda lab: _plain(lab, _over_base(lab), _over_base(lab, "b.qcow2")), whole=True)
simple(IMAGE, "img-vmdk", lambda lab: _plain(lab, lab.image("a.vmdk", "vmdk")))
simple(
    IMAGE,
    "img-raw-offset",
    lambda lab: _node(
        lab, driver="raw", offset=2**20, file={"driver": "file", "filename": lab.image("a.raw", "raw", "66M")}
    ),
)


@cell(IMAGE)
def img_comma(lab: Lab) -> None:
    lab.image("a,b.qcow2")
    lab.start(_plain(lab, f"{lab.place}/a,,b.qcow2"))
    lab.flow(whole=True)


@cell(IMAGE)
def img_ro_disk(lab: Lab) -> None:
    """A disk that is only read, on a controller that the guest does not know: it would write to it."""
    words = ["-drive", f"if=none,id=tools,readonly=on,file={lab.image('tools.qcow2')}"]
    words += ["-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,drive=tools,bus=s0.0"]
    lab.start([*lab.base(), *words, *lab.disks(lab.image("a.qcow2"))])
    lab.flow(whole=True)


simple(
    IMAGE,
    "img-floppy",
    lambda lab: [
        *lab.base(machine="pc", nodefaults=False),
        *("-fda", lab.image("f.img", "raw", "1440k"), "-drive", f"if=virtio,file={lab.image('a.qcow2')}"),
    ],
    whole=True,
)


@cell(IMAGE)
def img_vvfat(lab: Lab) -> None:
    (lab.place / "folder").mkdir()
    words = ["-drive", f"if=none,id=v0,format=raw,file=fat:{lab.place}/folder,readonly=on"]
    words += ["-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,drive=v0,bus=s0.0"]
    lab.start([*lab.base(), *words, *lab.disks(lab.image("a.qcow2"))])
    lab.flow()


simple(IMAGE, "img-nodisk", lambda lab: lab.base(), verify=True)


@cell(IMAGE)
def img_bitmap(lab: Lab) -> None:
    """A backup program's dirty bitmap: it must be on the disk afterwards, or the create is refused."""
    lab.start(_node(lab, driver="qcow2", file={"driver": "file", "filename": lab.image("a.qcow2")}))
    lab.ask("block-dirty-bitmap-add", node="f0", name="bk", persistent=True)

    def bitmaps() -> list[str]:
        blocks = lab.ask("query-block") or []
        return [m["name"] for b in blocks if "inserted" in b for m in b["inserted"].get("dirty-bitmaps", [])]

    if lab.attach() and lab.create("c1", "--live"):
        lab.check("the bitmap", good=bitmaps() == ["bk"], words=f"there are {bitmaps()}")
        lab.back("c1")
    else:
        lab.alive("refused create")


@cell(IMAGE)
def img_job(lab: Lab) -> None:
    """A mirror job is under way."""
    image, target = lab.image("a.qcow2", size="256M"), lab.image("t.qcow2", size="256M")
    lab.start(_node(lab, driver="qcow2", file={"driver": "file", "filename": image}))
    lab.ask("blockdev-add", driver="qcow2", **{"node-name": "t0"}, file={"driver": "file", "filename": target})
    lab.ask("blockdev-mirror", **{"job-id": "j"}, device="f0", target="t0", sync="full")
    if lab.attach():
        lab.create("c1", "--live")
    lab.alive("create during a mirror")
    jobs = lab.ask("query-block-jobs")
    lab.check("the job", good=bool(jobs), words=str(jobs))
