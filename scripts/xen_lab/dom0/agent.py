"""Runs commands in dom0 for the host: JSON lines in and out on the virtio port "lab"; any number at a time.

In: ``{"id", "sh", "timeout"}`` runs a command, ``{"id", "put", "data"}`` appends base64 data to a file. Out, by id:
``{"out"}`` any number of times, then ``{"rc", "seconds"}``.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

CHUNK = 1 << 16


class Agent:
    """The port, and what runs."""

    def __init__(self) -> None:
        ports = Path("/sys/class/virtio-ports").iterdir()
        port = next(each.name for each in ports if (each / "name").read_text().strip() == "lab")
        self.fd = os.open(f"/dev/{port}", os.O_RDWR)
        self.lock = threading.Lock()

    def say(self, **what: Any) -> None:
        """Write a line, whole."""
        data = (json.dumps(what) + "\n").encode()
        with self.lock:
            while data:
                data = data[os.write(self.fd, data) :]

    def run(self, job: dict[str, Any]) -> None:
        """Run a command and say what it says."""
        began = time.monotonic()
        with subprocess.Popen(
            ["/bin/bash", "-c", job["sh"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            timer = threading.Timer(job["timeout"], os.killpg, (process.pid, 9))
            timer.start()
            if process.stdout is not None:
                while chunk := os.read(process.stdout.fileno(), CHUNK):
                    self.say(id=job["id"], out=chunk.decode(errors="replace"))
            status = process.wait()
            timer.cancel()
        self.say(id=job["id"], rc=status, seconds=round(time.monotonic() - began, 3))

    def put(self, job: dict[str, Any]) -> None:
        """Append to a file."""
        with Path(job["put"]).open("ab") as file:
            file.write(base64.b64decode(job["data"]))
        self.say(id=job["id"], rc=0, seconds=0)

    def serve(self) -> None:
        """Serve until the machine is switched off."""
        rest = b""
        while True:
            try:
                data = os.read(self.fd, CHUNK)
            except OSError:
                data = b""
            if not data:  # nobody is connected
                time.sleep(0.05)
                continue
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    job = json.loads(line)
                except ValueError:  # the end of what was meant for the agent before
                    continue
                if "put" in job:
                    self.put(job)
                else:
                    threading.Thread(target=self.run, args=(job,), daemon=True).start()


if __name__ == "__main__":
    Agent().serve()
