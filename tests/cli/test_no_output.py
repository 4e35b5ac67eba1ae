"""Every verb with a standard output that is full, or closed: what was done is done, what is not said is an error.

The table names every verb of the program; one that is missing in it fails the test. The lines are a story: they run
one after the other on one root, each of them with nowhere to write to, in turn full and closed, text and JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
from cyclopts import App

from snaporch.cli import application
from snaporch.drivers.local.files import LocalStorage

# One interpreter runs them all, each in a child as if the program had been started: to import takes the most.
_RUNNER = """
import json, os, sys
from snaporch import cli
from snaporch.cli import archive, batch, human, service, snapshot
for line in sys.stdin:
    where, *words = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open("errors", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), 2)
        if where == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            sys.stdout = open(1, "w", closefd=False)
        else:
            sys.stdout = None
            os.close(1)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = ["snaporch", "--root", "root", *words]
        status = 99
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            status = 120  # as the interpreter does
        os._exit(status or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, open("errors").read()]), flush=True)
"""

DOES, LOOKS, REFUSED = "does", "looks", "refused"
NOWHERE = "standard output cannot be written to"


@attrs.frozen
class Line:
    """A verb with its words, and what it is: it does something, only looks, or is refused here."""

    words: str
    what: str
    status: int = 2


STORY = (
    Line("domain define vm.toml", DOES),
    Line("domain list", LOOKS),
    Line("domain show vm", LOOKS),
    Line("domain depth vm 9", DOES),
    Line("domain tag vm red", DOES),
    Line("domain logs vm", LOOKS),
    Line("create vm s1 --disk-only", DOES),
    Line("create vm s2 --disk-only", DOES),
    Line("create vm s2 --disk-only", REFUSED),
    Line("list vm", LOOKS),
    Line("list vm --names", LOOKS),
    Line("tree vm", LOOKS),
    Line("show vm s1", LOOKS),
    Line("edit vm s1 --description x", DOES),
    Line("pin vm s1", DOES),
    Line("verify vm s1", LOOKS),
    Line("doctor vm", LOOKS),
    Line("operations", LOOKS),
    Line("operations give-up nosuch", REFUSED, 3),
    Line("completion bash", LOOKS),
    Line("completion words list", LOOKS),
    Line("clone vm s1 copy", DOES),
    Line("export vm s1 a.archive", DOES),
    Line("export vm s1 -", REFUSED, 2),
    Line("export-disk vm s1 vda d.qcow2", DOES),
    Line("export-disk vm s1 vda -", REFUSED, 2),
    Line("import a.archive --as taken", DOES),
    Line("flatten copy --dry-run", LOOKS),
    Line("flatten copy", DOES),
    Line("revert vm s1", DOES),
    Line("delete vm s2 --dry-run", LOOKS),
    Line("delete vm s2", DOES),
    Line("create vm s3 --disk-only", DOES),
    Line("prune vm --last 1 --pin s1 --dry-run", LOOKS),
    Line("prune vm --last 1 --pin s1", DOES),
    Line("fsck", LOOKS),
    Line("fsck --repair", DOES),
    Line("recover", DOES),
    Line("batch check plan.toml", LOOKS),
    Line("batch plan plan.toml", LOOKS),
    Line("batch rehearse plan.toml", LOOKS),
    Line("batch run plan.toml", DOES),
    Line("batch list", LOOKS),
    Line("batch show nightly", LOOKS),
    Line("batch orphans", LOOKS),
    Line("batch adopt nightly daily", DOES),
    Line("token make t", DOES),
    Line("token list", LOOKS),
    Line("token revoke t", DOES),
    Line("domain discover", LOOKS),
    Line("domain sync vm", REFUSED),
    Line("domain attach other --qmp /no/such.sock", REFUSED, 2),
    Line("domain start vm --paused", DOES),
    Line("domain resume vm", DOES),
    Line("domain pause vm", DOES),
    Line("domain resume vm", DOES),
    Line("create vm s4", DOES),
    Line("domain reset vm", DOES),
    Line("domain screenshot vm screen.png", REFUSED),
    Line("domain reboot vm --timeout 0.1", REFUSED, 1),
    Line("domain shutdown vm --force-after 0.1", DOES),
    Line("domain start vm --paused", DOES),
    Line("domain destroy vm", DOES),
    Line("domain undefine copy --discard", DOES),
    Line("watch", REFUSED),
    Line("nonsense", REFUSED),
    Line("--help", LOOKS),
    Line("--version", LOOKS),
)
ENDLESS = {"serve", "batch schedule", "demo"}  # they tell as they go, and end when they are told to


def verbs(app: App, before: str = "") -> Iterator[str]:
    """Yield all verbs that the program has."""
    for name in app:
        if not name.startswith("-"):
            inner, words = app[name], f"{before}{name}"
            groups = list(verbs(inner, f"{words} "))
            yield from groups
            if inner.default_command is not None:
                yield words


def test_the_table_has_every_verb() -> None:
    told = {" ".join(line.words.split()[:2]) for line in STORY} | {line.words.split()[0] for line in STORY}
    assert set(verbs(application())) - told == ENDLESS


def test_no_output(tmp_path: Path) -> None:
    """What does something exits 0 with one line that says so; what looks exits 1; what is refused says its own."""
    subprocess.run(
        [LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", str(tmp_path / "a.qcow2"), "16M"], check=True
    )
    (tmp_path / "vm.toml").write_text(
        'name = "vm"\nmemory = "16MiB"\naccel = "tcg"\n[[disks]]\ntarget = "vda"\npath = "a.qcow2"\n'
    )
    (tmp_path / "plan.toml").write_text('name = "nightly"\n[select]\nglobs = ["vm"]\n[snapshot]\nmemory = false\n')
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    asked = []
    for number, line in enumerate(STORY):
        json_ = ["--json"] if number // 2 % 2 and not line.words.startswith("-") and " - " not in line.words else []
        asked.append([("full", "closed")[number % 2], *json_, *line.words.split()])
    ran = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        cwd=tmp_path,
        env=environment,
        input="".join(json.dumps(words) + "\n" for words in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    wrong = []
    for line, answer in zip(STORY, ran.stdout.splitlines(), strict=True):
        status, said = json.loads(answer)
        wanted = {DOES: 0, LOOKS: 1}.get(line.what, line.status)
        lines = said.count(NOWHERE)
        done_so = said.count("what was asked for is done")
        right = {DOES: (1, 1), LOOKS: (1, 0)}.get(line.what, (lines, 0)) == (lines, done_so) and said
        if status != wanted or not right or re.search("defect|Traceback|rolled back", said):
            wrong.append((line.words, status, said))
    assert not wrong, "\n".join(map(str, wrong))
