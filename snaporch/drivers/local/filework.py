"""What is done with files by system calls alone: plain functions, which block.

They run in worker threads, or in another process as another user (`snaporch.drivers.local.as_user`): what goes in
and comes out are values that JSON can say.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from snaporch.drivers.local import qcow2
from snaporch.drivers.local.durable import identity, sync_parent
from snaporch.drivers.local.lineage import Link, Unread, lineage
from snaporch.errors import DamagedSnapshot, InvalidInput, OperationFailed, Refused
from snaporch.model.record import FileRecord

_QCOW2 = b"QFI\xfb"
# Images of other programs, each with where its first sign is; a disk of a guest begins with none of these.
_OTHERS = (
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK descriptor", 0, b"# Disk DescriptorFile"),
    ("a VDI image", 64, b"\x7f\x10\xda\xbe"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VHD image", 0, b"conectix"),
    ("a QED image", 0, b"QED\0"),
    ("a Parallels image", 0, b"WithoutFreeSpace"),
    ("a Parallels image", 0, b"WithouFreSpacExt"),
)
_HEAD = 512  # bytes
_CHUNK = 4 * 2**20  # large enough that the hash, which releases the GIL, is most of the time


def _nearest(directory: str) -> Path:
    """Return the nearest ancestor that exists: a file system can be asked about no other."""
    path = Path(directory)
    while not path.exists():
        path = path.parent
    return path


def exists(path: str) -> bool:
    """Return whether there is anything at a path: a dangling symbolic link, too.

    Raises:
        Refused: whoever asks may not look there.
    """
    try:
        os.lstat(path)
    except PermissionError as error:
        raise Refused(f"cannot look at {path}: {error.strerror}") from None
    except (OSError, ValueError):
        return False
    return True


def free(directory: str) -> tuple[str, int]:
    """Return an id of the file system that a directory is, or will be, on, and the bytes free in it."""
    place = _nearest(directory)
    status = os.statvfs(place)
    return str(place.stat().st_dev), status.f_bavail * status.f_frsize


def make_directory(directory: str) -> None:
    """Make a directory and its parents, where they are missing, each 0700."""
    # Not parents=True: the mode is for every directory that is made.
    missing = [Path(directory)]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def check_writable(directory: str) -> None:
    """Raise Refused when files cannot be made in a directory, there or to be made."""
    place = _nearest(directory)
    if not place.is_dir():
        raise Refused(f"{place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise Refused(f"cannot write to {directory}: it is read-only or not yours")


def make_file(path: str, owner: tuple[int, int] | None = None, mode: int = 0o600) -> None:
    """Make an empty file, durable on return; whatever it raises, it has then left none.

    Args:
        path: where; there must be nothing.
        owner: the user and the group that it is to be of; None: of who makes it.
        mode: its permissions.
    """
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if owner is not None:  # never by its name: by then that may be another file's
            os.fchown(fd, *owner)
            os.fchmod(fd, mode)
        os.fsync(fd)
        sync_parent(path)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def discard(path: str) -> None:
    """Remove a file that was just made, and that nobody knows of."""
    os.unlink(path)


def remove(path: str) -> None:
    """Remove a file that may be gone; on return it stays gone, whatever happens to the host."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    with suppress(FileNotFoundError):
        sync_parent(path)  # also where it was gone: who removed it may have been killed before this


def _opened(path: str) -> int:
    """Return a descriptor of a file or a block device; a pipe in its place is not waited for.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is neither a file nor a block device", path)


def checksum(path: str, *, sync: bool) -> FileRecord:
    """Hash a file; it must not change meanwhile."""
    fd = _opened(path)
    try:
        if sync:
            os.fsync(fd)
        before, bytes_ = identity(fd), os.lseek(fd, 0, os.SEEK_END)
        os.lseek(fd, 0, os.SEEK_SET)
        digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := os.readv(fd, [view]):
            digest.update(view[:count])
        if sync:
            sync_parent(path)
    finally:
        os.close(fd)
    if identity(path) != before:
        raise OperationFailed(f"{path} changed while its checksum was computed: something else writes to it")
    return FileRecord(path, bytes_, f"xxh3-128:{digest.hexdigest()}", before)


def inside(path: str) -> tuple[str, ...]:
    """Return the names of the snapshots inside an image."""
    try:
        with qcow2.opened(path) as image:
            return tuple(image.snapshots)
    except OSError as error:
        raise Refused(f"cannot read image {path}: {error.strerror}") from None


def seal_inside(path: str, tag: str) -> FileRecord:
    """Return what is to be remembered of a snapshot inside an image."""
    with qcow2.opened(path) as image:
        return FileRecord(path, *image.checksum(tag))


def extract_memory(path: str, tag: str, copy: str) -> None:
    """Write the memory of a snapshot inside an image to a file that is there."""
    with qcow2.opened(path) as image, open(copy, "r+b") as file:
        file.writelines(image.memory(tag))


def is_encrypted(path: str) -> bool:
    """Return whether an image is encrypted."""
    with suppress(DamagedSnapshot, OSError):  # qemu-img says so
        return bool(qcow2.header(path).encryption)
    return False


def owner(path: str) -> tuple[int, int]:
    """Return whose a file is: the user and the group."""
    status = os.stat(path)
    return status.st_uid, status.st_gid


def size(path: str) -> int:
    """Return the bytes of a file or a block device."""
    fd = _opened(path)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def check_given(path: str, what: str, format_: str) -> None:
    """See `Storage.check_given`."""
    try:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or (format_ and stat.S_ISBLK(kind))):
            raise InvalidInput(f"{what}: {path} is no file")
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InvalidInput(f"{what}: {path}: {error.strerror}") from None
    other = next((name for name, at, magic in _OTHERS if head[at:].startswith(magic)), "")
    if format_ == "raw" and other:
        raise InvalidInput(
            f"{what}: {path} is {other}, and the guest would see its header: make a qcow2 image of it "
            "(`qemu-img convert -O qcow2`)"
        )
    begins_as_qcow2 = head.startswith(_QCOW2)
    if format_ and begins_as_qcow2 != (format_ == "qcow2"):
        said = "is no qcow2 image" if format_ == "qcow2" else "is a qcow2 image, and the guest would see its header"
        raise InvalidInput(f'{what}: {path} {said}; the definition says format = "{format_}"')


def known_lineage(path: str, format_: str) -> tuple[Link, ...] | None:
    """Return an image and what backs it, by their own headers; None where these do not say it all."""
    try:
        return lineage(path, format_)
    except Unread:
        return None


def rename(pairs: tuple[tuple[str, str], ...]) -> None:
    """Give files their final names; what is not there any more has its name already."""
    for made, final in pairs:
        if os.path.lexists(made):
            os.replace(made, final)


def listens(path: str) -> bool:
    """Return whether a process listens at a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        try:
            client.connect(path)
        except OSError as error:
            return error.errno == errno.EAGAIN  # many wait there already
    return True


def put_socket(made: str, place: str) -> None:
    """Let a socket be found at another place, too, instead of the one that was there; idempotent.

    Raises:
        OSError: it cannot be; all is as it was.
        FileExistsError: what is there is no socket.
    """
    with suppress(FileNotFoundError):
        if os.path.samefile(made, place):
            return
        if not stat.S_ISSOCK(os.stat(place).st_mode):
            raise FileExistsError(errno.EEXIST, "it is no socket", place)
    aside = f"{place}.{os.path.basename(os.path.dirname(made))}"
    with suppress(FileNotFoundError):
        os.unlink(aside)
    try:
        os.link(made, aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        os.symlink(made, aside)  # on another file system
    os.replace(aside, place)


def read_text(path: str) -> str:
    """Return what is in a text file of at most 1 MiB."""
    with open(path) as file:
        return file.read(2**20)
