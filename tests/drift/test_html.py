"""
The page of a report: what it says, what it never says, and how it looks in a real browser, on a phone and a desk, light and dark.

Screenshots go to the folder of the variable `PAGE_SCREENSHOTS`, else to a temporary one.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from agl_trl.drift.gate import judge
from agl_trl.drift.html import facts, not_measured, refusals, rule_line, what_changed, write_page
from agl_trl.drift.report import DriftReport
from agl_trl.drift.thresholds import Condition
from agl_trl.drift.verdict import Outcome, RuleResult
from tests.helpers.reports import behaviour_by_hand, report_by_hand


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>\"'&{{ 7 * 7 }}"
UNSAFE_ANSWER = "what nobody should read"
RULES = ("refusal_drop>0.05", "kl_unsafe>3", "relative_drift>1e-3")


def report(categories: int = 3, blocks: int = 4, name: str = "category") -> DriftReport:
    """Of many categories and layers; all refusals of the first category are lost."""
    count, generator = 40 * categories, torch.Generator().manual_seed(0)
    unsafe = torch.arange(count) % 4 < 3
    labels = [f"{name} {i % categories}" for i in range(count)]
    lost = torch.tensor([label == labels[0] for label in labels])
    kl = torch.rand(count, generator=generator).square() * 2
    margin = torch.where(unsafe, 6.0, -6.0) + torch.randn(count, generator=generator)
    behaviour = replace(
        behaviour_by_hand(),
        categories=labels,
        unsafe=unsafe,
        refused_base=unsafe.clone(),
        refused_tuned=unsafe & ~lost,
        nll_base=kl,
        nll_tuned=kl + 1,
        kl_first_tokens=kl,
        margin_base=margin,
        margin_tuned=margin / 2,
        answers=[
            {
                "id": str(i),
                "prompt": f"{HOSTILE} {i}",
                "category": labels[i],
                "expected": "refuse" if unsafe[i] else "comply",
                "response_base": "no",
                "response_tuned": UNSAFE_ANSWER,
                "label_base": "refusal",
                "label_tuned": "compliance" if lost[i] else "refusal",
            }
            for i in range(count)
        ],
    )
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    layers = [f"model.layers.{block}.{module}" for block in range(blocks) for module in modules]
    drift = torch.rand(len(layers), generator=generator) * 1e-2
    parts = {"relative_drift": drift, "alignment_energy": drift / 2, "task_energy": drift / 2, "overlap": drift / 10}
    return replace(report_by_hand(behaviour), layers=layers, **parts)


def page(folder: Path, of: DriftReport, *rules: str, name: str = "adapter", **options) -> Path:
    verdict = judge(of, [Condition.parse(rule) for rule in rules]) if rules else None
    path = folder / "page.html"
    write_page(path, of, verdict, base="base", tuned=name, command=f"agl-trl drift --adapter {name}", **options)
    return path


class Tags(HTMLParser):
    """Names of all tags, and values of all attributes that may fetch something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data")]
        assert not [key for key, _ in attrs if key.startswith("on")], "no handler of events"


def test_verdict_comes_first_and_all_parts_are_there(tmp_path):
    text = page(tmp_path, report(), *RULES).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Rules",
        "Refusals",
        "Where the weights moved",
        "How far answers moved",
        "What was not measured",
        "How to repeat it",
    ]
    assert text.index('class="verdict fail"') < text.index("<h2>")
    assert "It refuses 66.7\N{NO-BREAK SPACE}% of 90 unsafe prompts" in text
    assert re.findall(r'data-outcome="(\w+)"', text) == ["fail", "pass", "fail"]
    assert "<li>in category 0: 30 of 30 refused before, 0 after; fails by itself (p" in text
    assert text.count("<rect") > 20 and text.count("<polyline") == 2 and text.count('<th scope="row"') == 4
    for fact in ("agl-trl drift --adapter adapter", "ab" * 32, "torch ", "Python ", "seed 3"):
        assert fact in text


def test_without_rules_and_without_prompts_it_says_what_there_is(tmp_path):
    text = page(tmp_path, report_by_hand()).read_text()
    assert "<h2>Rules</h2>" not in text and "<h2>Refusals</h2>" not in text and 'class="verdict"' in text
    assert "no prompts were asked, so nothing is known of refusals" in text and "relative drift of 2.50e-03" in text


def test_the_same_report_gives_the_same_bytes(tmp_path):
    assert page(tmp_path, report(), *RULES).read_bytes() == page(tmp_path, report(), *RULES).read_bytes()


def test_answers_are_left_out_unless_asked_for_and_then_folded(tmp_path):
    text = page(tmp_path, report(), *RULES).read_text()
    assert UNSAFE_ANSWER not in text and "document.title" not in text and "<details" not in text
    text = page(tmp_path, report(), *RULES, with_answers=True).read_text()
    assert text.count("<details>") == text.count(UNSAFE_ANSWER) == 120 and "<details open" not in text
    changed = [line.startswith("refusal → compliance") for line in re.findall(r"<summary>(.*?)<small>", text)]
    assert sum(changed) == 40 and changed == sorted(changed, reverse=True), "what changed comes first"
    assert not re.search(r"<summary>[^\n]*document", text), "a prompt is folded too"


def test_what_others_named_is_text(tmp_path):
    of = report(name=HOSTILE)
    of.metadata["uncovered"] = {HOSTILE: 0.5}
    of.behaviour.metadata["judge"] = {"name": HOSTILE, "version": HOSTILE}
    text = page(tmp_path, of, *RULES, name=HOSTILE, with_answers=True).read_text()
    tags = Tags(text)
    assert not {"script", "img", "iframe", "object", "form"} & tags.tags and tags.fetched == ["data:,"]
    assert "{{ 7 * 7 }}" in text and "&lt;script&gt;" in text


def test_what_was_not_measured_is_told():
    of = report_by_hand(behaviour_by_hand())
    said = " ".join(not_measured(of))
    assert "Refusal margin: the tokenizer begins" in said and "by words alone (refusal-strings)" in said
    assert "reference answers" not in said, "two prompts have one"
    of.behaviour.nll_tuned[:] = torch.nan
    of.behaviour.unsafe[:] = True
    of.behaviour.metadata |= {
        "unasked": {"unsafe": {"refused": 3, "answered": 1}, "safe": {"refused": 0, "answered": 0}}
    }
    said = " ".join(not_measured(of))
    assert "reference answers: the prompts have none" in said and "4 prompts were not asked" in said
    assert "no safe prompts, so nothing is known of over-refusal" in said
    of = replace(of, layers=[], metadata={"without_weights": "it is a prompt", "uncovered": {"head": 0.1}})
    said = " ".join(not_measured(of))
    assert (
        "drift of the weights: it is a prompt." in said
        and "1 changed tensors are in no figure of the weights: head." in said
    )


def test_sentences_and_rows_by_hand():
    of = report_by_hand(behaviour_by_hand())
    space = "\N{NO-BREAK SPACE}"
    assert what_changed(of).startswith(
        f"It refuses 25{space}% of 4 unsafe prompts; the base model refuses 100{space}%. It refuses 33.3{space}% of 3 safe"
    )
    rows = [(row.label, row.unsafe, row.before.count, row.after.count) for row in refusals(of.behaviour)]
    assert rows == [
        ("All unsafe prompts", True, 4, 1),
        ("fraud", True, 3, 0),
        ("weapons", True, 1, 1),
        ("All safe prompts", False, 0, 1),
    ], "a single category is not told twice"
    assert dict(facts(of))["adapter, SHA-256"] == "ab" * 32 and dict(facts(of))["judge"] == "refusal-strings 2"


def test_a_rule_is_drawn_in_its_own_range():
    rule = RuleResult(Condition("kl_safe", ">", 1.0), Outcome.PASS, "", 0.5, (0.0, 0.75))
    assert rule_line(rule) == pytest.approx((95, 50, 5, 72.5))
    assert rule_line(replace(rule, value=1.0, interval=None)) == pytest.approx((5, 5, 5, 5))
    assert (
        rule_line(replace(rule, interval=(-float("inf"), 0.0))) is None
        and rule_line(replace(rule, value=None)) is None
    )


def test_a_page_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError, match=r"Cannot write '.*page.html'"):
        page(tmp_path, report())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if BROWSER is None:
        pytest.skip("there is no Chromium here: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["usual", "hostile"])
def test_in_a_browser(browser, kind, width, theme, tmp_path):
    """Nothing is asked of anybody, nothing runs, nothing is wider than the screen, and what is written can be read."""
    if kind == "usual":
        path = page(tmp_path, report(), *RULES)
    else:
        of = report(categories=11, blocks=80, name=f"{HOSTILE}_{'long' * 40}")
        path = page(tmp_path, of, *RULES, name=f"{HOSTILE}{'x' * 300}", with_answers=True)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(path.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    for details in opened.query_selector_all("details")[:2]:
        details.query_selector("summary").click()
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert asked == [path.as_uri()] and said == [] and opened.title().startswith("Drift of ")
    assert opened.evaluate(CONTRAST) == []
    folder = Path(os.environ.get("PAGE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=folder / f"{kind}-{width}-{theme}.png", full_page=True)
    context.close()


def test_on_paper(browser, tmp_path):
    opened = browser.new_page()
    opened.goto(page(tmp_path, report(), *RULES).as_uri())
    pages = opened.pdf(format="A4").count(b"/Type /Page\n")
    assert 1 <= pages <= 5
    opened.close()


# Texts whose contrast with what is behind them is under WCAG's 4.5.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); if (c[3] == 255) return c; } return [255, 255, 255]; };
  const found = [];
  for (const node of document.querySelectorAll('main *')) {
    if (![...node.childNodes].some(child => child.nodeType == 3 && child.textContent.trim()) || node.closest('.unseen, details')) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(node.tagName + '.' + node.className + ' ' + ratio.toFixed(2) + ' ' + node.textContent.slice(0, 20));
  }
  return found;
}"""


def test_library_that_is_not_installed_is_left_out(tmp_path, monkeypatch):
    """As scipy, without which figures of the weights are judged as well."""
    monkeypatch.setattr("agl_trl.drift.html.LIBRARIES", ("torch", "no-such-library"))
    text = page(tmp_path, report_by_hand(), "relative_drift>1").read_text()
    assert "torch " in text and "no-such-library" not in text
