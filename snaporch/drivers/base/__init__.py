"""The interface between snaporch and a hypervisor.

A driver has three faces, each a small core that every driver has, and traits (`traits`) that it may have:

- `Driver` launches, attaches to and connects to the machines that run domains;
- `Machine` is an open connection to one of them, exclusive while it is open;
- `Storage` is where its images and memory files live.

The rest of snaporch asks the records, `Info` and `Capabilities`, never the driver's name. The conformance
suite in `snaporch.testing` checks what a driver has to do; the docstrings here give the details.

Errors: a driver raises `CommandRefused` when the hypervisor said no (nothing was changed), `ConnectionGone` when
it is gone, `OutcomeUnknown` when it did not answer. File errors are `OSError`.
"""

from snaporch.drivers.base.driver import Driver
from snaporch.drivers.base.machine import Guard, Machine, Stream
from snaporch.drivers.base.storage import Storage
from snaporch.drivers.base.storage_traits import Archives, ChainCosts, ImagePoints, OfflineMerges
from snaporch.drivers.base.traits import (
    TRAITS,
    Bearer,
    Clones,
    DirtyRate,
    Discovers,
    GuestAgent,
    KeepsRecords,
    LiveCopies,
    LiveMerges,
    LoadsLazily,
    LoadsMemory,
    MemoryStreams,
    Overlays,
    PointsInside,
    Resets,
    Screens,
    StartsBeside,
    check_versions,
    has,
    need,
    require,
)
from snaporch.drivers.base.values import (
    LOADING,
    Address,
    Binary,
    Capabilities,
    ChainCost,
    Copied,
    Foreign,
    GuestVerb,
    ImageStatus,
    Info,
    Inside,
    Launch,
    LazyLoad,
    LoadNote,
    Original,
    Overlay,
    OverlayPlace,
    PauseNote,
    PivotNote,
    Place,
    Progress,
    StreamPlan,
    Theirs,
    Trait,
    Writer,
    untold,
)

__all__ = [
    "LOADING",
    "TRAITS",
    "Address",
    "Archives",
    "Bearer",
    "Binary",
    "Capabilities",
    "ChainCost",
    "ChainCosts",
    "Clones",
    "Copied",
    "DirtyRate",
    "Discovers",
    "Driver",
    "Foreign",
    "Guard",
    "GuestAgent",
    "GuestVerb",
    "ImagePoints",
    "ImageStatus",
    "Info",
    "Inside",
    "KeepsRecords",
    "Launch",
    "LazyLoad",
    "LiveCopies",
    "LiveMerges",
    "LoadNote",
    "LoadsLazily",
    "LoadsMemory",
    "Machine",
    "MemoryStreams",
    "OfflineMerges",
    "Original",
    "Overlay",
    "OverlayPlace",
    "Overlays",
    "PauseNote",
    "PivotNote",
    "Place",
    "PointsInside",
    "Progress",
    "Resets",
    "Screens",
    "StartsBeside",
    "Storage",
    "Stream",
    "StreamPlan",
    "Theirs",
    "Trait",
    "Writer",
    "check_versions",
    "has",
    "need",
    "require",
    "untold",
]
