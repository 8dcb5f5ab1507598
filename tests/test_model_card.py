"""Model cards: what they say, that they say nothing made up, and the same bytes every time."""

import os
import subprocess
import sys
from importlib.resources import files

import pytest
from huggingface_hub import ModelCard

from agl_trl import FisherStatistics
from agl_trl.model_card import BEGIN, END, attach_card, declared_license, write_card, write_statistics_card

from .sample_report import SAMPLE, sample_report, write_sample


TRL_CARD = """---
base_model: alice/aligned-0.6b
library_name: transformers
model_name: run
tags:
- trl
- sft
- generated_from_trainer
licence: license
datasets: {datasets}
---

# Model Card for run

This model is a fine-tuned version of [None](https://huggingface.co/None).

## Training procedure

This model was trained with AGLSFT.

## Citations

Cite TRL.
"""


@pytest.fixture
def trl_card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TRL_CARD.format(datasets="trl-lib/Capybara"))
    return path


def test_adapter_card_says_what_was_measured(trl_card):
    write_card(trl_card, "run", sample_report(), repo_id="alice/run")
    card = ModelCard.load(trl_card)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "alice/aligned-0.6b" and card.data["base_model_relation"] == "adapter"
    assert card.data.tags == sorted(card.data.tags)
    assert {"alignguard-lora", "lora", "trl", "sft", "base_model:adapter:alice/aligned-0.6b"} <= set(card.data.tags)
    assert card.data.datasets == ["trl-lib/Capybara"]
    assert card.data.license is None and "licence" not in card.data.to_dict()
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["refusal_rate"] == 0.95 and results["refusal_rate_base"] == 1.0
    assert results["over_refusal"] == 0.05 and results["relative_drift"] == 0.003
    assert {result.dataset_name for result in card.data.eval_results} == {"driftcaps"}
    text = card.text
    assert "| unsafe: refused | 40 | 100.0 % | 95.0 % | 83.5 % to 98.6 % | 0.5 | 0.033 nats |" in text
    assert "| fraud | 20 | 100.0 % | 90.0 % | 69.9 % to 97.2 % |" in text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "alice/run")' in text
    for needed in (
        *(
            "disable_adapter()",
            "agl/drift.png",
            "refusal-strings 2",
            "0123456789ab…",
            "drift budget 0.003",
            "Not measured",
        ),
        *("2508.02079", "## Training procedure", "Cite TRL"),
    ):
        assert needed in text, needed


def test_same_bytes_when_repeated_and_under_another_hash_seed(trl_card, tmp_path):
    write_card(trl_card, "run", sample_report(), repo_id="alice/run")
    once = trl_card.read_bytes()
    write_card(trl_card, "run", sample_report(), repo_id="alice/run")
    assert trl_card.read_bytes() == once
    script = (
        "from pathlib import Path; from tests.sample_report import sample_report; from agl_trl.model_card import write_card;"
        f"p = Path({str(tmp_path / 'other.md')!r}); p.write_text({TRL_CARD.format(datasets='trl-lib/Capybara')!r});"
        "write_card(p, 'run', sample_report(), repo_id='alice/run')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert (tmp_path / "other.md").read_bytes() == once


def test_local_paths_and_made_up_licences_never_show(trl_card, tmp_path):
    local = tmp_path / "data.jsonl"
    local.write_text("{}")
    trl_card.write_text(TRL_CARD.format(datasets=f"[{local}, miniworld]"))
    report = sample_report(name=None)
    report.behaviour = None
    write_card(trl_card, "run", report, statistics_published=False)
    text = trl_card.read_text()
    assert str(tmp_path) not in text and "datasets:" not in text and ModelCard.load(trl_card).data.base_model is None
    assert "a base model that is not on the Hub" in text and "license" not in text.split("---")[1]
    assert "kept private by the owner" in text and "fisher.safetensors" not in text
    assert "was not measured for this report" in text
    attach_card(trl_card, "run", sample_report(name=None), base_model=str(tmp_path))
    assert str(tmp_path) not in trl_card.read_text()


def test_a_declared_licence_is_kept(trl_card):
    assert declared_license(trl_card) is None
    trl_card.write_text(trl_card.read_text().replace("licence: license", "license: apache-2.0"))
    assert declared_license(trl_card) == "apache-2.0"
    write_card(trl_card, "run", sample_report(), license="mit")
    assert ModelCard.load(trl_card).data.license == "mit"


def test_names_of_others_are_text_and_not_markup(trl_card):
    report = sample_report(categories=("a|b\n| c", "<img src=x onerror=alert(1)>", "safe"))
    report.behaviour.metadata["prompts"]["name"] = "x\n---\ninject: true"
    write_card(trl_card, "<script>", report)
    card = ModelCard.load(trl_card)
    assert "<img" not in card.text and "<script>" not in card.text and "| a&#124;b &#124; c | 20 |" in card.text
    assert "inject" not in card.data.to_dict()


def test_report_is_attached_to_a_card_of_someone_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\nlibrary_name: peft\n---\n\n# Mine\n\nHello.\n\n## More\n")
    attach_card(path, "mine", sample_report(), repo_id="bob/mine")
    card = ModelCard.load(path)
    assert card.data.license == "mit" and {"mine", "alignguard-lora"} <= set(card.data.tags)
    assert card.text.strip().startswith("# Mine\n\nHello.\n\n## More") and card.text.count(BEGIN) == 1
    once = path.read_bytes()
    attach_card(path, "mine", sample_report(), repo_id="bob/mine")
    assert path.read_bytes() == once
    path.write_text(path.read_text() + "\nA last word.\n")
    attach_card(path, "mine", sample_report(), repo_id="bob/mine")
    assert path.read_text().rstrip().endswith("A last word.") and path.read_text().count(END) == 1
    path.write_text("---\nlicense: [\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        attach_card(path, "mine", sample_report())


@pytest.mark.parametrize(
    "stub", [None, "---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n[More Information Needed]\n"]
)
def test_a_missing_card_or_a_stub_becomes_a_whole_one(stub, tmp_path):
    path = tmp_path / "README.md"
    if stub is not None:
        path.write_text(stub)
    report = sample_report()
    del report.metadata["coefficients"]
    attach_card(path, "mine", report, base_model="bob/base")
    text = path.read_text()
    assert "It was trained elsewhere" in text and "Information Needed" not in text
    assert ModelCard.load(path).data.base_model == "bob/base"
    once = path.read_bytes()
    attach_card(path, "mine", report, base_model="bob/base")
    assert path.read_bytes() == once


def test_statistics_card(tmp_path, demo_folder):
    path = tmp_path / "README.md"
    statistics = FisherStatistics.from_pretrained(demo_folder)
    statistics.metadata["dataset"] = "alice/refusals"
    write_statistics_card(path, "statistics", statistics, repo_id="alice/model-agl-fisher")
    card = ModelCard.load(path)
    assert card.data.tags == ["alignguard-lora", "fisher-information"] and card.data.base_model is None
    assert 'fisher_path="alice/model-agl-fisher"' in card.text and "rows of alice/refusals" in card.text
    assert f"{statistics.num_tokens} tokens" in card.text


def test_the_committed_sample_is_what_is_rendered(tmp_path):
    write_sample(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == SAMPLE.read_text(), "run `python -m tests.sample_report`"


def test_templates_are_in_the_package():
    for name in ("adapter.md.jinja", "evidence.md.jinja", "fisher.md.jinja"):
        assert files("agl_trl.model_cards").joinpath(name).is_file()
