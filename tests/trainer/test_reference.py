"""What a run is held to: behaviours by name, published answers, and what there is where nothing can be measured."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from agl_trl import AlignGuardCallback, AlignGuardConfig, DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import sha256
from agl_trl.data.alignment import tokenize_rows
from agl_trl.fisher.calibration import drift_at
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.modeling.lora import at_reference
from agl_trl.trainer.config import DEFAULT_DRIFT_BUDGET
from tests.helpers.models import SMALL, chat_rows, preference_rows
from tests.helpers.training import COMMON, agl_trainer, telling_model


ANSWERS = "agl/reference_answers.safetensors"
FAST = dict(learning_rate=3e-2, max_steps=8)


def ended(folder, tokenizer, train_rows, alignment_rows, **options):
    trainer = agl_trainer(folder, tokenizer, train_rows, alignment_rows, telling_model(), **FAST | options)
    trainer.train()
    return trainer


def test_behaviours_have_budgets_and_log_lines_of_their_own(tmp_path, tokenizer, opposite_rows, alignment_rows):
    """General text counts as a whole; a chat without answers is answered by the model itself."""
    night = "It was a dark and stormy night number {}, and the rain fell."
    text = [{"text": night.format(i), "unsafe": i == 1} for i in range(5)]  # a mark is for alignment rows
    prompts = [{"prompt": row["prompt"]} for row in chat_rows(3, "tell me", "")]
    trainer = ended(
        tmp_path,
        tokenizer,
        opposite_rows,
        alignment_rows,
        protect={"text": text, "chat": prompts},
        kl_budget=0.05,
        kl_budgets='{"text": 0.003}',
    )
    references, protection = trainer.align_guard.references, trainer.align_guard.protection
    assert protection.budgets == {"alignment": 0.05, "text": 0.003, "chat": 0.05}
    assert [len(references.where(name)) for name in references.behaviours] == [10, 5, 3]
    texts = [references.rows[i] for i in references.where("text")]
    assert [row.answer_start for row in texts] == [1] * 5
    assert tokenizer.decode(texts[2].input_ids) == text[2]["text"] + "</s>"
    own = references.rows[references.where("chat")[0]]
    assert len(own.input_ids) > own.answer_start, "its own answer"
    kl = references.kl(trainer.model)[:, 0]
    means = {name: kl[references.where(name)].mean().item() for name in references.behaviours}
    shares = {name: means[name] / budget for name, budget in protection.budgets.items()}
    assert 0.95 <= max(shares.values()) <= 1
    kept = trainer.drift_report().metadata["protected"]["behaviours"]
    assert {name: kept[name]["kl"] for name in kept} == pytest.approx(means, rel=1e-6)
    assert {name: kept[name]["budget"] for name in kept} == protection.budgets
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for suffix in ("", "_text", "_chat"):
        for term in ("kl", "kl_step", "kl_first_tokens"):
            assert [f"agl/{term}{suffix}" in entry for entry in steps] == [True, False] * 4


def test_all_rows_may_be_kept_where_the_statistics_read_fewer(tmp_path, tokenizer, opposite_rows):
    """The statistics are of the rows that they would be of without the others."""
    rows = chat_rows(20, "please do bad thing", "Sorry, no {}.")
    taken = {}
    for name, kept in (("few", 4), ("many", 12), ("all", None)):
        options = dict(fisher_num_samples=6, num_reference_answers=kept, max_steps=1)
        taken[name] = ended(tmp_path / name, tokenizer, opposite_rows, rows, **options)
    assert {name: len(t.align_guard.references.rows) for name, t in taken.items()} == {"few": 4, "many": 12, "all": 20}
    guard = taken["all"].align_guard
    assert sorted(r.input_ids for r in guard.references.rows) == sorted(
        r.input_ids for r in tokenize_rows(rows, tokenizer)
    )
    seed = taken["all"].args.seed
    six = estimate_fisher(telling_model(), rows, tokenizer, num_samples=6, seed=seed, progress=False)
    assert guard.statistics.num_tokens == six.num_tokens
    for name in six.inputs:
        torch.testing.assert_close(guard.statistics.inputs[name].trace(), six.inputs[name].trace())


CHAT = {"chat": chat_rows(3, "tell me", "well, {}")}


@pytest.mark.parametrize(
    ("protect", "options", "message"),
    [
        ({"alignment": CHAT["chat"]}, {}, r"^`protect` names 'alignment': a name is a word .* `alignment_dataset`\.$"),
        ({"a/b": CHAT["chat"]}, {}, r"^`protect` names 'a/b': a name is a word"),
        (CHAT, dict(drift_budget=1e-3), r"^`protect` holds rows by their KL: set `kl_budget` \(or `anchor_coef`\)\.$"),
        (CHAT, dict(kl_budgets={"chat": 0.0}), r"^`kl_budgets` must be above 0, got 0\.0 for 'chat'\.$"),
        (CHAT, dict(kl_budgets='{"chat": '), r"^`kl_budgets` must be JSON such as '\{\"text\": 0\.01\}', got "),
        (CHAT, dict(kl_budgets='["chat"]'), r"^`kl_budgets` must be JSON such as"),
        (CHAT, dict(kl_budgets={"chat": "much"}), r"^`kl_budgets` must be JSON such as"),
        (CHAT, dict(kl_budgets='{"chat": true}'), r"^`kl_budgets` must be JSON such as"),
        (CHAT, dict(kl_budgets='{"chat": NaN}'), r"^`kl_budgets` must be above 0, got nan for 'chat'\.$"),
        (CHAT, dict(kl_budgets={"chat": 0.1}, drift_budget=1e-3), r"^`kl_budgets` gives single .*: set it too\.$"),
        ({"chat": []}, {}, r"has no row to protect"),
        ({"chat": [{"completion": 3}]}, {}, r"^Row 0 has the columns completion, which make no known format"),
    ],
)
def test_what_cannot_be_protected_is_told_at_once(
    tmp_path, tokenizer, train_rows, alignment_rows, protect, options, message
):
    with pytest.raises(ValueError, match=message) as raised:
        agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, protect=protect, **options)
    assert "\n" not in str(raised.value)


def test_a_budget_for_nothing_is_told_before_rows_are_answered(tmp_path, tokenizer, train_rows, alignment_rows):
    with pytest.raises(ValueError, match=r"^`kl_budgets` names 'text', but what is protected is alignment, chat\.$"):
        agl_trainer(tmp_path, tokenizer, train_rows, alignment_rows, protect=CHAT, kl_budgets={"text": 0.1})


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer, opposite_rows, alignment_rows):
    folder = tmp_path_factory.mktemp("published")
    rows = Dataset.from_list([row | {"unsafe": i < 6} for i, row in enumerate(alignment_rows)])
    ended(folder, tokenizer, opposite_rows, rows, max_steps=1).save_model()
    return folder


def test_published_answers_need_no_rows(tmp_path, tokenizer, opposite_rows, published):
    trainer = ended(tmp_path, tokenizer, opposite_rows, None, fisher_path=str(published), kl_budget=0.01)
    references = trainer.align_guard.references
    assert sorted(references.kinds) == ["alignment/comply"] * 4 + ["alignment/refuse"] * 6
    assert 0.95 * 0.01 <= references.kl(trainer.model)[:, 0].mean().item() <= 0.01
    assert trainer.align_guard.regularizer.budget is None, "no drift budget beside it"
    trainer.save_model()
    assert sha256(tmp_path / ANSWERS) == sha256(published / ANSWERS)
    by_file = agl_trainer(
        tmp_path / "file",
        tokenizer,
        opposite_rows,
        None,
        telling_model(),
        fisher_path=str(published / "agl" / "fisher.safetensors"),
    )
    assert by_file.align_guard.references.kinds == references.kinds


def test_published_answers_are_held_beside_own_behaviours(tmp_path, tokenizer, opposite_rows, published):
    options = dict(fisher_path=str(published), kl_budget=0.01, protect=CHAT)
    trainer = ended(tmp_path, tokenizer, opposite_rows, None, **options)
    references = trainer.align_guard.references
    assert references.behaviours == ["alignment", "chat"] and len(references.rows) == 13
    kl = references.kl(trainer.model)[:, 0]
    assert max(kl[references.where(name)].mean().item() for name in references.behaviours) <= 0.01
    trainer.save_model()
    again = dict(fisher_path=str(tmp_path), kl_budget=0.01, protect={"chat": chat_rows(2, "say", "oh, {}")})
    replaced = ended(tmp_path / "again", tokenizer, opposite_rows, None, **again).align_guard.references
    assert replaced.behaviours == ["alignment", "chat"] and len(replaced.where("chat")) == 2


def coarse_model():
    """The model of the published answers with its weights in few steps, as a quantised one."""
    model = telling_model()
    with torch.no_grad():
        for parameter in model.parameters():
            step = parameter.abs().max() / 12
            parameter.copy_((parameter / step).round() * step)
    return model


def test_published_answers_of_another_precision_are_measured_again(
    tmp_path, tokenizer, opposite_rows, published, caplog
):
    """Else the budget is spent before any training, and the region closes over what costs nothing."""
    there = ReferenceAnswers.from_pretrained(published)
    with torch.no_grad():
        floor = there.kl(coarse_model().eval())[:, 0].mean().item()
    budget = floor / 3
    options = dict(fisher_path=str(published), kl_budget=budget, anchor_every=1, **FAST)
    trainer = agl_trainer(tmp_path, tokenizer, opposite_rows, None, coarse_model(), **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.message for record in caplog.records if "its own probabilities for the same rows" in record.message]
    assert len(told) == 1 and "\n" not in told[0] and "by 300% of the KL budget of 'alignment'" in told[0]
    references = trainer.align_guard.references
    assert references.rows == there.rows and references.kinds == there.kinds
    assert all(map(torch.equal, references.tokens, there.tokens))
    with at_reference(trainer.model, trainer.align_guard.layers), torch.no_grad():
        assert references.kl(trainer.model).abs().max() < 1e-5
    limits = [e["agl/drift_limit"] for e in trainer.state.log_history if "agl/drift_limit" in e]
    assert limits[-1] > 0.1 * limits[0] and trainer.drift_report().mean_relative_drift > 0.1 * limits[0]
    assert 0 < trainer.align_guard.protection.measured["alignment"]["kl"] <= budget
    near = agl_trainer(
        tmp_path / "near", tokenizer, opposite_rows, None, coarse_model(), **options | dict(kl_budget=11 * floor)
    )
    near.train()
    assert all(map(torch.equal, near.align_guard.references.log_probs, there.log_probs))
    assert sum("its own probabilities" in record.message for record in caplog.records) == 1


def without_answers(published, folder):
    shutil.copytree(published / "agl", folder / "agl", ignore=shutil.ignore_patterns("reference_answers*"))
    return folder


def test_without_published_answers_the_curve_translates(tmp_path, tokenizer, opposite_rows, published, caplog):
    bare = without_answers(published, tmp_path / "bare")
    with caplog.at_level(logging.WARNING):
        trainer = ended(tmp_path / "run", tokenizer, opposite_rows, None, fisher_path=str(bare), kl_budget=0.01)
    drift, _ = drift_at(FisherStatistics.from_pretrained(bare), 0.01)
    assert "No reference answers:" in caplog.text and f"a relative drift of {drift:.2g} is held in its place" in (
        caplog.text
    )
    assert trainer.align_guard.references is None
    assert 0.5 * drift < trainer.drift_report().mean_relative_drift <= drift * (1 + 1e-4)


def test_own_behaviours_do_not_stand_in_for_the_alignment_rows(tmp_path, tokenizer, opposite_rows, published, caplog):
    bare = without_answers(published, tmp_path / "bare")
    options = dict(fisher_path=str(bare), kl_budget=0.01, protect=CHAT)
    with caplog.at_level(logging.WARNING):
        trainer = ended(tmp_path / "run", tokenizer, opposite_rows, None, **options)
    assert "is held in its place" in caplog.text
    drift, _ = drift_at(trainer.statistics, 0.01)
    assert trainer.drift_report().mean_relative_drift <= drift * (1 + 1e-4)
    assert trainer.align_guard.references.behaviours == ["chat"]
    assert trainer.align_guard.references.kl(trainer.model)[:, 0].mean().item() <= 0.01


def test_without_a_curve_a_drift_is_held_and_the_doubt_told(tmp_path, tokenizer, opposite_rows, published, caplog):
    bare = without_answers(published, tmp_path / "bare")
    statistics = FisherStatistics.from_pretrained(bare)
    del statistics.metadata["kl_curve"]
    statistics.save_pretrained(bare)
    with caplog.at_level(logging.WARNING):
        trainer = ended(tmp_path / "run", tokenizer, opposite_rows, None, fisher_path=str(bare), kl_budget=0.01)
    assert f"carry no curve: a relative drift of {DEFAULT_DRIFT_BUDGET} is held" in caplog.text
    assert 0 < trainer.drift_report().mean_relative_drift <= DEFAULT_DRIFT_BUDGET * (1 + 1e-4)


def test_a_model_without_answers_holds_a_drift(tmp_path, tokenizer, alignment_rows, caplog):
    """A reward model predicts no tokens."""

    def trainer(guard):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=260, pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1, **SMALL)
        return RewardTrainer(
            LlamaForSequenceClassification(config),
            args=RewardConfig(str(tmp_path), **COMMON | FAST),
            train_dataset=Dataset.from_list(preference_rows(16, "say", "the number is {}", "no idea {}")),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
            callbacks=[guard],
        )

    guard = AlignGuardCallback(AlignGuardConfig(kl_budget=0.01), alignment_dataset=alignment_rows)
    with caplog.at_level(logging.WARNING):
        trainer(guard).train()
    assert f"a relative drift of {DEFAULT_DRIFT_BUDGET} is held" in caplog.text and guard.references is None
    report = DriftReport.from_pretrained(tmp_path)
    assert 0 < report.mean_relative_drift <= DEFAULT_DRIFT_BUDGET * (1 + 1e-4) and report.budget_multiplier > 0
    assert "protected" not in report.metadata
    both = AlignGuardCallback(AlignGuardConfig(kl_budget=0.01), alignment_dataset=alignment_rows, protect=CHAT)
    with pytest.raises(ValueError, match="`protect` compares next tokens, but this model predicts none: leave it out"):
        trainer(both)
