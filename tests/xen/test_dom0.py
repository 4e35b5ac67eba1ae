"""The Xen driver in dom0: the tests of `in_dom0/stories.py` run there, once, and what each came to is told here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from xml.etree import ElementTree as ET

import pytest

from scripts.xen_lab.machine import Lab
from scripts.xen_lab.project import CODE, PYTHON

STORIES = ("live", "not_live", "disks_only", "refused", "killed")
SECONDS = 1800.0  # two minutes where nothing else runs
RESULTS = "/tmp/results.xml"  # noqa: S108 - in dom0, where we are alone


@pytest.fixture(scope="module")
def outcomes(lab: Lab) -> Mapping[str, str]:
    """What went wrong in each, or an empty string."""
    options = f"-v -p no:cacheprovider --junitxml={RESULTS} --durations=0"
    command = f"cd /{CODE} && {PYTHON} -m pytest {options} tests/xen/in_dom0/stories.py"
    text = ""
    for each in lab.follow(command, SECONDS):
        if isinstance(each, str):
            text += each
            sys.stdout.write(each)  # shown where a test fails
            sys.stdout.flush()
    try:
        cases = ET.fromstring(lab.sh(f"cat {RESULTS}")).iter("testcase")  # noqa: S314 - it is ours
    except Exception as error:
        raise AssertionError(f"the tests did not run in dom0:\n{text[-4000:]}") from error
    return {
        case.attrib["name"].removeprefix("test_"): "\n".join(child.text or "" for child in case) for case in cases
    }


@pytest.mark.xen
@pytest.mark.xdist_group("xen")
@pytest.mark.parametrize("story", STORIES)
def test_in_dom0(story: str, outcomes: Mapping[str, str]) -> None:
    """Each is passed there."""
    assert outcomes.get(story, "it did not run") == ""
