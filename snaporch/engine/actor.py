"""Actors perform the steps: one actor for each domain, with a method for each step."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

from snaporch.engine.steps import Lane, Step


class Actor(abc.ABC):
    """Performs steps on one domain.

    A step is performed by the coroutine method whose name is the step's value. One of a disk's lane is called with
    the disk's target, the others with nothing.

    Attributes:
        performs: all steps and compensations that the class is asked for.

    Raises:
        TypeError: when a class is made that has no such method for one of them.
    """

    performs: ClassVar[frozenset[Step]] = frozenset()

    def __init_subclass__(cls) -> None:
        """Look for the method of every step."""
        super().__init_subclass__()
        for step in cls.performs:
            method = getattr(cls, step, None)
            arguments = ["self", "target"] if step.lane.has_target else ["self"]
            if not inspect.iscoroutinefunction(method) or list(inspect.signature(method).parameters) != arguments:
                raise TypeError(f"{cls.__name__} needs a method `async def {step}({', '.join(arguments)})`")

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The domain's name."""

    @abc.abstractmethod
    def keys(self, lane: Lane) -> Sequence[str]:
        """Return who works in a lane: targets of disks, or one empty string, or nothing."""

    async def differs(self) -> str:
        """Return in which way the domain is not as before the operation, after that was undone; empty: in none."""
        return ""

    def performing(self, step: Step) -> Callable[..., Awaitable[None]]:
        """Return what performs a step."""
        if step not in self.performs:
            raise AssertionError(f"{type(self).__name__} is not there for {step}")
        method: Callable[..., Awaitable[None]] = getattr(self, step)
        return method
