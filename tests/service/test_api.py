"""What can be asked, and what is answered: on a simulated domain."""
# ruff: noqa: ARG001 - pytest-trio runs a test on the clock that it finds among the arguments

from __future__ import annotations

from trio.testing import MockClock

from snaporch.drivers.simulated import ThreadsHoldTime
from tests.service.conftest import Lab

WEB = "/v1/domains/web1"


async def test_the_whole_story(lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime) -> None:
    """Create, list, tree, revert, verify: each by its URL, each with what the library answers."""
    created = await lab.http.post(f"{WEB}/snapshots?wait", json={"snapshot": {"name": "one"}, "flags": ["live"]})
    assert created.status_code == 200
    assert created.json()["outcome"] == "complete"
    assert created.json()["result"]["snapshot"]["name"] == "one"
    second = await lab.http.post(f"{WEB}/snapshots", json={"snapshot": {"name": "two"}, "flags": ["live"]})
    assert second.status_code == 202
    ended = await lab.http.get(f"/v1/operations/{second.json()['id']}?wait=60")
    assert (ended.json()["state"], ended.json()["outcome"]) == ("complete", "complete")
    assert [r["snapshot"]["name"] for r in (await lab.http.get(f"{WEB}/snapshots")).json()["items"]] == [
        "one",
        "two",
    ]
    assert (await lab.http.get(f"{WEB}/tree")).json()[0]["children"][0]["current"]
    for url, body in (
        ("snapshots/one/revert", {}),
        ("snapshots/one/verify", {"boot": True}),
    ):
        answer = await lab.http.post(f"{WEB}/{url}?wait", json=body)
        assert (answer.status_code, answer.json()["outcome"]) == (200, "complete"), answer.text
    known = (await lab.http.get("/v1/operations?domain=web1")).json()["items"]
    assert [each["kind"] for each in known] == ["create", "create", "revert", "verify"]
    assert {each["by"] for each in known} == {"uid:0"}


async def test_a_refusal_is_a_problem(
    lab: Lab, autojump_clock: MockClock, threads_hold_time: ThreadsHoldTime
) -> None:
    """What is refused is answered at once, with the library's text and the command line's exit status."""
    for url, body, status, code in (
        ("nobody/snapshots", {}, 404, 3),
        ("web1/snapshots", {"snapshot": {"name": "no/name"}}, 422, 2),
        ("web1/snapshots", {"flags": ["disk-only"]}, 409, 2),
        ("web1/snapshots", {"flags": ["fast"]}, 422, 2),
        ("web1/snapshots/none/revert", {}, 404, 3),
    ):
        answer = await lab.http.post(f"/v1/domains/{url}", json=body)
        problem = answer.json()
        assert (answer.status_code, problem["exit_code"]) == (status, code), problem
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["detail"]
    assert not (await lab.http.get(f"{WEB}/snapshots")).json()["items"]
