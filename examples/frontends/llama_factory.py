"""
LLaMA-Factory with and without AGL, on the embedded model:

    pip install llamafactory agl-trl
    python -m examples.frontends.llama_factory --output-dir outputs/llama-factory
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from llamafactory.train.tuner import run_exp

from agl_trl import AlignGuardCallback, AlignGuardConfig
from agl_trl.miniworld import alignment_dataset

from .world import BATCH, LEARNING_RATE, RANK, STEPS, model_folder, show, write_rows


def main(output_dir: Annotated[Path, typer.Option()] = Path("outputs/llama-factory"), steps: int = STEPS) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = write_rows(output_dir)
    tags = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    described = dict(file_name=rows.name, formatting="sharegpt", columns={"messages": "messages"}, tags=tags)
    (output_dir / "dataset_info.json").write_text(json.dumps({"embedded": described}))
    config: dict[str, Any] = dict(
        model_name_or_path=str(model_folder(output_dir)),
        stage="sft",
        do_train=True,
        finetuning_type="lora",
        lora_target="all",
        lora_rank=RANK,
        lora_alpha=2 * RANK,
        dataset="embedded",
        dataset_dir=str(output_dir),
        cutoff_len=256,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        max_steps=steps,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        overwrite_output_dir=True,
        disable_gradient_checkpointing=True,
    )
    run_exp(config | dict(output_dir=str(output_dir / "plain")))
    guard = AlignGuardCallback(AlignGuardConfig(), alignment_dataset=alignment_dataset())
    run_exp(config | dict(output_dir=str(output_dir / "agl")), callbacks=[guard])
    show("LLaMA-Factory", {"plain": output_dir / "plain", "with AGL": output_dir / "agl"})


if __name__ == "__main__":
    typer.run(main)
