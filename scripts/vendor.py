"""Brings the dashboard's libraries from the npm registry, as vendor.json beside them says which.

    python3 scripts/vendor.py            download, compare with vendor.json's integrity, write, note checksums
    python3 scripts/vendor.py --check    only compare: what is here is what the registry has

To update: put the new version and its integrity (``npm view NAME@VERSION dist.integrity``) into vendor.json and run
it. It needs npm; nobody who only installs or uses snaporch runs it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parent.parent / "snaporch/service/static/vendor"


def download(package: dict[str, Any]) -> bytes:
    """Return the package's tar file, which is the one that was looked at when its integrity was written down."""
    with tempfile.TemporaryDirectory() as directory:
        name = f"{package['name']}@{package['version']}"
        subprocess.run(["npm", "pack", "--silent", name], cwd=directory, check=True, stdout=subprocess.DEVNULL)
        (file,) = Path(directory).iterdir()
        data = file.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package["integrity"]:
        sys.exit(f"{name}: its integrity is {found}")
    return data


def adapted(data: bytes) -> bytes:
    """Return a module as a browser can load it as it is: no bare names in imports, no maps that are not there."""
    data = data.replace(b'from"preact"', b'from"./preact.mjs"')
    return re.sub(rb"\n//# sourceMappingURL=.*\n?$", b"\n", data)


def main() -> None:
    """Write the files, or compare them."""
    manifest = VENDOR / "vendor.json"
    packages = json.loads(manifest.read_text())
    for package in packages:
        with tarfile.open(fileobj=io.BytesIO(download(package))) as tar:
            for file in package["files"]:
                member = tar.extractfile(f"package/{file['from']}")
                data = adapted(member.read() if member else b"")
                if "--check" not in sys.argv:
                    (VENDOR / file["name"]).write_bytes(data)
                elif (VENDOR / file["name"]).read_bytes() != data:
                    sys.exit(f"{file['name']} is not what {package['name']} {package['version']} has")
                file["sha256"] = hashlib.sha256(data).hexdigest()
                print(f"{package['name']} {package['version']}: {file['name']}")
    if "--check" not in sys.argv:
        manifest.write_text(json.dumps(packages, indent=2) + "\n")


main()
