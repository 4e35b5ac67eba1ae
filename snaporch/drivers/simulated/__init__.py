"""A hypervisor in memory, on Trio's clock, with faults that can be injected.

It behaves as `snaporch.drivers.base` says and is public: for tests of one's own, for rehearsals of large
batches, and for the conformance suite. Nothing touches the disk, no thread and no background task is used, nothing
is random: under `trio.testing.MockClock(autojump_threshold=0)` hours pass at once and every run is the same.

    host = SimulatedHost()
    host.add_image("/images/web1.qcow2")
    driver = SimulatedDriver(host)
    host.faults.add("stream.half", error=OSError(errno.ENOSPC, "No space left on device"))

Modules, from the bottom: `files` and `locks` (what is on disk, and who has it open), `guest` and `migration` (what
a machine does in time), `process` (a hypervisor process), `host` (the world), `faults`; above it `client` (how a
call travels and fails), `machine`, `storage` and `driver` (the interface). `clock` lets virtual time and the
catalog's threads get along.
"""

from snaporch.drivers.simulated.client import SimulatedKill
from snaporch.drivers.simulated.clock import ThreadsHoldTime
from snaporch.drivers.simulated.driver import SimulatedDriver
from snaporch.drivers.simulated.faults import POINTS, Fault, FaultPlan
from snaporch.drivers.simulated.guest import Guest, GuestModel, SimulatedSpeed
from snaporch.drivers.simulated.host import SimulatedHost

__all__ = [
    "POINTS",
    "Fault",
    "FaultPlan",
    "Guest",
    "GuestModel",
    "SimulatedDriver",
    "SimulatedHost",
    "SimulatedKill",
    "SimulatedSpeed",
    "ThreadsHoldTime",
]
