"""The storage of a domain whose hypervisor runs as another user: its images are worked on with that user's rights.

Who does what:

- in the domain's own directory, which is root's alone, root: there are memory files, and no images;
- names in a directory that nobody but root can change are made and removed by root;
- all else is done as that user (`snaporch.drivers.local.as_user`): looks at images and changes to them wherever
  they are, qemu-img, and names in every other directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import attrs
import trio

from snaporch.drivers.base import Progress
from snaporch.drivers.local import durable, filework, trace
from snaporch.drivers.local.as_user import Asked, User, as_user, group_name, only_roots
from snaporch.drivers.local.files import LocalStorage
from snaporch.drivers.local.lineage import Link
from snaporch.drivers.local.look import looked_at
from snaporch.errors import Forbidden, Unsupported
from snaporch.model.rfc import DeviceDisk

T = TypeVar("T")

END_SECONDS = 5.0  # a process that is killed is gone at once but for a disk that hangs in the kernel

# What is asked of an image is asked as the user, wherever a hypervisor says that its image is.
_ALSO_OF_MEMORY = frozenset([filework.exists, filework.size, filework.checksum, durable.identity, trace.identities])


@attrs.define
class UsersStorage(LocalStorage):
    """See the module.

    Attributes:
        user: as whom the domain's hypervisor runs.
        own: the domain's own directory.
    """

    user: User = attrs.field(kw_only=True)
    own: str = attrs.field(kw_only=True)

    def is_own(self, path: str) -> bool:
        """Return whether a path is the domain's own directory, or one in it."""
        return f"{os.path.normpath(path)}/".startswith(f"{self.own}/")

    def _by(self, path: str, work: Callable[..., T], *arguments: Any, **options: Any) -> Callable[[], T]:
        if work in _ALSO_OF_MEMORY and self.is_own(path):
            return partial(work, *arguments, **options)
        return as_user(self.user).asked(work, *arguments, **options)

    def _by_name(self, path: str, work: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        if self.is_own(path) or only_roots(os.path.dirname(path)):
            return partial(work, *arguments)
        return as_user(self.user).asked(work, *arguments)

    async def _done(self, work: Callable[[], T], *, quick: bool = False) -> T:
        """See LocalStorage: the user may have it take for ever, so it ends where nobody waits for it any more."""
        if not isinstance(work, Asked):
            return await super()._done(work, quick=quick)
        try:
            found: T = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        except trio.Cancelled:
            with trio.move_on_after(END_SECONDS, shield=True):  # what follows finds nobody at work there
                await trio.to_thread.run_sync(work.end, abandon_on_cancel=True)
            raise
        return found

    @property
    def _rights(self) -> dict[str, Any]:
        return self.user.rights

    async def lineage(self, path: str, format_: str) -> tuple[Link, ...] | None:
        """See LocalStorage; what that user cannot read is followed by nobody."""
        links = await looked_at(path, partial(as_user(self.user).call, filework.known_lineage, path, format_))
        if self.confinement is not None:
            if links is None:
                raise Forbidden(
                    f"{path} does not say by itself what it is backed by; a service follows nothing else"
                )
            self.confinement.check_links(links)
        return links

    async def check_memory_place(self, path: str) -> None:
        """See Storage: elsewhere it could not be told from what is not to be shown to that user."""
        if not self.is_own(path):
            raise Unsupported(
                f"memory file: {path} is not in {self.own}: the domain's QEMU runs as {self.user.name}, and only "
                "there is its memory kept from others; leave out --memory-file"
            )

    def _mode(self, owner: tuple[int, int] | None) -> int:
        """See LocalStorage: where QEMU reaches the image through its group, the overlay too."""
        return 0o660 if owner is not None and owner[0] != self.user.uid and self.user.is_in(owner[1]) else 0o600

    def owner(self, image: str) -> tuple[int, int]:
        """Return whose an overlay of an image is to be, the user and the group; blocks.

        Raises:
            Unsupported: that cannot be had beside the image, or QEMU could not open it then.
        """
        try:
            uid, gid = as_user(self.user).call(filework.owner, image)
        except OSError as error:
            raise Unsupported(f"cannot look at {image} as {self.user.name}: {error.strerror}") from None
        theirs = uid == self.user.uid
        if not theirs and not self.user.is_in(gid):
            raise Unsupported(
                f"{image} is {User(uid, gid, ()).name}'s, and {self.user.name}, as whom QEMU runs, is not in its "
                f"group {group_name(gid)}: an overlay like it could not be opened "
                f"(`chown {self.user.name} {image}`)"
            )
        if only_roots(os.path.dirname(image)):
            return uid, gid
        if not theirs:
            raise Unsupported(
                f"{image} is {User(uid, gid, ()).name}'s, and others can write to its directory: an overlay there "
                f"could only be made as {self.user.name}, as whom QEMU runs (`chown {self.user.name} {image}`)"
            )
        # A group that the user is not in would give the file's mode, 0600, to nobody either.
        return uid, gid if self.user.is_in(gid) else self.user.gid

    async def extract_disk(self, path: str, tag: str, copy: str) -> None:  # noqa: ARG002 - none is made
        """See ImagePoints."""
        raise self._no_copies(path)

    async def extract_memory(self, path: str, tag: str, copy: str) -> None:  # noqa: ARG002 - none is made
        """See ImagePoints."""
        raise self._no_copies(path)

    async def copy_image(self, image: DeviceDisk, copy: str, format_: str, progress: Progress) -> None:  # noqa: ARG002 - as above
        """See Archives."""
        raise self._no_copies(image.path)

    @property
    def no_copies(self) -> str:
        """See Storage."""
        return f"no copies are made of the images of a QEMU that runs as another user ({self.user.name})"

    def _no_copies(self, path: str) -> Unsupported:
        return Unsupported(f"{path}: {self.no_copies}")
