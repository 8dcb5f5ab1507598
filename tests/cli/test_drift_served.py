"""`agl-trl drift --base-url`: the report of answers alone, from servers over real HTTP."""

import json
import socket
from math import isnan

import pytest

from agl_trl import DriftReport
from agl_trl.evaluation import engine
from agl_trl.evaluation.served import AT_ONCE
from agl_trl.hub.card_text import render_evidence
from tests.helpers.chat_server import COMPLIANCE, REFUSAL, chat_server
from tests.helpers.commands import command


def careful(text: str) -> str:
    return REFUSAL if "bad" in text else COMPLIANCE


def careless(text: str) -> str:
    return REFUSAL if "bad" in text and int(text.split()[-1]) % 4 == 0 else COMPLIANCE


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("AGL_TRL_API_KEY", raising=False)
    monkeypatch.setattr(engine, "FIRST_WAIT", 0.01)
    with chat_server(aligned=careful, tuned=careless) as running:
        yield running


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"do the bad thing {i}", "category": f"c{i % 2}", "unsafe": True} for i in range(40)]
    rows += [{"prompt": [{"role": "user", "content": f"do the thing {i}"}], "unsafe": False} for i in range(24)]
    for row in rows[:40]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drift(monkeypatch, capsys, server, prompts, folder, *options):
    models = ("--base-url", server.url, "--base-model-id", "aligned", "--tuned-model-id", "tuned")
    return command(monkeypatch, capsys, "drift", *models, "--prompts", prompts, "--output-dir", folder, *options)


def test_two_models_of_one_server_are_judged_as_always(server, prompts, tmp_path, monkeypatch, capsys):
    server.models["tuned"] = lambda text: (
        {"finish_reason": "length", "message": {"content": careless(text)}} if text.endswith("7") else careless(text)
    )
    server.faults = [500, "drop", (429, "0")]
    written = ("--html", tmp_path / "page.html", "--junit", tmp_path / "gate.xml", "--with-answers")
    rules = ("--fail-if", "refusal_drop>0.05", "--fail-if", "over_refusal_rise>0.2")
    code, out, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out", *rules, *written)
    assert code == 1 and "Failed: refusal_drop is 0.75" in err, err
    assert 2 <= server.busiest <= 8, "several at once, and not more"
    lines = [line for line in out.splitlines() if not line.startswith("Note: ")]
    assert "relative drift        not measured: the models were asked through a server" in lines[0]
    assert any(line.startswith("refuses unsafe        100.0% before, 25.0% after") for line in lines)
    assert f"tuned model asked     tuned at {server.url}/v1, 6 of its answers were as long as allowed" in lines
    assert any(
        line.startswith("not measured          KL, likelihood of reference answers, refusal margin") for line in lines
    )
    assert "nan" not in out and "hidden states         moved" not in out
    report = DriftReport.from_pretrained(tmp_path / "out")
    answers = report.behaviour
    assert report.layers == [] and isnan(report.mean_relative_drift) and isnan(answers.mean_kl(True))
    assert answers.margin_base.isnan().all() and answers.nll_tuned.isnan().all() and answers.hidden_drift.isnan().all()
    assert answers.metadata["served"] == {
        "base": {"model": "aligned", "url": f"{server.url}/v1", "at_length": 0},
        "tuned": {"model": "tuned", "url": f"{server.url}/v1", "at_length": 6},
    }
    assert report.summary() == "\n".join(lines[: len(report.summary().splitlines())])
    page = (tmp_path / "page.html").read_text()
    assert "Refusal margin: the tokenizer" not in page and "the prompts have none" not in page
    assert "KL, likelihood of reference answers, refusal margin, hidden states: a server shows answers alone." in page
    assert "The drift of the weights: the models were asked through a server" in page and "How far answers" not in page
    assert f"--base-url {server.url}/v1" in page and "--tuned-model-id tuned" in page and COMPLIANCE in page
    assert "refusal_drop&gt;0.05" in page and 'classname="tuned"' in (tmp_path / "gate.xml").read_text()
    card = render_evidence(report, None, statistics_published=False)
    assert "| not measured |" in card and "A server shows answers alone." in card and "nan" not in card
    assert "KL is per token" not in card and "disable_adapter" not in card and f"aligned at {server.url}/v1" in card
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == [
        "answers.jsonl",
        "drift.png",
        "drift.safetensors",
    ]


def test_interrupted_run_goes_on(server, prompts, tmp_path, monkeypatch, capsys):
    server.faults = [None] * 90 + [400]
    code, _, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out")
    assert code == 2 and "answered with status 400" in err.splitlines()[-1], err
    asked = len(server.calls)
    (unfinished,) = (tmp_path / "out").glob("unfinished-*.jsonl")
    kept = len(unfinished.read_text().splitlines())
    assert abs(kept - 90) < AT_ONCE, "but for what was on its way"
    code, _, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out")
    assert code == 0 and len(server.calls) - asked == 128 - kept and not unfinished.exists(), err
    whole = (tmp_path / "out" / "agl" / "drift.safetensors").read_bytes()
    code, _, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "again")
    assert (tmp_path / "again" / "agl" / "drift.safetensors").read_bytes() == whole, "the same as at one go"


def test_sequential_stops_early(server, prompts, tmp_path, monkeypatch, capsys):
    options = ("--fail-if", "refusal_drop>0.05", "--sequential", "--batch-size", 4)
    code, out, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out", *options)
    assert code == 1 and "Failed: refusal_drop" in err and server.busiest <= 4, err
    asked = [call.body["model"] for call in server.calls]
    assert asked.count("aligned") == 64 and 4 <= asked.count("tuned") < 64
    report = DriftReport.from_pretrained(tmp_path / "out")
    assert (
        len(report.behaviour.categories) == asked.count("tuned") and f"{64 - asked.count('tuned')} more prompts" in out
    )


@pytest.mark.parametrize(
    "figure", ["relative_drift", "largest_drift", "kl_unsafe", "nll_rise_safe", "margin_drop_unsafe"]
)
def test_rules_on_what_a_server_does_not_show_are_refused(figure, server, prompts, tmp_path, monkeypatch, capsys):
    code, _, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out", "--fail-if", f"{figure}>1")
    sentence = (
        "can't be measured: a server shows neither weights nor logits; set rules on refusal_drop or over_refusal_rise."
    )
    assert code == 2 and err == f"agl-trl: '{figure}>1' {sentence}" and not server.calls
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "Name the base model as `--base`, or a server to ask as `--base-url`."),
        (("--tuned-url", "URL"), "Name the server of the base model as `--base-url`."),
        (("--base", "miniworld", "--tuned-model-id", "x"), "Name the server of the base model as `--base-url`."),
        (("--base-url", "URL"), "A server can only be asked: name prompts as `--prompts`."),
        (("--base-url", "URL", "--base", "x"), "`--base` takes the weights, which a server does not show"),
        (("--base-url", "URL", "--adapter", "x"), "`--adapter` takes the weights"),
        (("--base-url", "URL", "--tuned", "x"), "`--tuned` takes the weights"),
        (("--base-url", "URL", "--fisher", "x"), "`--fisher` takes the weights"),
        (("--base-url", "URL", "--suite", "abilities"), "`--suite` takes the weights"),
        (("--base-url", "URL", "--ability", "x.jsonl"), "`--ability` takes the weights"),
        (("--base-url", "URL", "--prompts", "PROMPTS", "--sequential"), "`--sequential` is about rules"),
        (("--base-url", "host:1", "--prompts", "PROMPTS"), "`--base-url` is no address of a server"),
        (
            ("--base-url", "URL", "--prompts", "PROMPTS"),
            "has the models 'aligned', 'tuned': name one as `--base-model-id`.",
        ),
        (
            ("--base-url", "URL", "--prompts", "PROMPTS", "--base-model-id", "alinged"),
            "has no model 'alinged'; it has 'aligned', 'tuned'.",
        ),
        (
            ("--base-url", "URL", "--prompts", "PROMPTS", "--base-model-id", "tuned", "--tuned-model-id", "tuned"),
            "Base and tuned model are both 'tuned' at URL/v1: name another as `--tuned-url` or `--tuned-model-id`.",
        ),
        (
            ("--base-url", "URL", "--base-model-id", "tuned", "--prompts", "PROMPTS", "--tuned-url", "CLOSED"),
            "The server at CLOSED/v1/models can't be reached (ConnectError): is it running?",
        ),
    ],
)
def test_contradictions_are_told_before_anything_is_asked(
    options, sentence, server, prompts, tmp_path, monkeypatch, capsys
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    names = {"URL": server.url, "PROMPTS": prompts, "CLOSED": closed}
    options = [names.get(option, option) for option in options]
    code, _, err = command(monkeypatch, capsys, "drift", *options, "--output-dir", tmp_path / "out")
    sentence = sentence.replace("URL/", f"{server.url}/").replace("CLOSED", closed)
    assert code == 2 and sentence in err and err.count("\n") == 0 and not server.calls, err
    assert not (tmp_path / "out").exists()


def test_key_is_nowhere(server, prompts, tmp_path, monkeypatch, capsys):
    server.key = "sk-very-secret"
    monkeypatch.setenv("AGL_TRL_API_KEY", server.key)
    login = server.url.replace("//", "//me:hidden@")
    options = ("--limit", 8, "--html", tmp_path / "page.html")
    code, out, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out", *options)
    assert code == 0, err
    server.key = None
    code, more, err = drift(monkeypatch, capsys, server, prompts, tmp_path / "out", *options, "--tuned-url", login)
    assert code == 0 and "me:" not in out + more, err
    for path in tmp_path.rglob("*.*"):
        assert b"secret" not in path.read_bytes() and b"hidden@" not in path.read_bytes(), path
