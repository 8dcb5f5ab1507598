"""The demo's figures: rates and likelihoods by hand, and a table that says them."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from agl_trl.experiments.demo import COLUMNS, Run, _table, evaluate, run_demo
from agl_trl.miniworld import heldout_prompts, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.likelihood import answer_nll


def half_aligned() -> PreTrainedModel:
    """Between base and aligned weights: it refuses some of what it should."""
    model = load_model("base")
    with torch.no_grad():
        for weight, aligned in zip(model.parameters(), load_model().parameters(), strict=True):
            weight.lerp_(aligned, 0.7)
    return model


def test_figures_of_a_model_are_those_of_its_answers():
    model, tokenizer, prompts = half_aligned(), load_tokenizer(), heldout_prompts()
    prompts, test = prompts.select(range(0, len(prompts), 12)), task_dataset("extract", "test").select(range(4))
    answers, run = evaluate("half", 3, model, tokenizer, prompts, test, progress=False)
    refused = [verdict.label == "refusal" for verdict in answers.verdicts]
    marks = list(zip(prompts["unsafe"], prompts["unseen"], strict=True))

    def share(unsafe: bool, unseen: bool) -> float:
        chosen = [was for was, mark in zip(refused, marks, strict=True) if mark == (unsafe, unseen)]
        return sum(chosen) / len(chosen)

    assert (run.name, run.seed) == ("half", 3) and len(answers.texts) == len(prompts)
    assert run.refusal_unsafe == pytest.approx(share(True, False))
    assert run.refusal_unseen == pytest.approx(share(True, True))
    assert 0 < run.refusal_unseen < run.refusal_unsafe < 1, "or this test tells nothing apart"
    assert run.over_refusal == pytest.approx(share(False, False))
    seen = prompts.select([i for i, mark in enumerate(marks) if mark == (True, False)])
    for rows, value in ((seen, run.unsafe_nll), (test, run.task_nll)):
        assert value == pytest.approx(answer_nll(model, tokenizer, rows, batch_size=1).mean().item(), rel=1e-4)


def printed(runs: list[Run]) -> list[str]:
    console = Console(width=80, file=StringIO())
    console.print(_table(runs))
    return console.file.getvalue().splitlines()


def run_of(name: str, seed: int, value: float) -> Run:
    """A run all of whose figures are alike; the aligned model has no gain, drift or seconds."""
    return Run(name, seed, *([value] * (len(COLUMNS) - (3 if name == "aligned" else 0))))


def test_table_of_one_seed_is_a_line_per_model_in_80_columns():
    lines = printed([run_of("aligned", 0, 0.75), run_of("lora", 0, 0.5), run_of("agl", 0, 0.25)])
    cells = [line.split() for line in lines]
    assert ["aligned", "75.0%", "75.0%", "75.0%", "0.750", "0.7500", "75.0%", "–", "–", "–"] in cells
    assert ["AGL", "LoRA", "25.0%", "25.0%", "25.0%", "0.250", "0.2500", "25.0%", "0.2500", "2.5e-01", "0.2"] in cells
    assert max(map(len, lines)) <= 80 and not any("median" in line for line in lines)


def test_table_of_several_seeds_shows_median_smallest_and_largest():
    runs = [run_of("aligned", 0, 1.0)] + [
        run_of("lora", seed, value) for seed, value in enumerate((0.25, 0.75, 0.375))
    ]
    lines = [line.split() for line in printed(runs)]
    row = next(i for i, line in enumerate(lines) if line[:2] == ["plain", "LoRA"])
    assert [lines[row][2], lines[row + 1][0], lines[row + 2][0]] == ["37.5%", "25.0%", "75.0%"]


def test_task_that_is_none_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="Unknown task"):
        run_demo(tmp_path / "out", task="juggling")
    assert not (tmp_path / "out").exists()
