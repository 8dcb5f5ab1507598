"""
Group relative policy optimisation that keeps the alignment of the model. The flags are those of TRL's `grpo.py` and of
[`AGLGRPOConfig`].

```bash
accelerate launch -m agl_trl.scripts.grpo \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name trl-lib/DeepMath-103K \
    --reward_funcs accuracy_reward \
    --alignment_dataset_name data/refusals.jsonl \
    --use_peft --lora_target_modules all-linear \
    --learning_rate 1.0e-5 \
    --output_dir Qwen2.5-0.5B-AGL \
    --push_to_hub
```

With published statistics in place of safety data: `--fisher_path FOLDER`. From a file: `--config run.yaml`; a key that
nobody reads ends the program.
"""


def main(script_args, training_args, model_args, dataset_args):
    from agl_trl import AGLGRPOTrainer
    from agl_trl.miniworld import rewarded_dataset
    from agl_trl.scripts.rewards import load_rewards
    from agl_trl.scripts.training import run

    run(
        AGLGRPOTrainer,
        script_args,
        training_args,
        model_args,
        dataset_args,
        embedded_rows=rewarded_dataset,
        reward_funcs=load_rewards(script_args.reward_model_name_or_path, script_args.reward_funcs),
    )


def make_parser(prog: str | None = None):
    from agl_trl import AGLGRPOConfig
    from agl_trl.scripts import training
    from agl_trl.scripts.rewards import AGLGRPOScriptArguments

    return training.make_parser(AGLGRPOConfig, prog, AGLGRPOScriptArguments)


if __name__ == "__main__":
    from agl_trl.scripts.training import parse

    main(*parse(make_parser()))
