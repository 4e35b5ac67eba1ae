"""Counts, in a Debian guest, in a database and on both disks, and compares all of it with its own count for ever.

It is the guest's own program: it runs as a service there, and says what it finds on the serial port, a line each:

    JUDGE boot FIRST SECOND ONE TWO   what it found when it began: files on both disks, rows on both disks
    JUDGE ok N                        N is in the database, on both disks and here
    JUDGE BAD WORDS                   something is not of one instant

A guest that goes back to a point has this process's memory, the database's memory, and both disks of that point. If
they are of one instant the judge goes on as if nothing had been. Files are read past the cache, and so is the
database, whose buffers are small.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import threading
import time
from pathlib import Path

import psycopg2

BLOCK = 4096
FILES = (Path("/var/lib/judge/count"), Path("/srv/second/count"))
ROWS = 40  # inserted at each count, of a KiB each
KEPT = 2_000
EVERY = 5  # counts, after which all rows and pgbench's sums are compared
PATTERN_MIB = 48
DATABASE_SECONDS = 300.0  # for it to start
TPM = Path("/dev/tpmrm0")
PCR = 16  # for debugging: whoever wants may reset it
SCHEMA = """
CREATE TABLE IF NOT EXISTS one (n bigint NOT NULL);
CREATE TABLE IF NOT EXISTS two (n bigint NOT NULL) TABLESPACE second;
CREATE TABLE IF NOT EXISTS bulk (k bigint PRIMARY KEY, data bytea NOT NULL, sum text NOT NULL) TABLESPACE second;
"""
BULK = "SELECT count(*), count(*) FILTER (WHERE encode(sha256(data), 'hex') <> sum), max(k) FROM bulk"
# What pgbench does is one transaction each: in every snapshot of the database these are the same.
SUMS = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
    (SELECT sum(bbalance) FROM pgbench_branches), coalesce((SELECT sum(delta) FROM pgbench_history), 0)
"""


def say(words: str) -> None:
    """Write a line to the serial port, as one write."""
    with open("/dev/ttyS0", "wb", buffering=0) as port:
        port.write(f"\nJUDGE {words}\n".encode())


def bad(words: str) -> None:
    """Say that something is wrong, for ever: there is nothing to go on with."""
    while True:
        say(f"BAD {words}")
        time.sleep(1)


def read(path: Path) -> int:
    """Return the number in a file, from the disk."""
    fd, block = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, BLOCK)
    try:
        os.readv(fd, [block])
        return int(bytes(block[:20]).decode())
    finally:
        os.close(fd)


def write(path: Path, number: int) -> None:
    """Put a number into a file, and onto the disk."""
    fd, block = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC), mmap.mmap(-1, BLOCK)
    try:
        block[:20] = b"%020d" % number
        os.writev(fd, [block])
    finally:
        os.close(fd)


def prepare() -> psycopg2.extensions.connection:
    """Return a connection to the database, in which all tables are."""
    begun = time.monotonic()
    while True:
        try:
            database = psycopg2.connect("dbname=postgres user=postgres")
            break
        except psycopg2.OperationalError as error:
            if time.monotonic() - begun > DATABASE_SECONDS:
                bad(f"no database: {error}")
            time.sleep(0.5)
    database.autocommit = True
    cursor = database.cursor()
    cursor.execute("SELECT 1 FROM pg_tablespace WHERE spcname = 'second'")
    if cursor.fetchone() is None:
        cursor.execute("CREATE TABLESPACE second LOCATION '/srv/second/tables'")
        cursor.execute(SCHEMA)
        cursor.execute("INSERT INTO one VALUES (0)")
        cursor.execute("INSERT INTO two VALUES (0)")
        for path in FILES:
            path.write_bytes(b"%020d" % 0 + bytes(BLOCK - 20))
        subprocess.run(
            ["pgbench", "-U", "postgres", "-i", "-q", "-s", "1", "postgres"], check=True, capture_output=True
        )
    database.autocommit = False
    return database


def dirty(pattern: bytearray) -> None:
    """Write to memory for ever: each page has its number and a round in it, and no page is a round behind."""
    turn = 0
    while True:
        for place in range(0, len(pattern), BLOCK):
            said = int.from_bytes(pattern[place : place + 8], "little")
            if said != turn:
                bad(f"page {place // BLOCK} of the pattern is of round {said}, not of {turn}")
            pattern[place : place + 8] = (turn + 1).to_bytes(8, "little")
        turn += 1
        time.sleep(0.2)


def in_tpm() -> bytes:
    """Return what the register has."""
    said = subprocess.run(["tpm2_pcrread", f"sha256:{PCR}"], check=True, capture_output=True, text=True)
    return bytes.fromhex(said.stdout.rsplit("0x", 1)[1].strip())


class Judge:
    """What it has counted, and where.

    Attributes:
        count: so often by now.
        register: what the TPM's register has to have; None: there is no TPM.
    """

    def __init__(self, database: psycopg2.extensions.connection) -> None:
        """See what is there, and begin with that."""
        self._database = database
        self._cursor = database.cursor()
        self._cursor.execute("SELECT (SELECT n FROM one), (SELECT n FROM two)")
        one, two = self._cursor.fetchone()
        database.commit()
        first, second = (read(path) for path in FILES)
        say(f"boot {first} {second} {one} {two}")
        if one != two or not one - 1 <= second <= first <= one:
            bad(f"found at boot: {first} and {second} in files, {one} and {two} in the database")
        self.count = one
        for path in FILES:
            write(path, one)
        self.register = in_tpm() if TPM.exists() else None

    def look(self) -> None:
        """Compare all that is there with the count."""
        Path("/proc/sys/vm/drop_caches").write_text("1")
        self._cursor.execute("SELECT (SELECT n FROM one), (SELECT n FROM two)")
        found = (*self._cursor.fetchone(), *(read(path) for path in FILES))
        if found != (self.count,) * 4:
            bad(f"{found} is there, and not {self.count}")
        if self.register is not None and in_tpm() != self.register:
            bad(f"the TPM's register is not that of {self.count}")
        if self.count % EVERY == 0:
            self._cursor.execute(BULK)
            rows, wrong, last = self._cursor.fetchone()
            if wrong or (rows, last or 0) != (min(self.count * ROWS, KEPT), self.count * ROWS):
                bad(f"{rows} rows up to {last} at {self.count}, {wrong} of them damaged")
            self._cursor.execute(SUMS)
            sums = self._cursor.fetchone()
            if len(set(sums)) != 1:
                bad(f"the sums of pgbench are {sums}")
        self._database.commit()

    def go_on(self) -> None:
        """Count once more, in all places."""
        self.count += 1
        last = self.count * ROWS
        self._cursor.execute("UPDATE one SET n = %s", (self.count,))
        self._cursor.execute("UPDATE two SET n = %s", (self.count,))
        for key in range(last - ROWS + 1, last + 1):
            data = os.urandom(1024)
            row = (key, data, hashlib.sha256(data).hexdigest())
            self._cursor.execute("INSERT INTO bulk VALUES (%s, %s, %s)", row)
        self._cursor.execute("DELETE FROM bulk WHERE k <= %s", (last - KEPT,))
        self._database.commit()
        for path in FILES:
            write(path, self.count)
        if self.register is not None:
            digest = hashlib.sha256(str(self.count).encode()).digest()
            subprocess.run(["tpm2_pcrextend", f"{PCR}:sha256={digest.hex()}"], check=True, capture_output=True)
            self.register = hashlib.sha256(self.register + digest).digest()


def main() -> None:
    """Count for ever."""
    judge = Judge(prepare())
    threading.Thread(target=dirty, args=(bytearray(PATTERN_MIB << 20),), daemon=True).start()
    load = ["pgbench", "-U", "postgres", "-n", "-c", "2", "-R", "20", "-T", "1000000", "postgres"]
    pressing = subprocess.Popen(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        judge.look()
        if pressing.poll() is not None:
            bad(f"pgbench has ended, with {pressing.returncode}")
        say(f"ok {judge.count}")
        judge.go_on()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # noqa: BLE001 - all that it does is to tell
        bad(f"{type(error).__name__}: {error}")
