"""Who else looks after a domain, and the memory that `xendomains` has saved of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaporch.drivers.xen.owners import owner_blocker, owner_of, saved_blocker, saved_file


def _touch(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("file", "who"),
    [
        ("etc/xensource-inventory", "XAPI"),
        ("etc/qubes-release", "Qubes OS"),
        ("run/libvirt/libxl/web.xml", "libvirt"),
        ("run/libvirt/libxl/other.xml", ""),
        ("etc/xen/xl.conf", ""),
    ],
)
def test_the_owner_of_a_domain_is_found(tmp_path: Path, file: str, who: str) -> None:
    _touch(tmp_path, file)
    assert owner_of("web", tmp_path) == who
    assert (who in owner_blocker("web", tmp_path)) if who else not owner_blocker("web", tmp_path)


@pytest.mark.parametrize(
    ("settings", "directory"),
    [
        ("", "var/lib/xen/save"),
        ("XENDOMAINS_SAVE=/srv/saved  # where\n", "srv/saved"),
        ('#XENDOMAINS_SAVE=/no\nXENDOMAINS_SAVE="/srv/saved"\n', "srv/saved"),
    ],
)
def test_memory_that_xendomains_saved_is_found(tmp_path: Path, settings: str, directory: str) -> None:
    _touch(tmp_path, "etc/default/xendomains", settings)
    assert saved_file("web", tmp_path) is None
    assert not saved_blocker("web", tmp_path)
    path = _touch(tmp_path, f"{directory}/web")
    assert saved_file("web", tmp_path) == path
    assert f"`xl restore {path}`" in saved_blocker("web", tmp_path)
    assert saved_file("other", tmp_path) is None


def test_xendomains_may_save_nothing(tmp_path: Path) -> None:
    _touch(tmp_path, "etc/default/xendomains", "XENDOMAINS_SAVE=\n")
    _touch(tmp_path, "var/lib/xen/save/web")
    assert saved_file("web", tmp_path) is None
