"""What has to survive a power cut, on file systems whose power is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snaporch.engine.verdict import STAY, UNDONE, Verdict
from snaporch.testing.outage import FILE_SYSTEMS, Outlet, cut, powered


@pytest.fixture(params=sorted(FILE_SYSTEMS))
def outlet(request: pytest.FixtureRequest) -> Iterator[Outlet]:
    with powered(request.param) as found:
        yield found


async def test_a_verdict(outlet: Outlet) -> None:
    """What is decided stays decided; what is forgotten never comes back: the next operation would obey it."""

    def blackout() -> None:
        cut(outlet.outer)
        outlet.restore()

    verdict = Verdict(outlet.place / "guest.vda.verdict")
    assert await verdict.decide(STAY) == STAY
    blackout()
    assert verdict.read() == STAY
    await verdict.revise(UNDONE)
    blackout()
    assert verdict.read() == UNDONE
    await verdict.forget()
    blackout()
    assert verdict.read() == ""
    assert await verdict.decide(STAY) == STAY
    verdict.path.unlink()  # by one who was killed before that was durable
    await verdict.forget()
    blackout()
    assert verdict.read() == ""
