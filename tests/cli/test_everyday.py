"""Everyday verbs: completion, names alone, logs, what goes with a domain, and what happens in a service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snaporch.drivers.local.files import LocalStorage
from tests.cli.conftest import NAME, Program, until


def test_a_shell_completes(tmp_path: Path) -> None:
    """In bash itself: verbs, options, and names of domains and snapshots."""
    program = Program(tmp_path)
    image = str(tmp_path / "vda.qcow2")
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    definition = 'name = "webserver"\nmemory = "64MiB"\ndisks = [{target = "vda", path = "vda.qcow2"}]\n'
    (tmp_path / "web.toml").write_text(definition)
    program.look("domain", "define", str(tmp_path / "web.toml"))
    program.look("create", "webserver", "before-upgrade", "--disk-only")
    script = program.look("completion", "bash")["script"]
    binary = tmp_path / "snaporch"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m snaporch --root {tmp_path}/root "$@"\n')
    binary.chmod(0o755)

    def completed(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("snaporch", *words))
        ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _snaporch; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("rev") == ["revert"]
    assert completed("domain", "sh") == ["show", "shutdown"]
    assert completed("revert", "web") == ["webserver"]
    assert completed("revert", "webserver", "") == ["before-upgrade"]
    assert completed("create", "webserver", "") == []
    assert "--quiesce" in completed("create", "--qu")
    for shell in ("zsh", "fish"):
        assert "snaporch completion words" in program.look("completion", shell)["script"]
    assert program.run("list", "webserver", "--names").out == "before-upgrade\n"
    assert program.run("domain", "list", "--names").out == "webserver\n"
    assert program.run("domain", "undefine", "webserver").status == 2
    assert program.run("domain", "undefine", "webserver", "--snapshots").status == 0
    assert program.look("domain", "list", "--names") == []
    assert Path(image).exists()


@pytest.mark.live
def test_what_a_hypervisor_says(guest: Program) -> None:
    """Its log, the last lines of it; a domain that is not there has none."""
    log = guest.directory / "root" / NAME / "qemu.log"
    with log.open("a") as file:
        file.write("one\ntwo\nthree\n")
    answer = guest.look("domain", "logs", NAME, "--lines", "2")
    assert {"format": 1, "file": str(log), "lines": ["two", "three"]} in answer
    assert guest.run("domain", "logs", NAME, "--lines", "1").out.endswith("three\n")
    assert guest.run("domain", "logs", "nobody").status == 3
    assert guest.run("domain", "logs", NAME, "--lines", "0").status == 2


@pytest.mark.live
def test_undefine_refuses_before_it_deletes(guest: Program) -> None:
    """A guest that runs keeps all of its snapshots."""
    guest.answer("create", NAME, "kept", "--live")
    ran = guest.run("domain", "undefine", NAME, "--snapshots")
    assert (ran.status, "no snapshot was deleted" in ran.err) == (2, True)
    assert "kept" in guest.look("list", NAME, "--names")
    guest.answer("delete", NAME, "kept")


def test_watch(tmp_path: Path) -> None:
    """What happens in a service, one document a line; without one it says so."""
    program = Program(tmp_path)
    image = str(tmp_path / "vda.qcow2")
    subprocess.run([LocalStorage().qemu_img, "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    definition = 'name = "web"\nmemory = "64MiB"\ndisks = [{target = "vda", path = "vda.qcow2"}]\n'
    (tmp_path / "web.toml").write_text(definition)
    program.look("domain", "define", str(tmp_path / "web.toml"))
    ran = program.run("watch")
    assert (ran.status, "snaporch serve" in ran.err) == (2, True)
    service = program.begin("serve")
    try:
        until((tmp_path / "root/service.sock").exists)
        out = tmp_path / "watched"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "snaporch", "--root", str(tmp_path / "root"), "--json", "watch", "web"]
        with out.open("wb") as file:
            watching = subprocess.Popen(command, stdout=file, env=environment)
        number = 0

        def seen() -> bool:
            """Take snapshots until one is seen: nobody says when the other process listens."""
            nonlocal number
            number += 1
            program.answer("create", "web", f"n{number}", "--disk-only")
            return any(json.loads(line)["state"] == "complete" for line in out.read_text().splitlines())

        until(seen)
        watching.send_signal(2)
        assert watching.wait(30) == 130
    finally:
        service.send_signal(2)
        program.end(service)


def test_words_for_what_is_done_in_any_case(tmp_path: Path) -> None:
    """A revert takes them: what is refused is the domain, which is not there."""
    ran = Program(tmp_path).run("revert", "nobody", "one", "--no-lazy", "--no-wait", "--keep-clock")
    assert (ran.status, "no domain 'nobody'" in ran.err) == (3, True)
