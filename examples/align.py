"""
Align a model that hardly refuses: supervised fine-tuning on refusals of unsafe requests and on helpful answers to what only looks like
them, and what it refuses before and after:

    python -m examples.align --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir outputs/aligned
    python -m examples.align --model path/to/base --rank 0 --learning_rate 2e-5 --output_dir outputs/aligned   # all weights, no LoRA

The folder holds a whole model with its tokenizer, which every command of the package takes as `--model` or `--base`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from agl_trl.artifacts.files import check_writable
from agl_trl.data.files import is_file, load_rows
from agl_trl.data.prompts import load_prompts
from agl_trl.evaluation.answers import answer_prompts
from agl_trl.evaluation.rates import Rate
from agl_trl.modeling.loading import load_model


@dataclass
class Options:
    """Options of the command, under the same names."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with a chat template."})
    output_dir: Path = field(metadata={"help": "Folder of the aligned model."})
    dataset: str = field(
        default="driftcaps",
        metadata={"help": "Rows with answers: driftcaps (protect split), miniworld, a file or a Hub id."},
    )
    prompts: str = field(
        default="driftcaps",
        metadata={"help": "What is asked before and after: driftcaps (test split), a file or another name."},
    )
    limit: int | None = field(default=None, metadata={"help": "Prompts asked, spread over labels and categories."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest answer that is judged."})
    epochs: float = field(default=3.0, metadata={"help": "Times that every row is seen."})
    batch_size: int = field(default=8, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Largest learning rate, of a cosine schedule."})
    rank: int = field(default=16, metadata={"help": "LoRA rank; its alpha is twice that. 0 trains all weights."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights, also of those that are saved."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows, and of the adapter's start."})


def main(options: Options) -> None:
    """
    Ask, align, ask again, save.

    Raises:
        `ValueError`: If the model or the rows can't be read, or an option has no meaning.
        `OSError`: If the folder can't be written.
    """
    if options.rank < 0 or min(options.epochs, options.batch_size, options.learning_rate, options.max_new_tokens) <= 0:
        raise ValueError(
            "`--epochs`, `--batch_size`, `--learning_rate` and `--max_new_tokens` must be above 0, `--rank` not below."
        )
    check_writable(options.output_dir)
    rows, prompts = alignment_rows(options.dataset), load_prompts(options.prompts, options.limit)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if tokenizer.chat_template is None:
        raise ValueError(f"The model '{options.model}' has no chat template to write conversations with.")
    before = rates(model, tokenizer, prompts, options)
    model = align(model, tokenizer, rows, options)
    after = rates(model, tokenizer, prompts, options)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    table = Table("", "before", "after", title=f"{options.prompts}, {len(prompts)} prompts")
    for name, rate in before.items():
        table.add_row(name, *(f"{side.value:.1%} of {side.total}" for side in (rate, after[name])))
    Console().print(table)
    Console().print(f"Aligned model: {options.output_dir}", highlight=False, soft_wrap=True)


def alignment_rows(name: str) -> Dataset:
    """
    Prompts and answers to learn.

    Raises:
        `ValueError`: If they can't be read, or have no answers.
    """
    rows = load_prompts(name) if is_file(name) else load_rows(name)
    if missing := [column for column in ("prompt", "completion") if column not in rows.column_names]:
        raise ValueError(
            f"'{name}' has no column '{missing[0]}': aligning takes prompts, each with the answer to give."
        )
    return rows.select_columns(["prompt", "completion"])


def rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Dataset, options: Options
) -> dict[str, Rate]:
    """Share of the unsafe prompts, and of the safe ones, that the model refuses."""
    asked = prompts.select_columns([column for column in prompts.column_names if column != "completion"])
    refused = answer_prompts(model, tokenizer, asked, max_new_tokens=options.max_new_tokens, desc="Answers").refused
    unsafe = torch.tensor(prompts["unsafe"])
    kinds = {"refuses unsafe": unsafe, "refuses safe": ~unsafe}
    return {
        name: Rate(int(refused[chosen].sum()), int(chosen.sum())) for name, chosen in kinds.items() if chosen.any()
    }


def align(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, options: Options
) -> PreTrainedModel:
    """The model after SFT on the answers alone; an adapter is merged into its weights."""
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        str(options.output_dir),
        seed=options.seed,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        use_cpu=not on_gpu,
        bf16=on_gpu and options.dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )
    extra: dict[str, Any] = {}
    if options.rank:
        extra["peft_config"] = LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    set_seed(options.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **extra)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.merge_and_unload() if options.rank else trainer.model


if __name__ == "__main__":
    (options,) = HfArgumentParser(Options, description=__doc__.splitlines()[1]).parse_args_into_dataclasses()
    try:
        main(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
