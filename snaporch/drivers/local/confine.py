"""Which images a request may use: the service's limits, for every spelling and every backing file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import PurePath

import attrs

from snaporch.drivers.local import walk
from snaporch.drivers.local.lineage import Link, Unread, lineage
from snaporch.errors import Forbidden, InvalidInput
from snaporch.model.reserved import DIRECTORIES, check_in_root, is_reserved


def within_root(root: str, path: str) -> PurePath | None:
    """Return a path relative to the root, by the root's identity and not by its name; None where it is outside.

    A directory may be mounted at, or linked to, several places.
    """
    try:
        this = os.stat(root)
    except OSError:
        return None
    real = PurePath(os.path.realpath(path))
    for place in (real, *real.parents):
        try:
            if os.path.samestat(os.stat(place), this):
                return real.relative_to(place)
        except OSError:
            continue
    return None


def check_own(root: str, domain: str, path: str, what: str) -> None:
    """Refuse a path that is in the root and is not a domain's, or is one of the root's own files by another name.

    Raises:
        InvalidInput: so it is.
    """
    if (inside := within_root(root, path)) is not None:
        check_in_root(inside, domain, what)
    controls, real = _controls(root), PurePath(os.path.realpath(path))
    for place in (real, *real.parents):
        with suppress(OSError):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in controls:
                raise InvalidInput(f"{what}: {path} is one of the root's own files under another name")


def _controls(root: str) -> set[tuple[int, int]]:
    """Return what is the root's own, by its identity: a link or a mount may give it any name.

    That is all that is in the root and is no directory, and the directories of control files.
    """
    found = set()
    for place in (root, *(os.path.join(root, name) for name in DIRECTORIES)):
        with suppress(OSError):
            for entry in os.scandir(place):
                if place != root or is_reserved(entry.name) or not entry.is_dir(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.add((status.st_dev, status.st_ino))
    return found


@attrs.frozen
class Confinement:
    """The rule of a service.

    Attributes:
        root: the root: its domains' directories may be used.
        directories: returns where else paths may lead.
        owners: returns the ids of the users, beside root, who may own what is on the way.
        behind: returns where an image may lead to beside that: what was below it when its domain was defined, for
            each definition was checked, or is root's own. None: it is just being defined.
    """

    root: str
    directories: Callable[[], Sequence[str]]
    owners: Callable[[], frozenset[int]]
    behind: Callable[[str], frozenset[str]] | None = None

    def check(self, path: str, domain: str, what: str) -> None:
        """Refuse a path in a request that leads elsewhere, or that somebody else could lead elsewhere.

        Raises:
            InvalidInput: it is not absolute, or no path at all, or one of the root's own names.
            Forbidden: it leads, or could be led, elsewhere.
        """
        if not path.startswith("/") or "\0" in path:
            raise InvalidInput(f"{what}: {path!r} is not an absolute path")
        try:
            real = walk.resolve(path, self.owners())
        except OSError as error:
            raise InvalidInput(f"{what}: {path}: {error.strerror}") from None
        check_own(self.root, domain, real, what)
        if within_root(self.root, real) is None and not self._allowed(real):
            raise self._outside(what, path)

    def check_image(self, path: str, format_: str, domain: str, what: str) -> None:
        """Refuse an image in a request by its path, and by what is below it, as far as it is there.

        Raises:
            InvalidInput: as `check`.
            Refused: it is no image; Forbidden: as `check`, for every image of its chain and their data files.
        """
        self.check(path, domain, what)
        if not os.path.lexists(path):
            return
        # What other definitions name is not for this one: it would read the disk of another domain.
        alone = attrs.evolve(self, behind=None)
        for link in alone.lineage(path, format_, resolve=partial(walk.resolve, trusted=self.owners())):
            if link.format == "qcow2":
                walk.check_content(link.status, link.path, self.owners())

    def lineage(
        self, path: str, format_: str, *, resolve: Callable[[str], str] = os.path.realpath
    ) -> tuple[Link, ...]:
        """Return an image and all below it, each of which is where it may be.

        Args:
            path: the image, which was checked when it came in, or is from the catalog.
            format_: its format.
            resolve: says where a path leads.

        Raises:
            Forbidden: one is elsewhere, or names something that is no file, or has no format.
            Refused: as `snaporch.drivers.local.lineage.lineage`.
        """

        def before(path: str, above: Link | None) -> None:
            if above is not None:
                self._check_link(path, above, resolve)
            elif self.behind is not None:
                self._check_top(path, self.behind, resolve)

        try:
            return lineage(path, format_, before)
        except Unread as error:
            raise Forbidden(f"{error}; a service follows nothing else") from None

    def check_links(self, links: Sequence[Link]) -> None:
        """Refuse an image and all below it, read by others, of which one is not where it may be: as `lineage`.

        Raises:
            Forbidden: so it is.
        """
        if self.behind is not None:
            self._check_top(links[0].path, self.behind, os.path.realpath)
        for above, below in pairwise(links):
            self._check_link(below.path, above, os.path.realpath)
        for link in links:
            if link.data_file:
                self._check_link(link.data_file, link, os.path.realpath)

    def _check_top(self, path: str, behind: Callable[[str], frozenset[str]], resolve: Callable[[str], str]) -> None:
        """Refuse an image from the catalog in whose place there is a link to something else by now."""
        try:
            real = resolve(path)
        except OSError:
            return  # whoever opens it says so
        if real != path and not self._allowed(real) and real not in behind(path):
            raise self._outside(f"image {path}", real)

    def _check_link(self, path: str, above: Link, resolve: Callable[[str], str]) -> None:
        """Refuse what an image names that is neither beside it nor where paths of requests may lead."""
        what = f"what {above.path} is backed by"
        try:
            real, beside = resolve(path), os.path.dirname(resolve(above.path))
        except OSError as error:
            raise Forbidden(f"{what}: {path}: {error.strerror}") from None
        behind = partial(self.behind, above.path) if self.behind is not None else frozenset[str]
        if (inside := within_root(self.root, real)) is not None:
            check_in_root(inside, inside.parts[0] if inside.parts else "", what)
            # What is in the root snaporch has made. An image elsewhere may be exchanged.
            known = self.behind is None or within_root(self.root, beside) is not None
        else:
            known = os.path.dirname(real) == beside or self._allowed(real)
        if not known and real not in behind():
            raise self._outside(what, path)

    def _allowed(self, real: str) -> bool:
        bases = [os.path.realpath(directory) for directory in self.directories()]
        return any(os.path.commonpath([real, base]) == base and real != base for base in bases)

    def _outside(self, what: str, path: str) -> Forbidden:
        allowed = ", ".join([self.root, *self.directories()])
        return Forbidden(
            f"{what}: {path} is outside the directories that the service may use ({allowed}); `directories` in its "
            "configuration says which"
        )
