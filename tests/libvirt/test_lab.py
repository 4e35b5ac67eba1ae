"""The libvirtds that the other tests here use."""

from __future__ import annotations

import pytest

from tests.libvirt.lab import Libvirt

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("libvirt")]


def test_answers(daemon: Libvirt) -> None:
    """The daemon is the version that it should be, and its virsh talks to it."""
    said = daemon.virsh("version", "--daemon")
    assert f"daemon: {daemon.version}" in said
    assert daemon.virsh("list", "--all").strip() == ""
