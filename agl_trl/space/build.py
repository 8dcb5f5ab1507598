"""Trains the two adapters that the app shows by default: `python -m agl_trl.space.build`, a minute or two."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..artifacts.files import ADAPTER_FILE, sha256
from ..drift.report import DriftReport
from ..evaluation.judges import StringJudge
from ..experiments.demo import MAX_NEW_TOKENS, run_demo
from ..miniworld import heldout_prompts
from ..modeling.generation import generate_answers
from ..modeling.loading import load_adapter, load_model
from .models import ADAPTERS


def build(target: Path = ADAPTERS) -> None:
    """
    Run the demo with seed 0 and keep what the app needs of its adapters: bfloat16 weights, configuration and report.

    Raises:
        `RuntimeError`: If the rounding changed a verdict on a held-out prompt: the reports would no longer be true.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder))
        for name, source in (("plain", Path(folder) / "lora"), ("agl", Path(folder))):
            _keep(source, target / name)


def _keep(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / ADAPTER_FILE)
    rounded = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    save_file(rounded, target / ADAPTER_FILE, metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "miniworld"  # not where it lay on this machine
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order is another one in every process
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    report = DriftReport.from_pretrained(source)
    report.adapter_sha256 = sha256(target / ADAPTER_FILE)
    report.save_pretrained(target)
    if _refusals(source) != _refusals(target):
        raise RuntimeError(f"bfloat16 changes verdicts of '{target.name}': keep its adapter in float32.")


def _refusals(folder: Path) -> list[bool]:
    model, tokenizer = load_model("miniworld")
    questions = list(heldout_prompts()["prompt"])
    answers = generate_answers(
        load_adapter(model, folder), tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, progress=False
    )
    return [verdict.label == "refusal" for verdict in StringJudge()([str(q) for q in questions], answers)]


if __name__ == "__main__":
    build()
