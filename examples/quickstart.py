# /// script
# requires-python = ">=3.11"
# dependencies = ["agl-trl"]
#
# [tool.uv.sources]
# agl-trl = { path = "..", editable = true }
# ///
"""
Fine-tune the embedded aligned model on a harmless task and keep its refusals. Runs on a CPU in about a minute:

    python examples/quickstart.py     # or, in an environment that uv makes: uv run examples/quickstart.py
"""

from peft import LoraConfig

from agl_trl import AGLSFTConfig, AGLSFTTrainer
from agl_trl.miniworld import alignment_dataset, heldout_prompts, load_model, load_tokenizer, task_dataset


trainer = AGLSFTTrainer(
    model=load_model("aligned"),
    args=AGLSFTConfig("outputs/quickstart", max_steps=200, learning_rate=2e-3, use_cpu=True, bf16=False),
    train_dataset=task_dataset("extract"),
    alignment_dataset=alignment_dataset(),
    processing_class=load_tokenizer(),
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
print(trainer.drift_report(prompts=heldout_prompts()).summary())
