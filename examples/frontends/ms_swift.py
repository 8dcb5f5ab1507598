"""
ms-swift with and without AGL, on the embedded model:

    pip install ms-swift agl-trl
    python -m examples.frontends.ms_swift --output-dir outputs/ms-swift
"""

from pathlib import Path
from typing import Annotated

import typer
from swift import sft_main
from swift.template import TemplateMeta, register_template

from .world import BATCH, LEARNING_RATE, RANK, STEPS, model_folder, show, write_rows


# The chat template of the embedded model, as ms-swift writes one; it knows those of well-known models.
END = ["eos_token_id"]
MINIWORLD = TemplateMeta(
    "miniworld",
    prefix=[["bos_token_id"]],
    prompt=["<|user|>{{QUERY}}", END, "<|assistant|>"],
    chat_sep=[END],
    suffix=[END],
)


def main(output_dir: Annotated[Path, typer.Option()] = Path("outputs/ms-swift"), steps: int = STEPS) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    register_template(MINIWORLD)
    options = {
        "model": model_folder(output_dir),
        "model_type": "llama",
        "template": "miniworld",
        "dataset": write_rows(output_dir),
        "tuner_type": "lora",
        "target_modules": "all-linear",
        "lora_rank": RANK,
        "lora_alpha": 2 * RANK,
        "torch_dtype": "float32",
        "max_length": 256,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "max_steps": steps,
        "logging_steps": 10,
        "split_dataset_ratio": 0,
        "gradient_checkpointing": "false",
        "use_cpu": "true",
        "report_to": "none",
        "add_version": "false",
    }
    plugin = {"external_plugins": Path(__file__).with_name("ms_swift_plugin.py"), "callbacks": "alignguard"}
    found = {}
    for name, added in {"plain": {}, "agl": plugin}.items():
        given = options | added | {"output_dir": output_dir / name}
        sft_main([word for key, value in given.items() for word in (f"--{key}", str(value))])
        found[name] = output_dir / name / f"checkpoint-{steps}"
    show("ms-swift", found)


if __name__ == "__main__":
    typer.run(main)
