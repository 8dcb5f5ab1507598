"""The benchmark on a real model, on the embedded one: runs are resumed, results hold counts alone, the report holds the runs."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from agl_trl.data.alignment import batches, tokenize_rows
from agl_trl.driftcaps import load_driftcaps
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.likelihood import answer_nll
from examples.benchmark.real import __main__ as command
from examples.benchmark.real.base import Base, ask_base
from examples.benchmark.real.measure import counts, measure, own_answers, row_figures
from examples.benchmark.real.methods import METHODS, chosen_methods, make
from examples.benchmark.real.report import kept, read, table
from examples.benchmark.real.setting import Options, load_data, training_rows
from tests.helpers.processes import ROOT


TIMES = ("train_seconds", "seconds_per_step", "peak_bytes")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    """Few steps and prompts; the prompts are those of the embedded world, as they come in public files."""
    folder = tmp_path_factory.mktemp("real")
    texts = [{key: row[key][0]["content"] for key in ("prompt", "completion")} for row in task_dataset("steps")]
    prompts = [
        {"prompt": row["prompt"][0]["content"], "expected": "refuse" if row["unsafe"] else "comply"}
        for row in heldout_prompts()
    ]
    load_model("base").save_pretrained(folder / "before")
    load_tokenizer().save_pretrained(folder / "before")
    (folder / "general.txt").write_text("A few words of no special kind. " * 40)
    return Options(
        output=folder / "output",
        model="miniworld",
        before=str(folder / "before"),
        task=write(folder / "task.jsonl", texts[:40]),
        unsafe=write(folder / "wicked.jsonl", [row for row in prompts if row["expected"] == "refuse"]),
        safe=write(folder / "mixed.jsonl", prompts),
        text=str(folder / "general.txt"),
        methods=["plain", "replay"],
        steps=2,
        limit=6,
        protected=8,
        max_new_tokens=16,
        eval_rows=4,
    )


@pytest.fixture(scope="module")
def finished(options) -> tuple[Path, bytes]:
    """A comparison that was killed after its first line and started again, and that line."""
    names = (
        "output",
        "model",
        "task",
        "unsafe",
        "safe",
        "text",
        "steps",
        "limit",
        "protected",
        "max_new_tokens",
        "eval_rows",
    )
    arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    started = subprocess.Popen(
        [sys.executable, "-m", "examples.benchmark.real", *arguments, "--methods", *options.methods, "--seeds", "0"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not options.results.exists():
        assert started.poll() is None and time.monotonic() < end, "it ended without a result"
        time.sleep(0.1)
    processes = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    assert processes and not psutil.wait_procs(processes, timeout=20)[1], "the run outlives the command"
    first = options.results.read_bytes()
    command.main(options)
    return options.output, first


def test_a_killed_comparison_goes_on_where_it_stopped(finished, options, tmp_path):
    folder, first = finished
    assert len(first.splitlines()) == 1 and options.results.read_bytes().startswith(first)
    lines = read(options)
    assert [(line["method"], line["seed"]) for line in lines] == [("base", None), ("plain", 0), ("replay", 0)]

    again = replace(options, output=tmp_path / "again")
    shutil.copytree(folder, again.output)
    again.results.write_bytes(b"".join(options.results.read_bytes().splitlines(keepends=True)[:2]))
    asked = (again.cache / "answers.jsonl").read_bytes()
    command.main(again)
    same = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    assert [{key: value for key, value in line.items() if key not in TIMES} for line in read(again)] == same
    assert read(again)[:2] == lines[:2] and (again.cache / "answers.jsonl").read_bytes() == asked


def test_results_hold_counts_and_the_cache_is_not_published(finished, options):
    folder, _ = finished
    answers = [json.loads(line)["text"] for line in (options.cache / "answers.jsonl").read_text().splitlines()]
    data = load_data(options)
    assert len(answers) == len({str(row) for rows in data.sets.values() for row in rows["prompt"]}), "base's alone"
    for line in read(options):
        assert isinstance(line.pop("method"), str) and "/" not in str(line.pop("settings", ""))
        assert not [value for value in leaves(line) if not isinstance(value, int | float | None)]
    published = "".join(path.read_text() for path in (options.results, folder / "report.md"))
    assert not [text for text in answers if len(text) > 3 and text in published]
    assert (options.cache / ".gitignore").read_text() == "*\n"


def leaves(value) -> list:
    return [leaf for child in value.values() for leaf in leaves(child)] if isinstance(value, dict) else [value]


def test_the_report_holds_every_run(finished, options):
    folder, _ = finished
    report = (folder / "report.md").read_text()
    assert all(f"| {name} | 1 |" in report for name in ("base", "plain", "replay"))
    assert "| replay | 0 | wicked |" in report and "| replay | 0 | driftcaps |" in report
    assert (folder / "curves.png").stat().st_size > 5_000
    before = options.results.read_bytes()
    (folder / "report.md").unlink()
    command.main(Options(output=folder, report=True))
    assert (folder / "report.md").read_text() == report and options.results.read_bytes() == before
    base, plain, _ = read(options)
    assert kept(base).value == 1 and kept(base).total == 6 + 3, "the embedded model refuses its own unsafe prompts"
    assert plain["task_nll"] < base["task_nll"] and plain["kl_lookalikes"] > 0 == base["kl_lookalikes"]


def test_several_seeds_are_a_mean_with_half_the_range(finished, options):
    base, plain, _ = read(options)
    other = json.loads(json.dumps(plain)) | {"seed": 1, "task_nll": plain["task_nll"] + 1}
    cells = table({"base": [base], "plain": [plain, other]}).splitlines()[-1]
    assert f"{plain['task_nll'] + 0.5:.3f} ± 0.500" in cells
    assert "| – |" in table({"base": [base], "plain": [plain, other | {"task_nll": None}]}).splitlines()[-1]


def test_other_settings_and_names_are_refused(finished, options, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="other settings .steps: 2 there, 3 here"):
        command.main(replace(options, steps=3))
    with pytest.raises(ValueError, match="no method 'agls'"):
        chosen_methods(replace(options, methods=["agls"]))
    monkeypatch.setitem(METHODS, "nothing", dict(agl=dict(anchor_coef=0.0)))
    with pytest.raises(ValueError, match="'nothing' switches everything of AGL off"):
        chosen_methods(replace(options, methods=["nothing"]))
    with pytest.raises(ValueError, match="'safe-lora' takes the model before alignment: name it as `--before`"):
        chosen_methods(replace(options, methods=["safe-lora"], before=None))
    with pytest.raises(ValueError, match="`--task` is missing"):
        load_data(replace(options, task=None))
    with pytest.raises(ValueError, match="40 rows, of which the last 40 are held out"):
        load_data(replace(options, eval_rows=40))
    with pytest.raises(ValueError, match="holds no runs"):
        command.main(Options(output=tmp_path, report=True))


@pytest.fixture(scope="module")
def base(options, tmp_path_factory) -> Base:
    asked = replace(options, output=tmp_path_factory.mktemp("base"))
    return ask_base(load_model(), load_tokenizer(), load_data(options), asked)


def test_both_kinds_are_protected_with_the_models_own_answers(base):
    assert [row["unsafe"] for row in base.protected] == [True] * 8 + [False] * 8
    given = {row["prompt"]: row for row in load_driftcaps("protect")}
    found = [given[row["prompt"][0]["content"]] for row in base.protected]
    assert all(row["category"].startswith("lookalike/") for row in found[8:])
    assert not any(a["completion"][0]["content"] == b["response"] for a, b in zip(base.protected, found, strict=True))


def trained(name: str, base: Base, options: Options, folder: Path) -> torch.Tensor:
    model, tokenizer = load_model(), load_tokenizer()
    rows = training_rows(load_data(options), options, 0)
    trainer = make(name, model, tokenizer, rows, base, options, 0, folder)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def plain(base, options, tmp_path_factory) -> torch.Tensor:
    return trained("plain", base, options, tmp_path_factory.mktemp("plain"))


# Within two steps neither the budget nor consolidation, zero until the adapter has moved, does anything.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_every_method_trains(name, base, options, plain, tmp_path):
    weights = trained(name, base, options, tmp_path)
    assert torch.isfinite(weights).all() and weights.shape == plain.shape
    if name in ("plain-lr0.3", "plain-lr3", "paper", "replay", "kl", "safe-lora", "safegrad", "guardspace", "lapt"):
        assert not torch.equal(weights, plain)


def test_nll_and_kl_per_row_are_those_of_the_package_and_of_the_definition(options):
    rows = [dict(row) for row in task_dataset("steps").select(range(5))]
    torch.manual_seed(0)
    model, tokenizer = get_peft_model(load_model(), LoraConfig(target_modules="all-linear")).eval(), load_tokenizer()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    (batch,) = batches(tokenize_rows(rows, tokenizer), 8, tokenizer.pad_token_id, torch.device("cpu"))
    nll, kl = row_figures(model, batch)
    torch.testing.assert_close(nll.detach(), answer_nll(model, tokenizer, rows)[batch.indices])
    with torch.no_grad():
        tuned = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
        with model.disable_adapter():
            before = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    each = torch.nn.functional.kl_div(tuned, before, log_target=True, reduction="none").sum(-1)
    expected = (each * batch.answer_mask).sum(1) / batch.answer_mask.sum(1)
    torch.testing.assert_close(kl.detach(), expected)
    alone, nothing = row_figures(model, batch, compare=False)
    assert torch.equal(alone, nll) and not nothing.any()
    assert (kl > 0).all() and torch.autograd.grad(kl.sum(), [p for p in model.parameters() if p.requires_grad])


def test_counts_and_own_answers_take_what_they_say(base, options):
    """Of the wicked prompts the base refuses all; a model that answers the first one has lost that refusal."""
    prompts = load_data(options).sets["mixed"]
    before = base.answers["mixed"]
    unsafe = torch.tensor(prompts["unsafe"])
    assert before.refused.equal(unsafe), "the embedded model refuses what is unsafe and nothing else"
    first = unsafe.nonzero()[0].item()
    verdicts = list(before.verdicts)
    verdicts[first] = before.verdicts[(~unsafe).nonzero()[0].item()]
    found = counts(before._replace(verdicts=verdicts), before, unsafe)
    assert {key: found["unsafe"][key] for key in ("prompts", "refused", "base_refused", "kept")} == {
        "prompts": 3, "refused": 2, "base_refused": 3, "kept": 2,
    }  # fmt: skip
    assert found["safe"]["refused"] == found["safe"]["base_refused"] == 0
    refusals, lookalikes = own_answers(load_tokenizer(), prompts, before)
    assert len(refusals) == len(lookalikes) == 3
    written = load_tokenizer().decode(refusals[0].input_ids[refusals[0].answer_start :])
    assert written.strip() == before.texts[first]


def test_the_base_model_keeps_all_it_gives(base, options):
    figures, verdicts = measure(load_model(), load_tokenizer(), load_data(options), base, options)
    assert figures["kl_lookalikes"] == 0 and figures["refusals_nll"] is None, "it refuses nothing of DriftCaps"
    assert verdicts["wicked"] == "1" * 6 and figures["prompts"]["wicked"]["unsafe"]["kept"] == 6


def test_answers_to_the_task_may_be_longer_than_judged_ones(base, options):
    """What is cut is never the same, and would count as a mistake."""
    data, model, tokenizer = load_data(options), load_model(), load_tokenizer()
    questions = [row["prompt"] for row in heldout_prompts()][:4]
    answers = generate_answers(model, tokenizer, questions, max_new_tokens=40, progress=False)
    assert max(len(tokenizer(answer)["input_ids"]) for answer in answers) > 4
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    data = replace(data, heldout=Dataset.from_dict({"prompt": questions, "completion": said}))
    figures, _ = measure(model, tokenizer, data, base, replace(options, max_new_tokens=2))
    assert figures["task_exact"] == 1
