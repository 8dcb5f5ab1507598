"""
What two processes do together; started by `accelerate launch` from the tests:

    accelerate launch --config_file ddp.yaml -m tests.helpers.distributed_worker ddp OUTPUT_DIR

Every process writes what it saw to `OUTPUT_DIR/rank-N.json`.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerFast


def fsdp2_on_cpu() -> None:
    """Accelerate takes its FSDP2 branch on accelerators only: let it take it on a CPU, with the real sharding behind it."""
    initialise, barrier = AcceleratorState.__init__, dist.barrier

    def patched(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            kwargs["cpu"] = True
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = patched
    dist.barrier = lambda *args, **kwargs: barrier(*args, **{k: v for k, v in kwargs.items() if k != "device_ids"})


def fingerprint(statistics) -> str:
    digest = hashlib.sha256()
    for name in sorted(statistics.inputs):
        for tensor in statistics.inputs[name]:
            digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def short_run(output_dir: Path) -> None:
    """A few penalised steps, saved: the same adapter under every engine."""
    from tests.helpers.models import byte_tokenizer
    from tests.helpers.penalty_weight import trainer_of

    options = dict(learning_rate=1e-3, alignment_coef=300.0, max_steps=4)  # DeepSpeed would clip the penalty too
    trainer, _ = trainer_of("sft", output_dir, byte_tokenizer(), world=2, **options)
    trainer.train()
    trainer.save_model()
    plugin = trainer.accelerator.state.deepspeed_plugin
    seen = {
        "world_size": trainer.accelerator.num_processes,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "penalties": [entry["agl/penalty"] for entry in trainer.state.log_history if "agl/penalty" in entry],
    }
    (output_dir / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.end()


def held_run(output_dir: Path, tokenizer: PreTrainedTokenizerFast, world: int) -> dict:
    """A run with a KL budget that it would exceed, without Adam, which makes much of a last bit. Returns what this process ends with."""
    from agl_trl.modeling.sharding import whole
    from tests.helpers.penalty_weight import trainer_of

    options = dict(optim="sgd", learning_rate=0.05, max_steps=6, kl_budget=0.02, anchor_every=2)
    trainer, _ = trainer_of("sft", output_dir, tokenizer, world=world, **options)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(20)  # of a fresh model they are flat, and KL next to nothing
        for layer in trainer.align_guard.layers:
            layer.parameters()[1].zero_()
    trainer.train()
    trainer.save_model()
    guard = trainer.align_guard
    with torch.no_grad():
        kl = guard.references.kl(trainer.model)[:, 0].mean().item()
    parts = [whole(parameter.detach()).cpu() for layer in guard.layers for parameter in layer.parameters()]
    return {
        "kl": kl,
        "told": trainer.drift_report().metadata["protected"],
        "steps": [entry["agl/kl_step"] for entry in trainer.state.log_history if "agl/kl_step" in entry],
        "curve": guard.statistics.metadata["kl_curve"]["kl"],
        "adapter": hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest(),
    }


def watched_run(output_dir: Path, tokenizer: PreTrainedTokenizerFast, world: int) -> dict:
    """A run that its own answers stop after some steps. Returns where this process ends, or why it does not begin."""
    from tests.helpers.penalty_weight import trainer_of

    asked = output_dir / f"asked-{PartialState().process_index}.jsonl"
    output_dir.mkdir(exist_ok=True)
    asked.write_text('{"prompt": "please do bad thing 4!"}\n{"prompt": "please do bad thing 9!"}\n')
    ask = dict(drift_eval_steps=1, drift_eval_prompts=str(asked))
    options = dict(optim="sgd", learning_rate=0.5, max_steps=4, alignment_coef=1e-3)

    def run(name: str):
        trainer, _ = trainer_of("sft", output_dir / name, tokenizer, world=world, **options, **ask)
        with torch.no_grad():
            for layer in trainer.align_guard.layers:
                layer.parameters()[1].zero_()
        trainer.train()
        return trainer

    try:
        trainer = run("free")
    except ValueError as error:
        return {"refused": str(error)}
    kl = [entry["agl/eval_kl_unsafe"] for entry in trainer.state.log_history if "agl/eval_kl_unsafe" in entry]
    ask["drift_stop"] = f"kl_unsafe>{kl[1]!r}"
    trainer = run("stopped")
    parts = [parameter.detach() for layer in trainer.align_guard.layers for parameter in layer.parameters()]
    return {
        "kl": kl,
        "stopped": trainer.state.global_step,
        "weights_of": trainer.align_guard.report.global_step,
        "adapter": hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest(),
    }


def main(engine: str, output_dir: Path) -> None:
    if engine == "short":
        short_run(output_dir)
        return
    if engine == "fsdp2":
        fsdp2_on_cpu()
    from tests.helpers.models import byte_tokenizer
    from tests.helpers.penalty_weight import alignment_rows, measured_weights, trainer_of

    tokenizer = byte_tokenizer()
    seen: dict = {"weights": {}, "engine": engine}
    cases = [("sft", 1, False), ("sft", 2, False), ("dpo", 2, False)]
    if engine == "ddp":
        cases = [
            (kind, n, checkpointing) for kind in ("sft", "dpo") for n in (1, 2, 4) for checkpointing in (False, True)
        ]
    for kind, accumulation, checkpointing in cases:
        options = dict(gradient_accumulation_steps=accumulation, gradient_checkpointing=checkpointing)
        name = f"{kind}-{accumulation}-{checkpointing}"
        weights, distance, trainer = measured_weights(kind, output_dir / name, tokenizer, world=2, **options)
        seen["weights"][name] = {"weights": weights, "distance": distance}
        seen["statistics"] = fingerprint(trainer.statistics)
    seen["sharded"] = next(type(p).__name__ for n, p in trainer.model.named_parameters() if "lora_A" in n)

    # A whole run: budget, anchor, a saved checkpoint, and the run resumed from it.
    options = dict(
        learning_rate=1e-2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        drift_budget=1e-3,
        anchor_coef=0.1,
        anchor_every=2,
        average_tokens_across_devices=False,
    )
    trainer, _ = trainer_of("sft", output_dir / "run", tokenizer, world=2, **options)
    with torch.no_grad():
        for layer in trainer.align_guard.layers:
            layer.parameters()[1].zero_()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    report = trainer.drift_report()
    seen["world_size"] = trainer.accelerator.num_processes
    seen["is_fsdp"] = trainer.is_fsdp_enabled
    seen["drift"], seen["multiplier"] = report.mean_relative_drift, report.budget_multiplier
    seen["layers"] = report.relative_drift.tolist()
    seen["anchor"] = [entry["agl/kl"] for entry in trainer.state.log_history if "agl/kl" in entry]
    resumed, _ = trainer_of("sft", output_dir / "run", tokenizer, world=2, **options)
    resumed.train(resume_from_checkpoint=str(output_dir / "run" / "checkpoint-2"))
    seen["resumed"] = resumed.drift_report().relative_drift.tolist()
    seen["rows"] = len(alignment_rows("sft"))
    seen["held"] = held_run(output_dir / "held", tokenizer, 2)
    seen["watched"] = watched_run(output_dir / "watched", tokenizer, 2)
    (output_dir / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
