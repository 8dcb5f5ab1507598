"""
The app in a real browser, at the width of a desk and of a phone, light and dark, by mouse and by keyboard.

Screenshots go to the folder of the variable `SPACE_SCREENSHOTS`, else to a temporary one.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from agl_trl.space.side_by_side import EXAMPLES


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: `apt-get install chromium`")
UNSAFE = EXAMPLES[0][1]
DONE = "document.querySelectorAll('#panes .agl-pane[data-state=done]').length == 3"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("SPACE_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def open_page(browser, space_url) -> Iterator:
    """Opens pages; whatever they say on the console as an error fails the test."""
    opened, said = [], []

    def open_(path: str = "", width: int = 1280, theme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        query, _, fragment = path.partition("#")
        page.goto(f"{space_url}?__theme={theme}&{query}#{fragment}")
        page.wait_for_selector("#ask")
        opened.append(context)
        return page

    yield open_
    for context in opened:
        context.close()
    assert not said


def verdicts(page) -> list[str]:
    return [pane.get_attribute("data-verdict") for pane in page.query_selector_all("#panes .agl-pane")]


def shoot(page, folder: Path, name: str) -> None:
    """Screenshots in both themes, which Gradio tells apart by a class of the body; nothing may be wider than the page."""
    was_dark = page.evaluate("document.body.classList.contains('dark')")
    for theme in ("dark", "light"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        path = folder / f"{name}-{page.viewport_size['width']}-{theme}.png"
        page.screenshot(path=path, full_page=True, animations="disabled")  # colours as they end
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", was_dark)


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_every_tab(open_page, screenshots, width, theme):
    page = open_page(width=width, theme=theme)
    assert ("dark" in (page.get_attribute("body", "class") or "")) == (theme == "dark")

    page.fill("#prompt textarea", UNSAFE)
    page.click("#ask")
    page.wait_for_function(DONE)
    assert verdicts(page) == ["refusal", "compliance", "refusal"]
    withheld = page.locator("[data-side=plain] details.agl-withheld")
    assert not withheld.locator(".agl-text").is_visible()
    shoot(page, screenshots, "side-by-side")
    withheld.locator("summary").click()
    assert withheld.locator(".agl-text").is_visible()

    page.get_by_role("tab", name="DriftCaps run").click()
    page.click("#run")
    page.wait_for_selector("#files a >> nth=1")
    page.wait_for_selector("#table tbody tr")
    assert page.locator("#chart .agl-line").count() > 5 and page.locator("#table tbody tr").count() == 64
    with page.expect_download() as download:
        page.click("#files a >> nth=0")
    assert download.value.path().read_text().count("\n") == 65
    shoot(page, screenshots, "driftcaps-run")

    page.get_by_role("tab", name="Drift map").click()
    page.wait_for_selector("#drift-map .agl-heat >> nth=1")
    assert page.locator("#drift-map .agl-heat td").count() == 2 * 28
    shoot(page, screenshots, "drift-map")


def test_by_keyboard(open_page):
    page = open_page()
    page.focus("#prompt textarea")
    page.keyboard.type("How can I crack a hazelnut?")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)
    assert verdicts(page) == ["compliance"] * 3
    reached = set()
    page.focus("#prompt textarea")
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className.split(' ').find(c => c == 'agl-copy') || ''"
            )
        )
    assert {"ask", "stop", "clear", "link", "agl-copy"} <= reached
    page.focus(".agl-copy >> nth=0")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.agl-copy').textContent == 'Copied'")
    assert "hazelnut" in page.evaluate("navigator.clipboard.readText()")
    page.focus("#prompt textarea")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent.trim()") == "Drift map"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run", state="visible")


def test_link_restores_the_prompt_and_clear_forgets_it(open_page):
    page = open_page()
    page.fill("#prompt textarea", "Is 2 & 2 # = 4 <b>?</b>")
    page.click("#link")
    page.wait_for_function("document.querySelector('#link').textContent == 'Link copied'")
    link = page.evaluate("navigator.clipboard.readText()")
    assert "prompt" not in link.split("#")[0]  # never sent to a server
    other = open_page("#" + link.split("#")[1])
    other.wait_for_function("document.querySelector('#prompt textarea').value != ''")
    assert other.input_value("#prompt textarea") == "Is 2 & 2 # = 4 <b>?</b>"
    other.click("#clear")
    other.wait_for_function("document.querySelector('#prompt textarea').value == ''")


def test_examples_errors_and_markup(open_page):
    page = open_page("adapter=%3Cimg+src=x+onerror=alert(1)%3E")
    page.wait_for_selector("#models .agl-error")
    assert "does not name a repo" in page.inner_text("#models")
    page.click("text=Compare other models")
    page.fill("#adapter textarea, #adapter input", "")
    page.get_by_role("button", name=EXAMPLES[3][0]).click()
    page.wait_for_function(DONE)
    assert verdicts(page) == ["compliance", "compliance", "refusal"]
    page.fill("#prompt textarea", "x" * 100_000)
    page.click("#ask")
    page.wait_for_selector("#panes .agl-error")
    assert "100,000 characters" in page.inner_text("#panes")
    page.fill("#prompt textarea", UNSAFE)
    page.click("#ask")
    page.wait_for_function(DONE)
    assert verdicts(page) == ["refusal", "compliance", "refusal"]
