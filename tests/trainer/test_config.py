"""Everything else that TRL's SFT trainer offers keeps working with AGL on."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, DriftReport, FisherStatistics
from agl_trl.modeling.lora import adapted_layers
from agl_trl.objective.covariance import EXACT_UP_TO
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.training import COMMON, adapter_of, agl_trainer, lora


def messages(rows):
    return rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=rows.column_names)


def text(rows):
    return rows.map(lambda row: {"text": row["prompt"][0]["content"]}, remove_columns=rows.column_names)


def tokenized(rows, tokenizer):
    return Dataset.from_list([{"input_ids": tokenizer(row["prompt"][0]["content"])["input_ids"]} for row in rows])


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(list(rows)))


CONFIGS = {
    "packing bfd": dict(packing=True, packing_strategy="bfd", max_length=128),
    "packing wrapped": dict(packing=True, packing_strategy="wrapped", max_length=64),
    "padding free": dict(padding_free=True, max_length=None),
    "whole rows in the loss": dict(completion_only_loss=False),
    "chunked nll": dict(loss_type="chunked_nll"),
    "dft": dict(loss_type="dft"),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)
    ),
    "accumulation without averaging": dict(gradient_accumulation_steps=2, average_tokens_across_devices=False),
    "bf16": dict(bf16=True),
    "neftune": dict(neftune_noise_alpha=5.0),
}
DATASETS = {
    "messages": lambda rows, tokenizer: (messages(rows), {}),
    "assistant only": lambda rows, tokenizer: (messages(rows), dict(assistant_only_loss=True)),
    "text": lambda rows, tokenizer: (text(rows), {}),
    "tokenized": lambda rows, tokenizer: (tokenized(rows, tokenizer), {}),
    "iterable": lambda rows, tokenizer: (streamed(rows), {}),
}


def check(trainer, folder):
    before = adapter_of(trainer)
    trainer.train()
    trainer.save_model()
    assert any(not torch.equal(before[name], p) for name, p in adapter_of(trainer).items())
    entry = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert entry["agl/relative_drift"] > 0 and entry["agl/penalty"] >= 0 and math.isfinite(entry["loss"])
    assert DriftReport.from_pretrained(folder).mean_relative_drift > 0


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL's own notices about what still works
@pytest.mark.parametrize("name", CONFIGS)
def test_training_options(name, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **dict(max_steps=2) | CONFIGS[name])
    check(trainer, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_wide_enough_for_a_sketch_in_16_bit(dtype, tmp_path, tokenizer, train_rows, alignment_rows):
    """As every model of use has them; the statistics, taken in the wrapped model, are those of float32 beyond 16 bit's rounding."""
    taken = []
    for half in (True, False):
        model = tiny_model(intermediate_size=EXACT_UP_TO + 64, dtype=dtype)
        trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, model, max_steps=2, bf16=half)
        check(trainer, tmp_path)
        taken.append(FisherStatistics.from_pretrained(tmp_path))
    half, full = (torch.stack([covariance.trace() for covariance in side.inputs.values()]) for side in taken)
    torch.testing.assert_close(half, full, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("task", [False, True])
def test_dataset_formats(name, task, tmp_path, tokenizer, train_rows, alignment_rows):
    """Also where the task's own Fisher is taken from the training rows."""
    rows, options = DATASETS[name](train_rows, tokenizer)
    options |= dict(task_subspace="task") if task else {}
    check(agl_trainer(tmp_path, tokenizer, rows, alignment_rows, max_steps=2, **options), tmp_path)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")  # TRL's own notice about compute_metrics
def test_formatting_function_callbacks_metrics_and_dict_eval_sets(tmp_path, tokenizer, train_rows, alignment_rows):
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = AGLSFTTrainer(
        tiny_model(),
        AGLSFTConfig(
            str(tmp_path),
            **COMMON | dict(max_steps=2, eval_strategy="steps", eval_steps=1, completion_only_loss=False),
        ),
        train_dataset=train_rows,
        eval_dataset={"one": train_rows.select(range(4)), "two": train_rows.select(range(4, 8))},
        formatting_func=lambda row: "Q: " + row["prompt"][0]["content"],
        compute_metrics=lambda prediction: {"seen": float(prediction.predictions.shape[0])},
        callbacks=[Counter()],
        processing_class=tokenizer,
        peft_config=lora(),
        alignment_dataset=alignment_rows,
    )
    check(trainer, tmp_path)
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert steps == [1, 2] and logs["eval_one_seen"] == logs["eval_two_seen"] == 4.0
    assert not [key for key in logs if key.startswith("eval") and "agl" in key], "penalties are of training alone"


def test_evaluation_loss_is_that_of_the_parent(tmp_path, tokenizer, train_rows, alignment_rows):
    """No penalty in `eval_loss`: with the same weights it is plain SFT's."""
    ours = agl_trainer(tmp_path / "ours", tokenizer, train_rows, alignment_rows, alignment_coef=50.0)
    ours.train()
    plain = SFTTrainer(
        ours.model,
        SFTConfig(str(tmp_path / "plain"), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
    )
    rows = train_rows.select(range(8))
    losses = [
        trainer.evaluate(trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "eval"))["eval_loss"]
        for trainer in (ours, plain)
    ]
    assert losses[0] == losses[1]


def test_batch_size_that_is_lowered_keeps_statistics_of_the_start(tmp_path, tokenizer, train_rows, alignment_rows):
    """`auto_find_batch_size` begins again with fewer rows; the statistics are not taken again."""
    trainer = agl_trainer(
        tmp_path, tokenizer, train_rows, alignment_rows, auto_find_batch_size=True, drift_budget=1e-3
    )
    step, failed = trainer.training_step, []

    def out_of_memory_at_first(model, inputs, num_items_in_batch=None):
        if inputs["input_ids"].shape[0] > 2:
            failed.append(trainer.statistics)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = out_of_memory_at_first
    trainer.train()
    assert failed and all(statistics is trainer.statistics for statistics in failed)
    assert 0 < trainer.drift_report().mean_relative_drift <= 1e-3


def test_protected_text_for_a_chat_model_is_told_once(tmp_path, tokenizer, train_rows, alignment_rows, caplog):
    plain = [{"prompt": row["prompt"][0]["content"], "completion": "Sorry."} for row in alignment_rows]
    for rows, times in ((alignment_rows, 0), (Dataset.from_list(plain), 1)):
        agl_trainer(tmp_path, tokenizer, train_rows, rows, max_steps=1).train()
        assert caplog.text.count("without the chat template") == times


def test_lora_on_embeddings_is_told_and_named_in_the_report(tmp_path, tokenizer, train_rows, alignment_rows, caplog):
    trainer = AGLSFTTrainer(
        tiny_model(),
        AGLSFTConfig(str(tmp_path), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora(target_modules=["q_proj", "embed_tokens"]),
        alignment_dataset=alignment_rows,
    )
    assert "free to drift" in caplog.text and "lora_embedding_A" in caplog.text
    trainer.train()
    report = trainer.drift_report()
    assert len(report.layers) == 2 and [*report.uncovered] == ["model.embed_tokens.weight"]


def test_modules_to_save_are_told_and_several_adapters_leave_the_others_alone(
    tmp_path, tokenizer, train_rows, alignment_rows, caplog
):
    model = get_peft_model(tiny_model(), lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True))
    other = {n: p.detach().clone() for n, p in model.named_parameters() if ".other." in n}
    trainer = AGLSFTTrainer(
        model,
        AGLSFTConfig(str(tmp_path), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
        alignment_dataset=alignment_rows,
    )
    assert "free to drift" in caplog.text and "lm_head" in caplog.text
    check(trainer, tmp_path)
    assert other and all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in other.items())
    assert {layer.adapter for layer in adapted_layers(model)} == {"default"}
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_adapter_of_another_name_is_described_where_it_lies(tmp_path, tokenizer, train_rows, alignment_rows):
    model = get_peft_model(tiny_model(), lora(use_rslora=True), adapter_name="mine")
    trainer = AGLSFTTrainer(
        model,
        AGLSFTConfig(str(tmp_path), **COMMON),
        train_dataset=train_rows,
        processing_class=tokenizer,
        alignment_dataset=alignment_rows,
    )
    check(trainer, tmp_path)
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()


def test_statistics_need_no_rows_of_the_length_trained_on(tmp_path, tokenizer, train_rows):
    rows = Dataset.from_list(chat_rows(5, "please do bad thing " * 8, "Sorry, no {}." + " Not this." * 20))
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, rows, max_length=None, max_steps=2)
    check(trainer, tmp_path)


def test_the_report_of_a_run_is_of_its_own_share_of_the_fisher(tmp_path, tokenizer, train_rows, alignment_rows):
    options = dict(fisher_energy=0.3, fisher_shrinkage=0.5, max_steps=2)
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **options)
    trainer.train()
    trainer.save_model()
    saved = DriftReport.from_pretrained(tmp_path)
    assert saved.metadata["fisher_energy"] == 0.3
    at = {energy: DriftReport.measure(trainer.model, trainer.statistics, energy) for energy in (0.3, 0.9)}
    torch.testing.assert_close(saved.alignment_energy, at[0.3].alignment_energy, rtol=1e-5, atol=1e-9)
    assert saved.alignment_energy.sum() < 0.9 * at[0.9].alignment_energy.sum()
    torch.testing.assert_close(saved.relative_drift, at[0.9].relative_drift, rtol=1e-5, atol=1e-9)
