"""The overhead benchmark runs, and the penalty of a step is a few batched calls whatever the depth."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import profile
from typer import BadParameter

from agl_trl import AlignGuardConfig
from agl_trl.miniworld import load_tokenizer
from agl_trl.trainer.gradients import add_gradients
from examples.benchmark.overhead import __main__ as overhead
from examples.benchmark.overhead.fisher import saved_bytes
from examples.benchmark.overhead.growth import growth, regularizer_of
from examples.benchmark.overhead.memory import PASSES, fisher_pass
from examples.benchmark.overhead.shapes import SHAPES, lora_of, model_of, rows_of
from examples.benchmark.overhead.turns import build, mean_ratio


def operators(layers: int, **options) -> tuple[Counter[str], set[str]]:
    """Torch operators that are called in the terms of one step and in what follows it, and with those that they call."""
    regularizer, _ = regularizer_of(rank=4, layers=layers, width=64, rows=2, **options)
    for parameter in regularizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    with profile() as profiler:
        add_gradients(regularizer.parameters, regularizer.gradients(0)[1])
        regularizer.hold()
    # But for the views in which a stacked gradient is handed to its layers: they start nothing on the device.
    events = [e for e in profiler.events() if e.name.startswith("aten::") and e.name != "aten::select"]
    outermost = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return Counter(event.name for event in outermost), {event.name for event in events}


# Rows of W are read layer by layer: the only exception, in the Riemannian overlap.
@pytest.mark.parametrize(
    "options",
    [dict(alignment_coef=3.0), dict(alignment_coef=3.0, task_coef=1.0), dict(drift_budget=3e-3)],
    ids=["penalty", "two-weights", "budget"],
)
def test_calls_of_a_step_do_not_grow_with_depth_nor_wait_for_the_device(options):
    (shallow, _), (deep, every) = operators(2, **options), operators(4, **options)
    assert shallow == deep and sum(deep.values()) > 20
    assert not every & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_exponents_of_growth_are_those_of_sizes():
    (line,) = growth(repeats=1, sweeps={"rank": (4, 16)})
    assert line["adapter, bytes"] == pytest.approx(1) and line["statistics, bytes"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_fill_the_sequence(kind):
    row = rows_of(SHAPES["135m"], kind, rows=2)[1]
    for name in row.keys() - {"prompt"} if kind == "dpo" else row:
        if name != "rejected":  # bland help is shorter than the task's answer
            assert len(load_tokenizer()(row[name]).input_ids) >= 480


def test_tables_are_written(tmp_path):
    overhead.main(steps=2, only="penalty", parts="memory,waits", rows=4, rounds=1, output_dir=tmp_path)
    found = json.loads((tmp_path / "embedded-sft.json").read_text())
    assert [line["variant"] for line in found["memory"]] == ["TRL", "penalty"]
    assert found["memory"][0]["peak MB"] > 100 and 0.8 < found["memory"][1]["ratio of peak memory"] < 1.3
    (theirs, ours) = ({**line, "variant": ""} for line in found["waits"])
    assert theirs == ours, "a step of the penalty waits for the device as often as TRL's"
    assert "| penalty |" in (tmp_path / "embedded-sft.md").read_text()


def test_passes_over_both_sides_write_larger_files():
    """In this process; in one of its own for its memory, and against an epoch, it is slow."""
    shape = SHAPES["embedded"]
    rows, model = rows_of(shape, rows=4), get_peft_model(model_of(shape), LoraConfig(**lora_of(shape)))
    one, both = (saved_bytes(fisher_pass(label, model, rows, shape.length, shape.batch)) for label in PASSES)
    assert 0 < one < both


@pytest.mark.slow
def test_passes_are_measured_against_an_epoch(tmp_path):
    overhead.main(steps=2, only="penalty", parts="fisher", rows=4, rounds=1, output_dir=tmp_path)
    one, both, *_ = json.loads((tmp_path / "embedded-sft.json").read_text())["fisher"]
    assert one["file MB"] < both["file MB"] and 0 < one["ratio to an epoch"] and 0 < one["extra MB"]


def test_the_default_is_timed_as_it_is_shipped(tmp_path):
    sizes = {
        name: build(name, SHAPES["embedded"], "sft", 2, str(tmp_path)).args.anchor_batch_size
        for name in ("KL budget (default)", "KL on as many rows")
    }
    assert sizes == {
        "KL budget (default)": AlignGuardConfig().anchor_batch_size,
        "KL on as many rows": SHAPES["embedded"].batch,
    }


def test_what_is_done_at_some_steps_alone_is_in_the_ratio():
    cycles = np.array([[1.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 5.0], [1.0, 9.0, 1.0, 4.0]])  # one step that was held up
    assert mean_ratio(cycles) == pytest.approx(1.75) and np.median(cycles) == 1.0
    assert mean_ratio(np.stack([cycles, 2 * cycles])).tolist() == pytest.approx([1.75, 3.5])


def test_trainers_take_turns(tmp_path):
    overhead.main(
        kind="dpo", steps=2, only="TRL again,KL budget (default)", parts="time", rows=4, rounds=1, output_dir=tmp_path
    )
    lines = json.loads((tmp_path / "embedded-dpo.json").read_text())["time"]
    assert [line["variant"] for line in lines] == ["TRL", "TRL again", "KL budget (default)"]
    assert [line["steps"] for line in lines] == [2, 2, 2] and lines[0]["high"] == 1
    assert 0 < lines[2]["own work"] < 1 and "own work" not in lines[1]


def test_what_is_not_there_is_said(tmp_path):
    for wrong in (dict(shape="9b"), dict(only="magic"), dict(parts="cost"), dict(kind="ppo")):
        with pytest.raises(BadParameter):
            overhead.main(**dict(steps=2, only=None, parts="time", rows=4, rounds=1, output_dir=tmp_path) | wrong)
    if not torch.cuda.is_available():
        with pytest.raises(BadParameter, match="needs a GPU"):
            overhead.main(shape="8b", steps=2, only=None, parts="time", rows=4, rounds=1, output_dir=tmp_path)
