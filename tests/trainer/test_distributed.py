"""Two processes under `accelerate launch`: DDP and FSDP2 do what one process does."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import sha256
from tests.helpers.distributed_worker import held_run
from tests.helpers.models import tiny_model
from tests.helpers.penalty_weight import alignment_rows
from tests.helpers.processes import COMMON, CONFIGS, launch


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    folder = tmp_path_factory.mktemp(request.param)
    done = launch(CONFIGS[request.param], folder, "-m", "tests.helpers.distributed_worker", request.param, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_took_part_and_fsdp_has_sharded(two):
    engine, _, ranks = two
    for seen in ranks:
        assert seen["world_size"] == 2 and seen["is_fsdp"] == (engine == "fsdp2")
        assert seen["sharded"] == ("DTensor" if engine == "fsdp2" else "Parameter")


def test_weight_of_the_penalty_is_exact_in_two_processes(two):
    engine, _, ranks = two
    steps = {"1": 5, "2": 3, "4": 2}  # the last window of 2 and of 4 is incomplete
    assert len(ranks[0]["weights"]) == (12 if engine == "ddp" else 3)
    for seen in ranks:
        for name, case in seen["weights"].items():
            assert len(case["weights"]) == steps[name.split("-")[1]]
            assert case["weights"] == pytest.approx([1.0] * len(case["weights"]), rel=1e-4), name
            assert case["distance"] < 1e-3, name


def test_statistics_are_the_same_on_every_process_and_those_of_one_process(two, tokenizer):
    _, folder, ranks = two
    assert ranks[0]["statistics"] == ranks[1]["statistics"]
    together = FisherStatistics.from_pretrained(folder / "run")
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    alone = estimate_fisher(model, alignment_rows("sft"), tokenizer, progress=False)
    assert together.num_tokens == alone.num_tokens, "an odd number of rows: none is counted twice"
    for name, X in alone.inputs.items():
        torch.testing.assert_close(together.inputs[name].eigenvalues, X.eigenvalues, rtol=1e-4, atol=1e-6)
    for name, norm in alone.weight_norm.items():
        assert together.weight_norm[name].item() == pytest.approx(norm.item(), rel=1e-4)


def test_budget_anchor_and_resume_in_two_processes(two):
    _, folder, ranks = two
    first, second = ranks
    assert first["drift"] == second["drift"] <= 1e-3 and first["multiplier"] == second["multiplier"] > 0
    assert first["anchor"] == second["anchor"] and len(first["anchor"]) == 2
    assert first["resumed"] == pytest.approx(first["layers"], rel=1e-5)
    report = DriftReport.from_pretrained(folder / "run")
    assert report.adapter_sha256 == sha256(folder / "run" / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(tiny_model(), folder / "run")
    drift = FisherStatistics.from_pretrained(folder / "run").relative_drift(model)
    assert list(drift.values()) == pytest.approx(first["layers"], rel=1e-4)
    assert len(load_file(folder / "run" / "adapter_model.safetensors")) == 2 * len(drift)
    assert "## Measured drift" in (folder / "run" / "README.md").read_text()


@pytest.fixture(scope="module")
def held_alone(tokenizer, tmp_path_factory) -> tuple[dict, dict]:
    """The run with a KL budget in one process: what it ends with, and its adapter."""
    folder = tmp_path_factory.mktemp("held")
    seen = held_run(folder, tokenizer, 1)
    return seen, load_file(folder / "adapter_model.safetensors")


def test_kl_budget_is_held_in_two_processes_as_in_one(two, held_alone):
    _, folder, ranks = two
    first, second = (seen["held"] for seen in ranks)
    assert first == second, "equal to the last bit"
    assert 0.95 * 0.02 <= first["kl"] <= 0.02 and first["told"]["scale"] < 1
    assert first["told"]["behaviours"]["alignment"]["kl"] == pytest.approx(first["kl"], rel=1e-5)
    alone, adapter = held_alone
    assert len(first["steps"]) == 3 and first["steps"][-1] > 0
    assert first["steps"] == pytest.approx(alone["steps"], rel=1e-4, abs=1e-6)
    assert first["told"]["scale"] == pytest.approx(alone["told"]["scale"], rel=1e-4)
    assert first["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    for name, value in load_file(folder / "held" / "adapter_model.safetensors").items():
        assert (value - adapter[name]).norm() <= 1e-4 * adapter[name].norm(), name


def test_two_processes_are_stopped_alike_by_what_the_model_answers(two):
    engine, _, ranks = two
    first, second = (seen["watched"] for seen in ranks)
    assert first == second, "equal to the last bit"
    if engine == "fsdp2":
        assert "a model can't generate under FSDP: use DDP" in first["refused"]
        return
    kl = first["kl"]
    assert kl[0] < kl[1] < kl[2] and first["stopped"] == 3 and first["weights_of"] == 2


@pytest.mark.slow  # DeepSpeed is no dependency: `pip install deepspeed`, with DS_ACCELERATOR=cpu where there is no GPU
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_ends_where_ddp_ends(stage, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    zero = COMMON | dict(
        distributed_type="DEEPSPEED", deepspeed_config=dict(zero_stage=stage, gradient_accumulation_steps=1)
    )
    runs = {"ddp": COMMON, "zero": zero}
    for name, config in runs.items():
        (tmp_path / name).mkdir()
        done = launch(config, tmp_path, "-m", "tests.helpers.distributed_worker", "short", str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-3000:]
    seen = {name: json.loads((tmp_path / name / "rank-1.json").read_text()) for name in runs}
    assert [run["world_size"] for run in seen.values()] == [2, 2]
    assert [run["zero_stage"] for run in seen.values()] == [None, stage]
    assert seen["zero"]["penalties"] == pytest.approx(seen["ddp"]["penalties"], rel=1e-4)
    ddp, zero = (load_file(tmp_path / name / "adapter_model.safetensors") for name in runs)
    for name, value in ddp.items():
        torch.testing.assert_close(zero[name], value, rtol=1e-4, atol=1e-6)
