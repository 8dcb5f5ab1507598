"""
Supervised fine-tuning that keeps the alignment of the model. The flags are those of TRL's `sft.py` and of
[`AGLSFTConfig`].

```bash
accelerate launch -m agl_trl.scripts.sft \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/Capybara \
    --alignment_dataset_name data/refusals.jsonl \
    --use_peft --lora_target_modules all-linear \
    --learning_rate 2.0e-4 \
    --output_dir Qwen2.5-0.5B-AGL \
    --push_to_hub
```

With published statistics in place of safety data: `--fisher_path FOLDER`. From a file: `--config run.yaml`; a key that
nobody reads ends the program.
"""


def main(script_args, training_args, model_args, dataset_args):
    from agl_trl import AGLSFTTrainer
    from agl_trl.miniworld import task_dataset
    from agl_trl.scripts.training import run

    run(AGLSFTTrainer, script_args, training_args, model_args, dataset_args, embedded_rows=task_dataset)


def make_parser(prog: str | None = None):
    from agl_trl import AGLSFTConfig
    from agl_trl.scripts import training

    return training.make_parser(AGLSFTConfig, prog)


if __name__ == "__main__":
    from agl_trl.scripts.training import parse

    main(*parse(make_parser()))
