"""Budget, anchor, variants and continued adapters, in real training runs of a tiny model."""

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from agl_trl import (
    AGLSFTConfig,
    DriftReport,
    estimate_fisher,
)
from agl_trl.modeling.lora import adapted_layers, at_reference
from tests.helpers.models import tiny_model
from tests.helpers.training import adapter_of, agl_trainer, lora


@pytest.mark.parametrize("budget", [1e-5, 1e-3])
@pytest.mark.parametrize("coef", [0.0, 3.0])
def test_budget_is_kept_after_every_step(budget, coef, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(
        tmp_path,
        tokenizer,
        train_rows,
        alignment_rows,
        alignment_coef=coef,
        drift_budget=budget,
        max_steps=12,
        learning_rate=2e-2,
    )
    drifts, multipliers = [], []

    class Watcher(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):  # after the one that holds the budget
            regularizer = trainer.align_guard.regularizer
            drifts.append(regularizer.drift(regularizer.factors()).mean().item())
            multipliers.append(regularizer.budget.multiplier.item())

    trainer.add_callback(Watcher())
    trainer.train()
    assert len(drifts) == 12 and max(drifts) <= budget and max(drifts) > 0.5 * budget
    report = trainer.drift_report()
    assert report.mean_relative_drift <= budget and report.budget_multiplier == multipliers[-1]
    assert 0 < max(multipliers) <= 1.2, "it rose, by no more than 0.1 a step"
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def test_budget_that_is_never_reached_changes_nothing(tmp_path, tokenizer, train_rows, alignment_rows):
    free = agl_trainer(tmp_path / "free", tokenizer, train_rows, alignment_rows, alignment_coef=3.0)
    free.train()
    budgeted = agl_trainer(
        tmp_path / "budget", tokenizer, train_rows, alignment_rows, drift_budget=1e3, alignment_coef=3.0
    )
    budgeted.train()
    for (name, a), b in zip(adapter_of(free).items(), adapter_of(budgeted).values(), strict=True):
        assert torch.equal(a, b), name


def test_terms_and_budget_hold_the_statistics_once(tmp_path, tokenizer, train_rows, alignment_rows):
    options = dict(alignment_coef=3.0, task_coef=1.0, drift_budget=1e-3, max_steps=1)
    trainer = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **options)
    trainer.train()
    regularizer = trainer.align_guard.regularizer
    for stack, group in zip(regularizer.objective.stacks, regularizer.drift.groups, strict=True):
        assert stack.group.kept.input.eigenvectors.data_ptr() == group.kept.input.eigenvectors.data_ptr()


OPTIONS = {
    "two weights": dict(task_coef=0.3),
    "identity": dict(task_metric="identity"),
    "task metric": dict(task_metric="task"),
    "overlap": dict(collision_coef=0.1, collision_alpha=1.0),
    "sampled overlap": dict(collision_coef=0.1, collision_alpha=1.0, collision_rows=8),
    "everything": dict(collision_coef=0.1, fisher_shrinkage=0.2),
    "paper": dict(variant="paper", fisher_rank=4),
}
TERMS = {
    "two weights": {"alignment", "task"},
    "identity": {"alignment", "task"},
    "task metric": {"alignment", "task"},
    "overlap": {"alignment", "task", "riemannian"},
    "sampled overlap": {"alignment", "task", "riemannian"},
    "everything": {"alignment", "task", "neither", "riemannian", "geodesic"},
    "paper": {"alignment", "task", "riemannian", "geodesic"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_term_trains_and_is_logged(name, tmp_path, tokenizer, train_rows, alignment_rows):
    trainer = agl_trainer(
        tmp_path, tokenizer, train_rows, alignment_rows, max_steps=2, **dict(alignment_coef=3.0) | OPTIONS[name]
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    logged = {key.removeprefix("agl/") for key in last if key.startswith("agl/")}
    assert logged == TERMS[name] | {"penalty", "relative_drift"}
    dead = {"geodesic"} if name == "paper" else set()
    assert all(last[f"agl/{term}"] > 0 for term in logged - dead)
    # Orthogonal parts; what is left comes from the eigenvectors being stored in bfloat16.
    assert all(last[f"agl/{term}"] < 1e-3 for term in dead)
    trainer.save_model()
    saved = DriftReport.from_pretrained(tmp_path).metadata["coefficients"]
    assert saved["variant"] == ("paper" if name == "paper" else "kfac")


def test_anchor_holds_the_answers_of_the_reference(tmp_path, tokenizer, train_rows, alignment_rows):
    """Training on the opposite of the alignment answers: the anchored run ends nearer to the reference."""
    final = []
    for coef in (1e-8, 1000.0):
        trainer = agl_trainer(
            tmp_path / str(coef),
            tokenizer,
            train_rows,
            alignment_rows,
            alignment_coef=0.0,
            anchor_coef=coef,
            anchor_every=2,
            anchor_batch_size=10,
            max_steps=20,
        )
        trainer.train()
        references = trainer.align_guard.references
        final.append(references.kl(trainer.model)[:, 0].mean().item())
        assert final[-1] > 1e-5, "it has moved"
        with at_reference(trainer.model, trainer.align_guard.layers):
            assert references.kl(trainer.model)[:, 0].max().item() == pytest.approx(0, abs=1e-5)
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [("agl/kl" in entry) for entry in steps] == [step % 2 == 0 for step in range(20)]
    assert final[1] < 0.5 * final[0]


def test_continued_adapter_is_measured_from_where_it_started(tmp_path, tokenizer, train_rows, alignment_rows):
    def moved_model():
        model = get_peft_model(tiny_model(), lora())
        torch.manual_seed(3)
        for layer in adapted_layers(model):
            torch.nn.init.normal_(layer.current().B, std=0.1)
        return model

    def trainer(folder):
        from agl_trl import AGLSFTTrainer
        from tests.helpers.training import COMMON

        return AGLSFTTrainer(
            moved_model(),
            AGLSFTConfig(
                str(folder),
                anchor_coef=0.1,
                anchor_every=1,
                save_strategy="steps",
                save_steps=2,
                **{k: v for k, v in COMMON.items() if k != "save_strategy"},
            ),
            train_dataset=train_rows,
            processing_class=tokenizer,
            alignment_dataset=alignment_rows,
        )

    whole = trainer(tmp_path)
    start = adapter_of(whole)
    whole.train()
    first = next(entry for entry in whole.state.log_history if "loss" in entry)
    assert first["agl/relative_drift"] == pytest.approx(0, abs=1e-9) and first["agl/kl"] == pytest.approx(0, abs=1e-2)
    report = whole.drift_report()
    layer = whole.align_guard.layers[5]
    A, B, scaling = layer.current()
    name = f"base_model.model.{layer.name}.lora_{{}}.default.weight"
    delta = scaling * (B @ A - start[name.format("B")] @ start[name.format("A")]).detach().double()
    from tests.helpers.reference import dense, quadratic_form

    metric = whole.statistics.metric(layer.name)
    expected = quadratic_form(delta, dense(metric.input), None) / metric.weight_norm.double() ** 2
    assert report.relative_drift[5].item() == pytest.approx(expected.item(), rel=1e-3)

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_start_of_a_continued_adapter_includes_what_it_trains_beside_lora(
    tmp_path, tokenizer, train_rows, alignment_rows
):
    """The base of the report, in this run and in one that goes on from a checkpoint, is the model as it was when the run began."""
    from agl_trl import AGLSFTTrainer
    from tests.helpers.models import moved_adapter
    from tests.helpers.training import COMMON

    settings = {k: v for k, v in COMMON.items() if k != "save_strategy"}
    start = moved_adapter(tiny_model(), 0.1, modules_to_save=["lm_head"])
    head = start.lm_head.weight.detach().clone()
    for resume in (False, True):
        trainer = AGLSFTTrainer(
            moved_adapter(tiny_model(), 0.1, modules_to_save=["lm_head"]),
            AGLSFTConfig(str(tmp_path), save_strategy="steps", save_steps=2, **settings),
            train_dataset=train_rows,
            processing_class=tokenizer,
            alignment_dataset=alignment_rows,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        report, guard = trainer.drift_report(), trainer.align_guard
        now = trainer.model.lm_head.weight.detach()
        frozen = trainer.model.lm_head.original_module.weight
        expected = (now - head).norm() / frozen.norm()
        assert report.uncovered == {"lm_head.weight": pytest.approx(expected.item(), rel=1e-4)} and expected > 0
        with at_reference(trainer.model, guard.layers):
            assert torch.equal(trainer.model.lm_head.weight, head)


def test_budget_and_anchor_resume_bit_identical(tmp_path, tokenizer, train_rows, alignment_rows):
    kwargs = dict(
        collision_rows=8,
        drift_budget=1e-4,
        anchor_coef=0.5,
        anchor_every=2,
        collision_coef=0.1,
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
    )
    whole = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **kwargs)
    whole.train()
    resumed = agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(adapter_of(whole).items(), adapter_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alignment_coef=-1.0), "`alignment_coef` must not be negative"),
        (dict(collision_alpha=1.5), "`collision_alpha` must lie between 0 and 1"),
        (dict(drift_budget=0.0), "`drift_budget` must be above 0"),
        (dict(task_metric="euclid"), "`task_metric` must be one of"),
        (dict(anchor_every=0), "`anchor_every` must be at least 1"),
    ],
)
def test_bad_values_get_one_sentence(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AGLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **change)


def test_anchor_without_rows_is_refused(tmp_path, tokenizer, train_rows, alignment_rows):
    estimate_fisher(tiny_model(), alignment_rows, tokenizer, progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`anchor_coef` needs rows to anchor on"):
        agl_trainer(tmp_path, tokenizer, train_rows, None, anchor_coef=1.0, fisher_path=str(tmp_path))
