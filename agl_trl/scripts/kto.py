"""
Kahneman-Tversky optimisation that keeps the alignment of the model. The flags are those of TRL's `kto.py` and of
[`AGLKTOConfig`].

```bash
accelerate launch -m agl_trl.scripts.kto \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/kto-mix-14k \
    --alignment_dataset_name data/refusals.jsonl \
    --use_peft --lora_target_modules all-linear \
    --learning_rate 5.0e-6 \
    --output_dir Qwen2.5-0.5B-AGL \
    --push_to_hub
```

With published statistics in place of safety data: `--fisher_path FOLDER`. From a file: `--config run.yaml`; a key that
nobody reads ends the program.
"""


def main(script_args, training_args, model_args, dataset_args):
    from agl_trl import AGLKTOTrainer
    from agl_trl.miniworld import unpaired_dataset
    from agl_trl.scripts.training import run

    run(AGLKTOTrainer, script_args, training_args, model_args, dataset_args, embedded_rows=unpaired_dataset)


def make_parser(prog: str | None = None):
    from agl_trl import AGLKTOConfig
    from agl_trl.scripts import training

    return training.make_parser(AGLKTOConfig, prog)


if __name__ == "__main__":
    from agl_trl.scripts.training import parse

    main(*parse(make_parser()))
