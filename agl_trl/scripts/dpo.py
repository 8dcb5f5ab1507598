"""
Direct preference optimisation that keeps the alignment of the model. The flags are those of TRL's `dpo.py` and of
[`AGLDPOConfig`].

```bash
accelerate launch -m agl_trl.scripts.dpo \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
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
    from agl_trl import AGLDPOTrainer
    from agl_trl.miniworld import preference_dataset
    from agl_trl.scripts.training import run

    run(AGLDPOTrainer, script_args, training_args, model_args, dataset_args, embedded_rows=preference_dataset)


def make_parser(prog: str | None = None):
    from agl_trl import AGLDPOConfig
    from agl_trl.scripts import training

    return training.make_parser(AGLDPOConfig, prog)


if __name__ == "__main__":
    from agl_trl.scripts.training import parse

    main(*parse(make_parser()))
