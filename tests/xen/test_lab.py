"""The lab: what is said where it cannot be made or reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.xen_lab.debian import RELEASES, LabError, check_version
from scripts.xen_lab.machine import Lab

POLICY = "xen-hypervisor-4.17-amd64:\n  Installed: (none)\n  Candidate: {}\n  Version table:\n"


def test_only_the_xen_that_the_tests_are_for_is_taken() -> None:
    release = RELEASES["4.17"]
    check_version(release, POLICY.format("4.17.5+72-g01140da4e8-1"))
    for found in ("4.17.7+13-gdeadbeef-1", "(none)"):
        with pytest.raises(LabError, match=r"no longer has Xen 4\.17\.5"):
            check_version(release, POLICY.format(found))
    with pytest.raises(LabError, match="it has none"):
        check_version(release, "")


def test_a_lab_that_nobody_serves_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no lab is served"):
        Lab(tmp_path, tmp_path, "").sh("true")
