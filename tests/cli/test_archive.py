"""An archive on standard output, as a pipe has it, and the way back in."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from snaporch.cli import execute
from snaporch.drivers.local.files import LocalStorage
from tests.cli.conftest import Program, _environment


def test_through_standard_output(tmp_path: Path) -> None:
    """`-` is no option: the archive, and nothing else, goes there; another root opens it."""
    program, image, archive = Program(tmp_path), tmp_path / "vda.qcow2", tmp_path / "web.tar"
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    (tmp_path / "web.toml").write_text(
        f'name = "web"\nmemory = "1GiB"\ndisks = [{{target = "vda", path = "{image}"}}]\n'
    )
    program.look("domain", "define", str(tmp_path / "web.toml"))
    program.look("create", "web", "cold", "--disk-only")
    command = [sys.executable, "-m", "snaporch", "--root", str(tmp_path / "root"), "export", "web", "cold", "-"]
    with archive.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, env=_environment(), check=True)
    assert done.stderr.decode().splitlines()[-1] == "snaporch: web cold: vda written"
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["manifest.json", "disks/vda.qcow2"]
    other = ["--root", str(tmp_path / "other")]
    assert execute([*other, "import", str(archive), "--as", "copy"]) == 0
    assert execute([*other, "verify", "copy", "cold"]) == 0


def test_a_misspelt_option_is_no_file(tmp_path: Path) -> None:
    """Where `-` is taken, an option that is not known is not."""
    assert execute(["--root", str(tmp_path / "root"), "export", "web", "cold", "--jsn"]) == 2
    assert not list(Path.cwd().glob("--jsn*"))
