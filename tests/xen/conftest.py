"""Fixtures: the lab, a Xen and a dom0 in an emulated machine, gone on with from its kept state."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.xen_lab.__main__ import home_of, is_built, qemu
from scripts.xen_lab.image import ROOT
from scripts.xen_lab.machine import Lab
from scripts.xen_lab.project import put_project


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Dom0 of Xen 4.17.5, with snaporch and the tests that are for it in /lab/code."""
    if not is_built("4.17"):
        pytest.fail("the Xen lab is not built, or not of these sources: run scripts/setup --xen", pytrace=False)
    # Not in memory: the machine's disk is there.
    with tempfile.TemporaryDirectory(prefix="xen-lab-", dir=ROOT / ".cache") as place:
        lab = Lab(home_of("4.17"), Path(place), qemu())
        try:
            lab.resume()
            put_project(lab)
            yield lab
        finally:
            lab.stop()
