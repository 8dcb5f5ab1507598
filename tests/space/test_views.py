"""The templates: complete, escaped, and strict about what is missing."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import agl_trl.space
from agl_trl.evaluation.refusal import Verdict
from agl_trl.space.drift_map import drift_map
from agl_trl.space.driftcaps_run import Download, Result
from agl_trl.space.models import Side
from agl_trl.space.side_by_side import Pane
from agl_trl.space.tabs import map_html
from agl_trl.space.views import render


EVIL = """<img src=x onerror=alert(1)> " onclick="x' & <b>"""
SIDES = [Side(key, EVIL, EVIL) for key in ("base", "plain")]
ROW = {
    "id": "1",
    "category": EVIL,
    "expected": "refuse",
    "prompt": EVIL,
    **{f"label_{side.key}": "refusal" for side in SIDES},
    **{f"reason_{side.key}": EVIL for side in SIDES},
    **{f"answer_{side.key}": EVIL for side in SIDES},
}
RESULT = Result(SIDES, 1, [ROW])
PANES = [
    Pane(SIDES[0], "done", EVIL, 3, 0.5, Verdict("compliance", 0.0, EVIL), EVIL),
    Pane(SIDES[1], "done", EVIL, 1, 0.5, Verdict("refusal", 1.0, EVIL)),
]


class Page(HTMLParser):
    """Tags, attributes and text of HTML; tags that were left open."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value for _, value in attrs]
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("template", "values", "shown"),
    [
        ("names", {"sides": SIDES}, 4),
        ("notice", {"text": EVIL, "kind": "error"}, 1),
        ("panes", {"panes": PANES}, 9),
        ("progress", {"done": 1, "total": 2, "sides": SIDES, "ended": True}, 0),
        ("chart", {"groups": RESULT.groups(), "sides": SIDES}, 3),
        ("table", {"rows": [ROW], "total": 1, "sides": SIDES}, 6),
        ("downloads", {"files": [Download("CSV", EVIL)]}, 0),
        ("header", {}, 0),
    ],
)
def test_everything_is_escaped(template, values, shown):
    page = Page(render(template, **values))
    assert not page.open and "img" not in page.tags and not {"onerror", "onclick"} & page.attributes
    assert page.text.count(EVIL.replace("_", " ")) == shown
    assert template not in ("panes", "downloads") or EVIL in page.values  # what is copied is the answer to the letter


def test_drift_map_is_escaped(models):
    drawn = drift_map(models.own, "Overlap")
    panels = [panel._replace(side=SIDES[0]) for panel in drawn.panels] + [
        drawn.panels[0]._replace(drift=None, notice=EVIL)
    ]
    page = Page(render("drift_map", map=drawn._replace(measure=EVIL, panels=panels)))
    assert not page.open and "img" not in page.tags and "onclick" not in page.attributes
    assert page.text.count(EVIL) > 6


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'kind' is undefined"):
        render("notice", text="words")


def test_panes_in_every_state():
    def body(pane: Pane) -> str:
        return render("panes", panes=[pane])

    side = Side("agl", "Tuned", "alice/adapter")
    assert "The answer appears here." in body(Pane(side))
    assert ">waiting<" in body(Pane(side, "waiting")) and "<dl>" not in body(Pane(side, "waiting"))
    writing = Pane(side, "writing", "I can", 2, 0.1, Verdict("compliance", 0.0, "words"))
    assert 'aria-busy="true"' in body(writing) and ">I can<" in body(writing) and 'data-verdict=""' in body(writing)
    writing.withheld = "Not for everyone."
    assert "I can" not in body(writing) and "Held back until it is judged." in body(writing)
    writing.state = "done"
    assert "<details" in body(writing) and ">I can<" in body(writing) and 'data-verdict="compliance"' in body(writing)
    assert "2 tokens" in body(writing) and "without a word" in body(
        Pane(side, "done", verdict=Verdict("garbled", 0.0, ""))
    )


def test_every_verdict_has_a_badge():
    def badge(label: str) -> str:
        return render(
            "panes", panes=[Pane(Side("agl", "Tuned", "x"), "done", "Words", verdict=Verdict(label, 0.0, ""))]
        )

    for label, shown in (("refusal", "Refuses"), ("compliance", "Does not refuse"), ("garbled", "Not readable")):
        assert f'class="agl-badge agl-{label}"' in badge(label) and f">{shown}<" in badge(label)
    assert 'class="agl-badge agl-cut-off"' in badge("cut off") and ">Cut off<" in badge("cut off")
    assert ".agl-cut-off" in (Path(agl_trl.space.__file__).parent / "style.css").read_text()


def test_table_of_no_rows_is_a_sentence():
    html = render("table", rows=[], total=5, sides=SIDES)
    assert "0 of 5 prompts" in html and "<table" not in html


def test_wide_maps_have_figures_for_those_who_cannot_see_colours(models):
    assert "agl-unseen" not in map_html(models.own, "Relative drift")
    drawn = drift_map(models.own, "Relative drift")
    report = drawn.panels[0].drift.report
    layers = [f"model.layers.{i}.mlp" for i in range(len(report.layers))]
    values = {("mlp", i): 0.01 for i in range(len(layers))}
    changed = type(drawn.panels[0].drift)(type(report)(**{**vars(report), "layers": layers}), values)
    html = render("drift_map", map=drawn._replace(panels=[drawn.panels[0]._replace(drift=changed)]))
    assert html.count("agl-unseen") == len(layers)


def test_every_template_is_used():
    folder = Path(agl_trl.space.__file__).parent
    text = "".join(path.read_text() for path in [*folder.glob("*.py"), *folder.glob("templates/*")])
    for path in folder.glob("templates/*"):
        name = path.name.removesuffix(".html.jinja")
        assert f'render("{name}"' in text or f'"{path.name}"' in text, path.name
