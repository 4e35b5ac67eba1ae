"""The dashboard in a real Chromium, on a real guest: by mouse, by keyboard, on a phone."""

from __future__ import annotations

import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.cli.conftest import NAME, Program, running_guest
from tests.service.test_server import serving

# One browser and one guest for all of them, one test after the other.
pytestmark = [pytest.mark.live, pytest.mark.xdist_group("dashboard")]

FLAGS = (
    "--headless",
    "--no-sandbox",  # it is of no use to root, who runs the tests
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MILLISECONDS = 30_000  # for anything that is to happen; far more than it ever needs
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
NASTY = "<img src=x onerror=alert(1)> & <b>so on</b>"
FOCUSED = "(() => { const style = getComputedStyle(document.activeElement); return style.outlineStyle; })()"


@attrs.frozen
class Site:
    """A service with a guest, as a browser finds it."""

    program: Program
    url: str
    operator: str
    viewer: str


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, kernel: Path) -> Iterator[Site]:
    """A service over TCP, whose root has one domain with a running guest."""
    with running_guest(tmp_path_factory.mktemp("dashboard"), kernel) as program:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        tokens = [program.look("token", "make", role, "--role", role)["token"] for role in ("operator", "viewer")]
        with serving(program, "--listen", f"127.0.0.1:{port}"):
            yield Site(program, f"http://127.0.0.1:{port}", *tokens)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, with a profile of its own."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("there is no chromium: run scripts/setup", pytrace=False)
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    """A browser that has never been here; in the end nothing has gone wrong in it, and nobody else was asked."""
    context = browser.new_context(base_url=site.url, viewport=DESKTOP)  # type: ignore[arg-type]
    context.set_default_timeout(MILLISECONDS)
    wrong: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda asked: None if asked.url.startswith(site.url) else wrong.append(asked.url))

    context.on("page", watch)
    yield context
    context.close()
    assert not wrong


def entered(context: BrowserContext, token: str) -> Page:
    """Return a page that shows the domain to the holder of a token."""
    page = context.new_page()
    page.goto("/")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name=NAME).click()
    expect(page.get_by_text("live", exact=True)).to_be_visible()
    return page


def row(page: Page, name: str) -> Locator:
    """Return a snapshot's row of the tree."""
    return page.get_by_role("option", name=re.compile(rf"^{name} "))


def take(page: Page, name: str, *, limit: str = "", description: str = "") -> Locator:
    """Take a snapshot; return what shows that it runs."""
    page.get_by_role("button", name="Take snapshot").click()
    dialog = page.get_by_role("dialog", name=f"Take a snapshot of {NAME}")
    dialog.get_by_label("Name").fill(name)
    dialog.get_by_label("Description").fill(description)
    dialog.get_by_label("Limit").fill(limit)
    dialog.get_by_role("button", name="Take snapshot").click()
    return page.get_by_role("article", name=f"create {name}")


def earlier(page: Page, what: str) -> Locator:
    """Return the entry of an operation that has ended."""
    return page.get_by_role("listitem").filter(has=page.locator("summary", has_text=what)).first


def names(site: Site) -> list[str]:
    """Return the names of the snapshots that there are."""
    return [each["name"] for each in site.program.look("list", NAME)]


def have_a_snapshot(site: Site) -> None:
    """Take one unless there is one."""
    if not names(site):
        site.program.answer("create", NAME, "one", "--live")


def test_a_persons_path(context: BrowserContext, site: Site) -> None:
    """See a domain, snapshot it, watch, see it in the tree, go back, verify, delete by plan; stop one that runs."""
    page = entered(context, site.operator)
    expect(page.get_by_role("heading", name=NAME, exact=True)).to_be_visible()
    running = take(page, "first", limit="4", description=NASTY)
    expect(running.get_by_role("progressbar")).to_have_attribute("max", re.compile(r"\d+"))
    expect(running.get_by_role("listitem").filter(has_text="streaming")).to_have_attribute("aria-current", "step")
    expect(row(page, "first")).to_contain_text("current")
    expect(row(page, "first")).to_contain_text(NASTY)
    expect(running).to_have_count(0)
    (record,) = [site.program.look("show", NAME, "first")]
    expect(earlier(page, "create first")).to_contain_text(f"{1000 * record['timings']['pause']:.1f} ms pause")

    take(page, "second")
    expect(row(page, "second")).to_contain_text("current")
    row(page, "first").click()
    page.get_by_role("button", name="Go back").click()
    dialog = page.get_by_role("dialog", name="Go back to first")
    expect(dialog).to_contain_text(f"What {NAME} holds now and no snapshot holds is lost.")
    dialog.get_by_role("button", name="Go back").click()
    expect(row(page, "first")).to_contain_text("current")
    assert site.program.look("domain", "show", NAME)["current"] == "first"
    expect(earlier(page, "revert first")).not_to_contain_text("pause")

    row(page, "second").click()
    page.get_by_role("button", name="Verify").click()
    page.get_by_role("dialog").get_by_role("button", name="Verify").click()
    expect(page.get_by_text("Every file is what was saved.")).to_be_visible()

    take(page, "third")
    expect(row(page, "third")).to_contain_text("current")
    row(page, "first").click()
    page.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog", name="Delete first")
    plan = dialog.get_by_label("What will be done")
    expect(plan).to_contain_text("1 snapshot deleted: first")  # and so the page looks no more, which takes the lock
    dry = site.program.look("delete", NAME, "first", "--dry-run")
    for path in dry["unlink"]:
        expect(plan).to_contain_text(f"remove {Path(path).name}")
    dialog.get_by_text("It and all that grew out of it").click()
    expect(dialog.get_by_role("button", name="Delete 3 snapshots")).to_be_enabled()
    dialog.get_by_text("Only this snapshot").click()
    assert names(site) == ["first", "second", "third"]
    dialog.get_by_role("button", name="Delete 1 snapshot").click()
    expect(row(page, "first")).to_have_count(0)
    assert names(site) == ["second", "third"]

    running = take(page, "never", limit="1")
    running.get_by_role("button", name="Cancel").click()
    expect(earlier(page, "create never")).to_contain_text("rolled-back")
    assert names(site) == ["second", "third"]


def test_other_kinds(context: BrowserContext, site: Site) -> None:
    """Inside the images; with frozen file systems, which is refused for this guest, and nothing is done."""
    page = entered(context, site.operator)
    before = names(site)
    page.get_by_role("button", name="Take snapshot").click()
    dialog = page.get_by_role("dialog", name=f"Take a snapshot of {NAME}")
    dialog.get_by_label("Name").fill("within")
    dialog.get_by_text("Freeze its file systems").click()
    dialog.get_by_role("button", name="Take snapshot").click()
    expect(dialog).to_contain_text("no channel to a guest agent")
    assert names(site) == before
    dialog.get_by_text("Freeze its file systems").click()
    dialog.get_by_text("Keep it inside the images").click()
    expect(dialog.get_by_label("Limit")).to_have_count(0)
    dialog.get_by_role("button", name="Take snapshot").click()
    expect(row(page, "within")).to_contain_text("current")
    assert site.program.look("show", NAME, "within")["strategy"] == "internal"
    row(page, "within").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete 1 snapshot").click()
    expect(row(page, "within")).to_have_count(0)
    assert names(site) == before


def tab_to(page: Page, target: Locator) -> None:
    """Go on by the Tab key until something has the focus, which is seen at every step."""
    for _ in range(40):
        page.keyboard.press("Tab")
        assert page.evaluate(FOCUSED) != "none"
        if target.evaluate("each => each === document.activeElement"):
            return
    raise AssertionError("the Tab key does not lead there")


def test_by_keyboard(context: BrowserContext, site: Site) -> None:
    """Everything can be done without a mouse, the focus is always seen, and it comes back from a dialog."""
    page = context.new_page()
    page.goto(f"/#{NAME}")
    page.get_by_label("Token").focus()
    page.keyboard.type(site.operator)
    page.keyboard.press("Enter")
    button = page.get_by_role("button", name="Take snapshot")
    expect(button).to_be_visible()
    tab_to(page, button)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("Name")).to_be_focused()
    page.keyboard.type("by-keyboard")
    page.keyboard.press("Enter")
    expect(row(page, "by-keyboard")).to_contain_text("current")
    tab_to(page, page.get_by_role("option", selected=True))
    page.keyboard.press("ArrowDown")
    expect(row(page, "by-keyboard")).to_be_focused()
    expect(page.get_by_role("heading", name="by-keyboard")).to_be_visible()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    expect(row(page, "Now")).to_be_focused()
    page.keyboard.press("ArrowDown")
    delete = page.get_by_role("button", name="Delete")
    tab_to(page, delete)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Delete 1 snapshot")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(delete).to_be_focused()
    page.keyboard.press("Enter")
    confirm = page.get_by_role("button", name="Delete 1 snapshot")
    expect(confirm).to_be_enabled()
    tab_to(page, confirm)
    page.keyboard.press("Enter")
    expect(row(page, "by-keyboard")).to_have_count(0)


def test_opened_again_at_once(context: BrowserContext, site: Site) -> None:
    """A dialog that is closed and opened again before the page has taken note of its end is there."""
    page = entered(context, site.operator)
    take = page.get_by_role("button", name="Take snapshot").first
    take.click()
    expect(page.get_by_role("dialog")).to_have_count(1)
    for _ in range(2):
        take.evaluate("button => { document.querySelector('dialog').close(); button.click(); }")
        expect(page.get_by_role("dialog")).to_have_count(1)
        expect(page.get_by_role("dialog").get_by_label("Name")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def check_accessible(page: Page, *rules: str) -> None:
    """Assert that axe finds nothing: names, roles, contrast, order; or only by some of its rules."""
    found = Axe().run(page, options={"runOnly": list(rules)} if rules else None)
    assert not found.violations_count, found.generate_report()


@pytest.mark.parametrize(("scheme", "rules"), [("light", ()), ("dark", ("color-contrast",))])
def test_accessible(context: BrowserContext, site: Site, scheme: Any, rules: tuple[str, ...]) -> None:
    """At the desk and on a phone, with dialogs and without, axe finds nothing to complain of."""
    page = context.new_page()
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto("/")
    expect(page.get_by_label("Token")).to_be_visible()
    check_accessible(page, *rules)
    page.close()
    page = entered(context, site.operator)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    have_a_snapshot(site)
    page.get_by_role("option").nth(1).click()
    check_accessible(page, *rules)
    for name in ("Take snapshot", "Go back", "Delete"):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_role("dialog").get_by_role("button").last).to_be_enabled()
        check_accessible(page, *rules)
        page.keyboard.press("Escape")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    check_accessible(page, *rules)


def test_on_a_phone(context: BrowserContext, site: Site) -> None:
    """Nothing is wider than the screen; a snapshot's details come up from below, and go."""
    page = entered(context, site.operator)
    have_a_snapshot(site)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("option").nth(1).click()
    sheet = page.locator(".sheet")
    expect(sheet.get_by_role("button", name="Go back")).to_be_visible()
    box = sheet.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] == pytest.approx(PHONE["height"], abs=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sheet.get_by_role("button", name="Close").click()
    expect(sheet).to_have_count(0)
    page.get_by_role("link", name="All domains").click()
    expect(page.get_by_role("navigation")).to_be_visible()


def test_what_others_do(context: BrowserContext, site: Site) -> None:
    """What another process changes in the catalog is shown by the list of changes: nothing else is listed anew."""
    have_a_snapshot(site)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url.removeprefix(site.url)))
    page = entered(context, site.viewer)
    last = names(site)[-1]
    expect(row(page, last)).to_be_visible()
    lists = [url for url in asked if "limit=1000" in url and "changes" not in url]
    site.program.answer("edit", NAME, last, "--name", "renamed", "--description", "by another")
    expect(row(page, "renamed")).to_contain_text("by another")
    expect(row(page, last)).to_have_count(0)
    assert [url for url in asked if "limit=1000" in url and "changes" not in url] == lists
    site.program.answer("edit", NAME, "renamed", "--name", last)
    expect(row(page, last)).to_be_visible()


def test_who_is_let_in(context: BrowserContext, site: Site) -> None:
    """A wrong token is told so; a viewer sees all and is offered nothing to change; leaving forgets the token."""
    page = context.new_page()
    page.goto("/")
    page.get_by_label("Token").fill("sno_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("token")
    page.close()
    page = entered(context, site.viewer)
    page.get_by_role("option").last.click()
    expect(page.get_by_role("heading", name=NAME, exact=True)).to_be_visible()
    for name in ("Take snapshot", "Delete", "Go back", "Pause"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Token")).to_be_visible()


# --- the picture --------------------------------------------------------------------------------------------


def grown(seed: int) -> tuple[list[dict[str, str | None]], str | None]:
    """Return a random tree, oldest first, and the snapshot that the present grows out of."""
    chance = random.Random(seed)  # noqa: S311 - the same trees each time
    records: list[dict[str, str | None]] = []
    for number in range(chance.randrange(1, 40)):
        parents: list[str | None] = [each["name"] for each in records[-6:]] or [None]
        parent = None if chance.random() < 0.1 else chance.choice(parents)
        records.append({"name": f"s{number}", "parent": parent})
    return records, chance.choice([None, chance.choice(records)["name"]])


def test_the_graph(context: BrowserContext) -> None:
    """Whatever the tree: no two points share a place, and no line runs through a point that is not its own."""
    page = context.new_page()
    page.goto("/")
    for seed in range(60):
        records, current = grown(seed)
        graph = page.evaluate(
            """async ([records, current]) => {
                const { layout } = await import("/graph.js");
                const { rows, edges, lanes } = layout(records, current);
                const at = ({ name, lane, row, level }) => ({ name, lane, row, level });
                return { rows: rows.map(at), edges: edges.map(({ from, to }) => [at(from), at(to)]), lanes };
            }""",
            [records, current],
        )
        parents = {each["name"]: each["parent"] for each in records} | {None: current}
        places = {(each["row"], each["lane"]) for each in graph["rows"]}
        assert [each["name"] for each in graph["rows"]] == [None, *(f"s{n}" for n in reversed(range(len(records))))]
        assert len(places) == len(graph["rows"]) == len(records) + 1
        assert graph["rows"][0]["lane"] == 0
        assert max(lane for _, lane in places) < graph["lanes"]
        for old, new in graph["edges"]:
            assert parents.pop(new["name"]) == old["name"]
            assert new["level"] == old["level"] + 1
            assert not [row for row in range(new["row"] + 1, old["row"]) if (row, new["lane"]) in places], seed
        assert set(parents.values()) <= {None}
