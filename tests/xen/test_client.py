"""The helper's protocol from our side, and what it makes of libxl's log."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from snaporch.drivers.local.process import kill
from snaporch.drivers.xen import client
from snaporch.drivers.xen.binding import last_error
from snaporch.drivers.xen.client import Answers, SharedHelper, open_helper
from snaporch.drivers.xen.helper import HelperError, read_header, write_header
from snaporch.errors import CommandRefused, ConnectionGone, Unsupported

LOG = """\
libxl: debug: libxl_domain.c:512:libxl_domain_suspend: Domain 3:ao 0x5: create: how=(nil)
xc: error: Failed to enable logdirty: 95,22,0: Internal error
libxl: error: libxl_stream_write.c:1:stream_complete: Domain 3:unable to write: No space left on device
libxl: debug: libxl_event.c:1:libxl__ao_complete: ao 0x5: complete, rc=-3
"""
# What a helper may be: it answers what it is asked with what it was asked, after what the request says.
PROGRAM = """\
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit(1)
    answer = {"error": request["error"]} if "error" in request else {"ok": request}
    print(json.dumps({"id": request.get("id"), **answer}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "helper.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(client, "PROGRAM", path)


def test_the_last_error_of_the_log_is_told() -> None:
    assert last_error(LOG) == "unable to write: No space left on device"
    assert last_error(LOG.partition("libxl: error")[0]) == "Failed to enable logdirty: 95,22,0: Internal error"
    assert not last_error("libxl: debug: a.c:1:f: nothing\n")


def test_answers_come_out_whole_and_by_their_number() -> None:
    answers = Answers()
    data = b"".join(json.dumps({"id": number, "ok": number}).encode() + b"\n" for number in (1, 2, 3))
    answers.feed(data[:20])
    assert answers.take(2) is None
    answers.feed(data[20:])
    assert answers.take(2) == {"id": 2, "ok": 2}
    assert answers.take(2) is None
    assert answers.take(3) == {"id": 3, "ok": 3}


async def test_a_refusal_has_libxls_words(program: None) -> None:  # noqa: ARG001 - it is set
    error: dict[str, Any] = {"call": "domain_suspend", "code": -8, "words": "guest did not suspend"}
    async with open_helper("web") as helper:
        with pytest.raises(CommandRefused, match="guest did not suspend"):
            await helper.ask("save", error=error)
        with pytest.raises(CommandRefused, match="libxl says -3"):
            await helper.ask("save", error=error | {"code": -3, "words": ""})
        assert (await helper.ask("info", domid=4))["domid"] == 4


async def test_one_who_was_cancelled_leaves_no_answer_to_the_next(program: None) -> None:  # noqa: ARG001 - it is set
    async with open_helper("web") as helper:
        with trio.move_on_after(0):
            await helper.ask("first")
        assert (await helper.ask("second"))["do"] == "second"


async def test_a_helper_that_dies_is_told_and_a_shared_one_replaced(program: None) -> None:  # noqa: ARG001 - it is set
    async with open_helper("web") as helper:
        with pytest.raises(ConnectionGone, match="web"):
            await helper.ask("die")
    shared = SharedHelper()
    assert (await shared.ask("one"))["do"] == "one"
    with pytest.raises(Unsupported, match="dom0"):
        await shared.ask("die")
    assert (await shared.ask("two"))["do"] == "two"


async def test_another_is_asked_what_can_be_asked_twice(program: None) -> None:  # noqa: ARG001 - it is set
    async with open_helper("web") as helper:
        for _ in range(2):
            await kill(helper._program.process)
            assert (await helper.ask("run", domid=4))["domid"] == 4
        number = await helper.send("die")
        assert (await helper.ask("info", domid=5))["domid"] == 5
        with pytest.raises(ConnectionGone, match="has died"):
            await helper.receive(number)
        await kill(helper._program.process)
        with pytest.raises(ConnectionGone):
            await helper.ask("save")


async def test_where_there_is_no_xen_the_helper_is_of_no_use() -> None:
    if os.path.exists("/proc/xen/capabilities"):
        pytest.fail("this is for a host without Xen")
    with pytest.raises(Unsupported, match="libxl does not work here"):
        await SharedHelper().ask("hello")


def test_a_memory_file_begins_as_xl_writes_it(tmp_path: Path) -> None:
    config = {"c_info": {"name": "web"}}
    path = tmp_path / "memory"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    write_header(fd, config)
    os.write(fd, b"stream")
    os.lseek(fd, 0, os.SEEK_SET)
    assert read_header(fd) == config
    assert os.read(fd, 10) == b"stream"
    assert path.read_bytes().startswith(b"Xen saved domain, xl format\n \0 \r\x04\x03\x02\x01\x03\0\0\0")
    os.close(fd)


@pytest.mark.parametrize("length", [0, 20, 50, 60])
def test_a_file_that_is_cut_short_is_no_memory_file(tmp_path: Path, length: int) -> None:
    fd = os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)
    write_header(fd, {"c_info": {"name": "web" * 20}})
    os.truncate(fd, length)
    os.lseek(fd, 0, os.SEEK_SET)
    with pytest.raises(HelperError):
        read_header(fd)
    os.close(fd)
