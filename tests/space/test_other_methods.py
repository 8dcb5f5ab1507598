"""Adapters of other methods in the app: they answer as they should, and the drift map says what was not measured."""

import json

import pytest
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from agl_trl import DriftReport, FisherStatistics
from agl_trl.artifacts.files import ADAPTER_FILE, sha256
from agl_trl.miniworld import load_model, load_tokenizer
from agl_trl.modeling.generation import generate_answers
from agl_trl.space.drift_map import summary
from agl_trl.space.models import EMBEDDED, Models
from agl_trl.space.questions import Decoding
from agl_trl.space.tabs import map_html
from tests.helpers.models import moved_by


def loaded(folder, config):
    tuned = moved_by(load_model(), config, 0.3)
    tuned.save_pretrained(folder)
    return tuned, Models().get(EMBEDDED, str(folder))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        LoHaConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_streamed_answers_are_the_generated_ones(config, tmp_path):
    tuned, model = loaded(tmp_path, config)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    expected = generate_answers(tuned, load_tokenizer(), [question], max_new_tokens=12, progress=False)
    with tuned.disable_adapter():
        expected += generate_answers(tuned, load_tokenizer(), [question], max_new_tokens=12, progress=False)
    base, side = model.sides
    for _ in range(2):  # sides are switched back and forth
        for one, text in ((side, expected[0]), (base, expected[1])):
            *_, (answer, _) = model.stream(one, question[0]["content"], Decoding(length=12))
            assert answer.strip() == text and model.answer_all(one, [question], 12) == [text]
    assert expected[0] != expected[1]


def test_drift_map_of_an_adapter_without_weights_says_why(tmp_path):
    tuned, model = loaded(tmp_path, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    report = DriftReport.measure(tuned, None)
    report.adapter_sha256 = sha256(tmp_path / ADAPTER_FILE)
    report.save_pretrained(tmp_path)
    page = map_html(model, "Relative drift")
    assert "The drift of the weights was not measured: this adapter, of type PROMPT_TUNING" in page
    assert "mean relative drift" not in page and "nan" not in page and "by layer" not in page
    (found,) = summary(model)
    assert (
        found["mean_relative_drift"] is None and found["layers"] == [] and "PROMPT_TUNING" in found["without_weights"]
    )
    json.dumps(found, allow_nan=False)


def test_drift_map_of_another_method_shows_its_layers(demo_folder, tmp_path):
    tuned, model = loaded(tmp_path, LoHaConfig(r=2, target_modules=["q_proj"]))
    report = DriftReport.measure(tuned, FisherStatistics.from_pretrained(demo_folder))
    report.adapter_sha256 = sha256(tmp_path / ADAPTER_FILE)
    report.save_pretrained(tmp_path)
    assert "Relative drift by layer" in map_html(model, "Relative drift")
    (found,) = summary(model)
    assert (
        found["mean_relative_drift"] == pytest.approx(report.mean_relative_drift) and found["without_weights"] is None
    )
