"""What a browser gets from the service and what is not taken from one; where the dashboard's files come from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from snaporch.service.browser import STATIC
from snaporch.service.roles import Role
from tests.service.conftest import ROOT_PEER, Lab, peer

ROOT = Path(__file__).parents[2]
VENDOR = STATIC / "vendor"


async def test_the_page_trusts_nothing_else(lab: Lab) -> None:
    """Anybody gets the files; with them comes a policy that lets no script in but the service's own."""
    with peer(None):
        for path in ("/", "/app.js", "/vendor/preact.mjs"):
            answer = await lab.http.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'; script-src 'self';" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].startswith("text/javascript")
        assert (await lab.http.get("/vendor/../../app.py")).status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "localhost:8080", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "snaporch"}, 200),
        ({"host": "localhost:8080", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "localhost:8080", "sec-fetch-site": "same-site"}, 403),
        ({"host": "rebound.example:8080", "sec-fetch-site": "same-origin"}, 403),
        ({"host": "127.0.0.1.example"}, 403),
    ],
)
async def test_another_page_gets_nothing(lab: Lab, headers: dict[str, str], status: int) -> None:
    """Through a forwarded unix socket, which asks for no token, only our own page may ask."""
    with peer(ROOT_PEER):
        assert (await lab.http.get("/v1/whoami", headers=headers)).status_code == status


async def test_any_name_with_a_token(lab: Lab) -> None:
    """Who has a token may call the service what the network calls it; a cookie is no token."""
    with peer(None):
        token = lab.secret(Role.VIEWER)
        assert (await lab.http.get("/v1/whoami", headers=token | {"host": "host.example"})).status_code == 200
        cookie = {"cookie": f"snaporch_token={token['authorization'].split()[1]}"}
        assert (await lab.http.get("/v1/whoami", headers=cookie)).status_code == 401


def test_vendored_files_are_what_the_registry_has() -> None:
    """Each is in vendor.json with the checksum that scripts/vendor.py saw, and each package has its licence."""
    packages = json.loads((VENDOR / "vendor.json").read_text())
    files = {file["name"]: file["sha256"] for package in packages for file in package["files"]}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del found["vendor.json"]
    assert found == files
    for package in packages:
        assert package["integrity"].startswith("sha512-")
        assert f"LICENSE.{package['name']}" in files


def test_the_wheel_has_the_dashboard(tmp_path: Path) -> None:
    """Whoever installs snaporch has the dashboard, without a build step: every file, and the licences."""
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert {f"snaporch/service/static/{path.relative_to(STATIC)}" for path in files} <= set(names)
    assert any(name.endswith("licenses/snaporch/service/static/vendor/LICENSE.htm") for name in names)


def test_nothing_comes_from_elsewhere() -> None:
    """No file names another host, has a script in its markup, or makes markup of text."""
    for path in STATIC.rglob("*"):
        if path.suffix in {".js", ".html", ".css"}:
            text = path.read_text()
            assert "http://" not in text, path
            assert "https://" not in text, path
            for forbidden in ("innerHTML", "eval(", "document.write", " style=", "onclick="):
                assert forbidden not in text, (path, forbidden)
