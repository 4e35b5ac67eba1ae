"""Drivers by name: those that are built in, and those that other packages bring.

A driver is imported when the first domain of it is worked with, and not before: what is not used need not be
installed. A name that is not built in is looked up among the entry points of the group ``snaporch.drivers``, each
of which is a class that is called without arguments. That is provisional, as the interface is: it may change with
any version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from snaporch.drivers.base import Driver
from snaporch.errors import InvalidInput, Unsupported

BUILT_IN: Mapping[str, str] = {
    "qemu": "snaporch.drivers.qemu.driver:QemuDriver",
    "libvirt": "snaporch.drivers.libvirt.driver:LibvirtDriver",
    "xen": "snaporch.drivers.xen.driver:XenDriver",
}
"""The drivers of snaporch itself, each with the module and the class."""

GROUP = "snaporch.drivers"
"""The group of entry points in which other packages name theirs."""


class Registry(Mapping[str, Driver]):
    """All drivers that there are, by name; each is made when it is first asked for.

    Args:
        made: the only ones that there are; by default the built-in ones and those of other packages.
    """

    def __init__(self, made: Mapping[str, Driver] | None = None) -> None:
        self._made = dict(made or {})
        self._known = dict(BUILT_IN) if made is None else {}
        self._open = made is None
        self._settings: list[Callable[[Driver], None]] = []

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        names = dict.fromkeys([*self._made, *self._known])
        return iter(names | dict.fromkeys(point.name for point in self._others if point.name not in names))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Driver:
        """Return a driver.

        Raises:
            InvalidInput: there is none of that name.
            Unsupported: it cannot be imported: something that it needs is not installed.
        """
        if name not in self._made:
            driver = self._made[name] = self._load(name)
            for setting in self._settings:
                setting(driver)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is a driver of that name; it need not be one that can be imported."""
        return name in self._made or name in self._known or any(point.name == name for point in self._others)

    def set_up(self, setting: Callable[[Driver], None]) -> None:
        """Do something with every driver, those too that are made later."""
        self._settings.append(setting)
        for driver in self._made.values():
            setting(driver)

    @cached_property
    def _others(self) -> tuple[EntryPoint, ...]:
        # Found out once: every installed package is looked through.
        return tuple(entry_points(group=GROUP)) if self._open else ()

    def _load(self, name: str) -> Driver:
        found = [EntryPoint(name, self._known[name], GROUP)] if name in self._known else self._others
        try:
            for point in found:
                if point.name == name:
                    driver: Driver = point.load()()
                    return driver
        except ImportError as error:
            raise Unsupported(
                f"the driver {name!r} cannot be used here: {error}; `snaporch doctor` says what it needs"
            ) from error
        raise InvalidInput(f"there is no driver {name!r}; there are {', '.join(self) or 'none'}")
