"""The runs behind the law of forgetting: what is trained, counted and written, and what is not repeated."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from agl_trl.cli.scaling import load_runs
from agl_trl.experiments import scaling_sweep
from agl_trl.experiments.scaling_sweep import sweep
from agl_trl.miniworld import heldout_unsafe, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.likelihood import answer_nll


QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("sweep")
    return sweep(output_dir, 1, sizes=("aligned-small",), steps=(2,), console=QUIET)


def test_sweep_writes_what_the_command_reads(swept):
    rows = [json.loads(line) for line in swept.read_text().splitlines()]
    assert [(row["method"], row["steps"]) for row in rows] == [("lora", 2), ("agl", 2)]
    model, tokenizer = load_model("aligned-small"), load_tokenizer()
    before = answer_nll(model, tokenizer, heldout_unsafe(), batch_size=7).mean().item()
    for row in rows:
        assert row["n_params"] == sum(p.numel() for p in model.parameters())
        assert row["loss_before"] == pytest.approx(before, rel=1e-5) and row["loss_after"] != row["loss_before"]
    assert rows[0]["finetune_tokens"] == rows[1]["finetune_tokens"]
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"])
        for row in task_dataset("extract")
    ]
    low, high = sorted(lengths)[:32], sorted(lengths)[-32:]
    assert sum(low) <= rows[0]["finetune_tokens"] <= sum(high), "2 steps of 16 rows, without padding"
    assert load_runs(swept)["agl"].increase.shape == (1,)


def test_sweep_goes_on_where_it_stopped(swept, tmp_path, monkeypatch):
    whole = swept.read_bytes()
    path = tmp_path / swept.name
    path.write_bytes(whole.splitlines(keepends=True)[0])
    trained = []
    monkeypatch.setattr(scaling_sweep, "_seconds_per_step", lambda size: 0.1)
    train = scaling_sweep.train
    monkeypatch.setattr(scaling_sweep, "train", lambda run: trained.append(run) or train(run))
    sweep(tmp_path, 1, sizes=("aligned-small",), steps=(2,), console=QUIET)
    assert [tuple(run) for run in trained] == [("agl", "aligned-small", 2, 0)] and path.read_bytes() == whole
    path.write_text("method,n_params\n")
    with pytest.raises(ValueError, match="holds no runs of this command"):
        sweep(tmp_path, 1, console=QUIET)
    assert path.read_text() == "method,n_params\n", "what was there is kept"


def test_what_is_missing_is_run_seed_by_seed(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(scaling_sweep, "_seconds_per_step", lambda size: 0.1)
    monkeypatch.setattr(scaling_sweep, "train", lambda run: trained.append(tuple(run)) or {"n_params": 1})
    options = dict(sizes=("aligned-small", "aligned"), console=QUIET)
    path = sweep(tmp_path, 1, steps=(5,), **options)
    assert trained == [(m, size, 5, 0) for size in ("aligned-small", "aligned") for m in ("lora", "agl")]
    before, trained[:] = path.read_text(), []
    sweep(tmp_path, 2, steps=(3, 5), **options)
    expected = [(size, n, 0) for size in ("aligned-small", "aligned") for n in (3,)]
    expected += [(size, n, 1) for size in ("aligned-small", "aligned") for n in (3, 5)]
    assert trained == [(m, *run) for run in expected for m in ("lora", "agl")]
    assert path.read_text().startswith(before) and len(path.read_text().splitlines()) == 16


def test_checkpoints_are_of_three_sizes():
    sizes = [load_model(name).num_parameters() for name in scaling_sweep.SIZES]
    assert sizes[0] * 2 < sizes[1] and sizes[1] * 2 < sizes[2]
