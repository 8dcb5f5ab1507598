"""`examples.budgets`: what a run is measured by, and that a finished one is not made again."""

import json

import pytest
from typer import BadParameter

from agl_trl.miniworld import load_model, load_tokenizer
from examples import budgets


def test_texts_to_measure_on_are_not_those_to_protect():
    kept, others = budgets.texts()
    assert len(kept) == len(others) == budgets.TEXTS and not {*kept["text"]} & {*others["text"]}


def test_text_nll_is_that_of_the_models_own_loss():
    _, others = budgets.texts()
    model, tokenizer, rows = load_model("aligned-small"), load_tokenizer(), others.select([0, 40])
    losses, tokens = [], []
    for text in rows["text"]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        losses.append(model(input_ids=ids, labels=ids).loss.item())
        tokens.append(ids.shape[1] - 1)
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert budgets.text_nll(model, rows) == pytest.approx(expected, rel=1e-5)


def test_a_run_without_rows_is_measured_on_both_kinds():
    found = budgets.run("statistics", "aligned-small", 1.0, "steps", "statistics", 0, 3)
    assert found["kl"] == pytest.approx((found["kl_refuse"] + found["kl_comply"]) / 2) and found["kl"] > 0
    assert "held" not in found, "nothing was measured in the run"


def test_finished_runs_are_not_made_again_and_unknown_kinds_are_told(tmp_path, capsys):
    figures = dict(kl=0.01, kl_refuse=0.01, kl_comply=0.01, task_nll=0.5, text_nll=3.0, text_nll_before=2.0)
    lines = [key | {"steps": 1} | figures for key in budgets.plan(["text"], 1)]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = path.read_bytes()
    budgets.main(kinds="text", seeds=1, steps=1, output_dir=tmp_path)
    assert path.read_bytes() == before and "0.50" in capsys.readouterr().out, "half of the budget"
    with pytest.raises(BadParameter, match="there is no 'sizes'"):
        budgets.main(kinds="sizes", seeds=1, steps=1, output_dir=tmp_path)
