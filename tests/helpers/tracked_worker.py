"""Two runs with trackers, a plain `Trainer` with the callback and our trainer: `python -m tests.helpers.tracked_worker FOLDER TRACKER ...`."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from agl_trl import AGLSFTConfig, AGLSFTTrainer, AlignGuardCallback, AlignGuardConfig
from agl_trl.data.alignment import tokenize_rows
from tests.helpers.models import byte_tokenizer, chat_rows, tiny_model
from tests.helpers.training import COMMON, lora


def main(folder: Path, trackers: list[str]) -> None:
    tokenizer = byte_tokenizer()
    kept = Dataset.from_list(chat_rows(10, "please do bad thing", "Sorry, no {}."))
    rows = Dataset.from_list(chat_rows(16, "say", "the number is {}"))
    shared = COMMON | dict(report_to=trackers)
    plain = Trainer(
        get_peft_model(tiny_model(), lora()),
        TrainingArguments(str(folder / "plain"), run_name="plain", project="agl", **shared),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids} for row in tokenize_rows(rows, tokenizer)]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[AlignGuardCallback(AlignGuardConfig(), alignment_dataset=kept, processing_class=tokenizer)],
    )
    ours = AGLSFTTrainer(
        tiny_model(),
        AGLSFTConfig(str(folder / "ours"), run_name="ours", project="agl", **shared),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=kept,
    )
    for name, trainer in (("plain", plain), ("ours", ours)):
        trainer.train()
        if "wandb" in trackers:
            import wandb

            wandb.finish()
        (folder / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
