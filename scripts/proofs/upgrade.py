"""Proves that a root of an earlier version is opened, continued and reverted, with a guest in QEMU.

    scripts/proof upgrade [--qemu VERSION] [COMMIT…]

The package of each commit, by itself, makes two roots, each with a running guest and two snapshots:

- *stream*: its `batch schedule` runs a plan that is due, and is killed while the batch's checkpoint streams: QEMU
  and the sink go on.
- *guard*: its create of a paused guest is killed: QEMU, the sink and the guard are at work.

At once the present package opens the root, ends what was cut short, verifies the snapshots, goes back to each, and
takes another one and deletes one. Of the schedule it goes on with the batch that was cut short, and runs the next.
The guest checks its own memory and disks all the time. At the end the root is made one of a newer version: it is
refused with words, and no file is touched.

Exit status: 0 all of it went so, 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
from benchlib.lab import CACHE, DOMAIN, ROOT, GuestPlan, Qemu, Serial, made, pick, qemus, workplace

from snaporch.errors import InvalidInput

# With schedules and batches, of a service under load; of the last schema of 0.1; and one with records of versions.
COMMITS = ("594b5eb", "a604a14", "3f6e416")
PLAN = GuestPlan(ram=128 * 2**20, dirty=5, touched=64)
SLOW = "4MiB"  # a stream takes at least ten seconds
SCHEDULED = f"""
name = "always"
select.names = ["{DOMAIN}"]
limits.bandwidth = "{SLOW}"
schedule.cron = "* * * * *"
"""


@attrs.define
class Package:
    """Snaporch of some version, by its command line.

    Attributes:
        home: has the package `snaporch`.
        root: on which it works.
        qemu: whose qemu-img it uses.
    """

    home: Path
    root: Path
    qemu: Qemu

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start a command."""
        path = f"{os.path.dirname(self.qemu.img)}:{os.environ['PATH']}"
        command = [sys.executable, "-m", "snaporch", "--root", str(self.root), "--json", *words]
        env = {**os.environ, "PYTHONPATH": str(self.home), "PATH": path}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.home, env=env, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    def end(self, *words: str) -> tuple[int, str, str]:
        """Return how a command ends, and what it says."""
        with self.begin(*words) as process:
            out, err = process.communicate(timeout=300)
            return process.returncode, out, err

    def do(self, *words: str) -> Any:
        """Return what a command that goes well answers."""
        status, out, err = self.end(*words)
        if status != 0:
            sys.exit(f"{self.home.name}: snaporch {' '.join(words)}: exit status {status}: {err or out}")
        return json.loads(out) if out.strip() else None


@attrs.define
class Story:
    """A root that an earlier version made, and its guest."""

    place: Path
    old: Package
    new: Package
    serial: Serial
    mark: int = 0

    def wait(self, what: str, there: Callable[[], object], seconds: float = 150.0) -> None:
        """Wait until something is there."""
        end = time.monotonic() + seconds
        while not there():
            if time.monotonic() > end:
                sys.exit(f"{what}: not within {seconds:g} s")
            time.sleep(0.02)

    def rows(self, query: str) -> list[Any]:
        """Return what the catalog has."""
        with closing(sqlite3.connect(f"file:{self.old.root}/catalog.sqlite3?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()

    def streams(self) -> bool:
        """Whether an operation is in the state in which memory streams."""
        query = "SELECT json_extract(record, '$.state') FROM operation WHERE ended IS NULL"
        return any(state == "streaming" for (state,) in self.rows(query))

    def check_guest(self) -> None:
        """See that the guest runs and has found nothing wrong."""
        mark = self.serial.mark()
        self.wait("a report of the guest", lambda: len(self.serial.reports(mark)) > 1)
        if troubles := self.serial.troubles(self.mark):
            sys.exit(f"the guest is not well: {troubles[:3]}")

    def prepare(self) -> None:
        """Have the old version start a guest and take two snapshots of it."""
        definition = trio.run(made, DOMAIN, self.place, CACHE, self.old.qemu, PLAN)
        keys = ("name", "memory", "accel", "machine", "kernel", "append", "serial", "emulator")
        text = "".join(f"{key} = {json.dumps(getattr(definition, key))}\n" for key in keys)
        text += "".join(f'[[disks]]\ntarget = "{d.target}"\npath = "{d.path}"\n' for d in definition.disks)
        file = self.place / "guest.toml"
        file.write_text(text)
        self.old.do("domain", "define", str(file))
        self.old.do("domain", "start", DOMAIN)
        self.wait("the guest", lambda: len(self.serial.reports(0)) > 1)
        self.mark = self.serial.mark()
        self.old.do("create", DOMAIN, "one", "--live")
        self.old.do("create", DOMAIN, "two")
        self.check_guest()

    def cut_short(self, *words: str) -> None:
        """Have the old version killed while memory streams."""
        process = self.old.begin(*words)
        self.wait("a stream", lambda: self.streams() or process.poll() is not None)
        if process.poll() is not None:
            sys.exit(f"{words}: ended: {process.communicate()}")
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def go_on(self) -> str:
        """Have the present version do everything; return how what was cut short ended."""
        self.new.do("recover")
        (last,) = self.rows("SELECT json_extract(record, '$.state') FROM operation ORDER BY begun DESC LIMIT 1")
        self.check_guest()
        for name in ("one", "two"):
            self.new.do("verify", DOMAIN, name)
            self.new.do("revert", DOMAIN, name)
            self.check_guest()
        self.new.do("create", DOMAIN, "three", "--live")
        self.new.do("delete", DOMAIN, "two")
        self.new.do("revert", DOMAIN, "three")
        self.check_guest()
        return str(last[0])

    def schedule_on(self, plans: Path) -> int:
        """Have the present version end two batches of the schedule; return how many have ended then."""
        query = "SELECT count(*) FROM batch WHERE json_extract(record, '$.ended') IS NOT NULL"
        before = self.rows(query)[0][0]
        process = self.new.begin("batch", "schedule", str(plans))
        try:
            self.wait("the schedule", lambda: self.rows(query)[0][0] >= before + 2)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        return int(self.rows(query)[0][0])

    def check_newer_is_refused(self) -> None:
        """Make the root one of a newer version; see that nothing of it changes."""
        path = self.new.root / "catalog.sqlite3"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 99")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = contents(self.new.root)
        status, _, err = self.new.end("list", DOMAIN)
        if status != InvalidInput.exit_code or "newer snaporch" not in err or contents(self.new.root) != before:
            sys.exit(f"a newer root: exit status {status}: {err}")


def contents(root: Path) -> dict[str, str]:
    """Return digests of the files in a root, without what SQLite makes for each reader."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal")))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def package_of(commit: str, place: Path) -> Iterator[Path]:
    """Yield a directory with the package of a commit."""
    home = place / commit
    text = subprocess.run(["git", "archive", commit, "snaporch"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(text)) as tar:
        tar.extractall(home, filter="data")
    yield home


def prove(commit: str, kind: str, home: Path, place: Path, qemu: Qemu) -> str:
    """Make a root by a commit, and go on with it; return what there is to say."""
    place.mkdir()
    root = place / "root"
    story = Story(place, Package(home, root, qemu), Package(ROOT, root, qemu), Serial(place / f"{DOMAIN}.log"))
    try:
        story.prepare()
        plans = place / "plans"
        plans.mkdir()
        (plans / "always.toml").write_text(SCHEDULED)
        story.old.do("batch", "check", str(plans / "always.toml"))
        if kind == "stream":
            story.cut_short("batch", "schedule", str(plans))
        else:
            story.cut_short("create", DOMAIN, "cut", "--bandwidth", SLOW)
        ended = story.go_on()
        said = f"{commit} {kind}: what was cut short is {ended}"
        if kind == "stream":
            said += f"; batches that ended, by both versions: {story.schedule_on(plans)}"
            story.check_guest()
        findings = story.new.do("fsck")
        if findings:
            sys.exit(f"fsck: {findings}")
    finally:
        story.new.end("domain", "destroy", DOMAIN)
    story.check_newer_is_refused()
    return said


def main() -> None:
    """Prove it for each commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu")
    parser.add_argument("commits", nargs="*", default=COMMITS)
    args = parser.parse_args()
    qemu = pick(qemus(CACHE), args.qemu)
    with workplace(Path("/tmp")) as place:  # noqa: S108 - sockets have short paths there
        for commit in args.commits:
            with package_of(commit, place) as home:
                for kind in ("stream", "guard"):
                    said = prove(commit, kind, home, place / f"{commit}-{kind}", qemu)
                    print(
                        f"QEMU {qemu.version}, {said}; opened, continued, reverted; a newer root is refused",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
