"""Likely mistakes, and what is answered: run one by one, on a root with two domains; docs/evidence/mistakes.md.

``python -m tests.cli.mistakes`` prints the page, and a test compares the two.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs

from snaporch.cli import execute
from snaporch.drivers.local.files import LocalStorage

FILES = {
    "web.toml": 'name = "web"\ndisks = [{target = "vda", path = "vda.qcow2"}]\n',
    "db.toml": 'name = "db"\ndisks = [{target = "vda", path = "db.qcow2"}]\n',
    "syntax.toml": 'name = "web"\nmemory = 1GiB\n',
    "three.toml": 'name = "three"\nmemry = "1GiB"\nvcpus = "two"\nextra_args = "-vga std"\n',
    "gone.toml": 'name = "gone"\ndisks = [{target = "vda", path = "gone.qcow2"}]\n',
    "junk.toml": 'name = "junk"\ndisks = [{target = "vda", path = "junk"}]\n',
    "twice.toml": """name = "twice"
disks = [{target = "vda", path = "new.qcow2"}, {target = "vdb", path = "new.qcow2"}]
""",
    "taken.toml": 'name = "taken"\ndisks = [{target = "vda", path = "db.qcow2"}]\n',
    "kernel.toml": 'name = "kernel"\nkernel = "no-kernel"\n',
    "plan.toml": 'name = "plan"\nselct.names = ["web"]\nretention.daily = "seven"\nschedule.cron = "often"\n',
    "nobody.toml": 'name = "nobody"\nselect.names = ["wbe"]\n',
    "junk": "not an image\n",
}

# What is typed, the exit status, and what the answer has to say: for most, the command that helps.
MISTAKES: dict[str, list[tuple[str, int, str]]] = {
    "Verbs of other programs, and misspelt ones": [
        ("crate web", 2, "`snaporch create`"),
        ("start web", 2, "`snaporch domain start`"),
        ("stop web", 2, "`snaporch domain shutdown`"),
        ("rollback web one", 2, "`snaporch revert`"),
        ("rm web one", 2, "`snaporch delete`"),
        ("snapshot list web", 2, "`snaporch list`"),
        ("snapshot-create-as web one", 2, "`snaporch create`"),
        ("domain rm web", 2, "`snaporch domain undefine`"),
        ("domain", 2, "`snaporch domain --help`"),
        ("xyzzy", 2, "`snaporch --help`"),
    ],
    "Arguments and options": [
        ("list", 2, "`snaporch list --help`"),
        ("list web one", 2, "`snaporch list --help`"),
        ("create", 2, "name a domain"),
        ("create web --liv", 2, "--live"),
        ("--jsn list web", 2, "`--json`"),
        ("revert web", 2, "`snaporch list web`"),
        ("delete web", 2, "`snaporch list web`"),
        ("show web", 2, "`snaporch show --help`"),
        ("verify web", 2, "--all"),
        ("clone web one", 2, "`snaporch clone --help`"),
        ("list web --columns name,bytes", 2, "name,parent"),
        ("operations --last 0", 2, "--last 0"),
        ("operations --last many", 2, "--last"),
        ("operations --since yesterday", 2, "write for example 2h"),
        ("operations --running --failed", 2, "exclude each other"),
        ("completion tcsh", 2, "bash"),
        ("domain depth web many", 2, "`snaporch domain depth --help`"),
    ],
    "Names": [
        ("list wbe", 3, "did you mean 'web'"),
        ("list nowhere", 3, "`snaporch domain list`"),
        ("revert web on", 3, "did you mean 'one'"),
        ("show web nothing", 3, "`snaporch list web`"),
        ("pin web nothing", 3, "`snaporch list web`"),
        ("create web one --disk-only", 2, "one"),
        ("create web 'my snapshot' --disk-only", 2, "my snapshot"),
        ("create web ../up --disk-only", 2, "../up"),
        ("edit web one --name two", 2, "two"),
        ("edit web one", 2, "--name"),
        ("clone web one db", 2, "db"),
        ("domain undefine wbe", 3, "did you mean 'web'"),
        ("token revoke nobody", 3, "`snaporch token list`"),
        ("operations give-up 0123", 3, "`snaporch operations"),
    ],
    "What cannot be": [
        ("create web now --live", 2, "`snaporch domain start web`"),
        ("create web now --disk-only --live", 2, "--live"),
        ("create web now --disk-only --memory-file m", 2, "--memory-file"),
        ("create web now --disk-only --disk vdz=none", 2, "vdz"),
        ("create web now --disk-only --disk vda=", 2, "TARGET=FILE"),
        ("create web now --disk-only --disk vda --disk vda", 2, "twice"),
        ("create web now --bandwidth fast", 2, "fast"),
        ("create web now --max-seconds 0", 2, "--max-seconds"),
        ("create web now --on-timeout pause", 2, "--max-seconds"),
        ("create web now --strategy quick", 2, "background"),
        ("create --group web,web pair", 2, "named once"),
        ("revert web one --running --paused", 2, "exclude"),
        ("domain shutdown web", 2, "web is inactive"),
        ("domain pause web", 2, "`snaporch domain start web`"),
        ("domain undefine web", 2, "--snapshots"),
        ("flatten web --depth 0", 2, "at least one image"),
        ("clone web one new --count 0", 2, "count"),
        ("prune web --within soon", 2, "soon"),
        ("watch", 2, "`snaporch serve`"),
    ],
    "Files": [
        ("domain define none.toml", 2, "none.toml"),
        ("domain define syntax.toml", 2, "syntax.toml"),
        ("domain define three.toml", 2, "'memory'"),
        ("domain define gone.toml", 2, "gone.qcow2"),
        ("domain define junk.toml", 2, "junk"),
        ("domain define twice.toml", 2, "new.qcow2"),
        ("domain define taken.toml", 2, "qemu-img create"),
        ("domain define kernel.toml", 2, "no-kernel"),
        ("domain attach new", 2, "--qmp"),
        ("domain attach new --qmp none.sock", 2, "none.sock"),
        ("export web one db.qcow2", 2, "db.qcow2"),
        ("export web one no/where/web.tar", 2, "no/where"),
        ("export-disk web one vdz vdz.qcow2", 2, "vdz"),
        ("import junk", 2, "junk"),
        ("import none.tar", 2, "none.tar"),
        ("batch check none.toml", 2, "none.toml"),
        ("batch check plan.toml", 2, "'select'"),
        ("batch run nobody.toml", 3, "wbe"),
    ],
    "The service and the root": [
        ("serve --listen nonsense", 2, "ADDRESS:PORT"),
        ("serve --listen 127.0.0.1:99999", 2, "port"),
        ("serve --listen 0.0.0.0:8080", 2, "certificate"),
        ("--root junk domain list", 2, "junk"),
        ("token make 'a b'", 2, "a b"),
        ("token make ci --role king", 2, "operator"),
    ],
}


@attrs.frozen
class Said:
    """What was answered."""

    status: int
    out: str
    err: str


def prepare(place: Path) -> None:
    """Make the files, and a root with a domain that has two snapshots and one that has none."""
    for name, text in FILES.items():
        (place / name).write_text(text)
    for image in ("vda.qcow2", "db.qcow2", "new.qcow2"):
        subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", place / image, "8M"], check=True)
    for words in (
        "domain define web.toml",
        "domain define db.toml",
        "create web one --disk-only",
        "create web two --disk-only",
    ):
        assert typed(place, words).status == 0, words


def typed(place: Path, line: str) -> Said:
    """Run a command line, in the place."""
    with chdir(place), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        os.environ["SNAPORCH_ROOT"] = "root"
        try:
            status = execute(shlex.split(line))
        finally:
            del os.environ["SNAPORCH_ROOT"]
    where = re.compile(rf"{re.escape(str(place))}/?")
    return Said(status, out.getvalue(), where.sub("", err.getvalue()))


def page(place: Path) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from (
        "# Likely mistakes, and what is answered",
        "",
        "Each was typed, and answered so, by `python -m tests.cli.mistakes`; a test compares. The root has a",
        "domain `web` with the snapshots `one` and `two`, and a domain `db` without any, both inactive; last is",
        "the exit status.",
    )
    for heading, lines in MISTAKES.items():
        yield from ("", f"## {heading}", "", "```text")
        for line, _, _ in lines:
            said = typed(place, line)
            yield f"$ snaporch {line}"
            yield from said.err.splitlines()
            yield f"[{said.status}]"
        yield "```"


def main() -> None:
    """Print the page."""
    with TemporaryDirectory() as directory:
        prepare(Path(directory))
        sys.stdout.write("\n".join(page(Path(directory))) + "\n")


if __name__ == "__main__":
    main()
