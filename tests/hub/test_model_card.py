"""Model cards: what they say, what they never say, and that saying it again changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from agl_trl.drift.report import DriftReport
from agl_trl.fisher.statistics import FisherStatistics
from agl_trl.hub.card_metadata import one_line
from agl_trl.hub.model_card import BEGIN, END, attach_card, declared_license, write_card, write_statistics_card
from tests.helpers.models import tiny_model
from tests.helpers.render_sample_card import SAMPLE, TRL_CARD, held_report, made_up_behaviour, made_up_report
from tests.helpers.render_sample_card import render as render_sample


ROOT = Path(__file__).parents[2]
HOSTILE = "a|b\n---\n<script>x</script> [l](http://x) `c` *d* _e_ " + END
FOREIGN = """---
# chosen by hand
license: mit
language: no
tags:
- b
- a
model-index:
- name: theirs
  results:
  - task:
      type: text-generation
    dataset:
      type: org/set
      name: Set
    metrics:
    - type: accuracy
      value: 0.5
- name: another
  results: []
---

# My adapter

Text of mine,  with two spaces.\x20\x20
"""


def written(folder: Path, text: str = TRL_CARD, **kwargs) -> tuple[ModelCard, str]:
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    write_card(path, **({"name": "n", "report": made_up_report(made_up_behaviour())} | kwargs))
    return ModelCard.load(path), path.read_text(encoding="utf-8")


def attached(folder: Path, text: str | None, **kwargs) -> tuple[ModelCard, str]:
    """A card after two calls, of which the second changed nothing."""
    path, report = folder / "README.md", made_up_report(made_up_behaviour())
    del report.metadata["coefficients"]
    if text is not None:
        path.write_bytes(text.encode())
    kwargs = {"name": "n", "report": report} | kwargs
    attach_card(path, **kwargs)
    once = path.read_bytes()
    attach_card(path, **kwargs)
    assert path.read_bytes() == once
    return ModelCard.load(path), once.decode()


def peft_stub(folder: Path) -> str:
    """The card that PEFT saves beside an adapter, of a base model in a local folder."""
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "stub")
    return (folder / "stub" / "README.md").read_text(encoding="utf-8")


def values(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results}


def test_committed_sample_is_what_is_rendered_under_every_hash_seed():
    assert SAMPLE.read_text(encoding="utf-8") == render_sample()
    code = (
        "import sys; from tests.helpers.render_sample_card import render; sys.stdout.buffer.write(render().encode())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    assert done.stdout == SAMPLE.read_bytes()


def test_adapter_card_says_what_was_measured(tmp_path):
    _, text = written(tmp_path, repo_id="user/adapter")
    assert "| unsafe: refused | 40 | 95.0 % (83.5 to 98.6 %) | 90.0 % (76.9 to 96.0 %) | 0.5 | 0.031 nats |" in text
    assert "| safe: refused (lower is better) | 20 | 5.0 % (0.9 to 23.6 %) |" in text
    assert "4.883e-04" in text and "with a budget of 0.001" in text and "λ_A = 0.1" in text
    assert text.index("<details>") < text.index("| unsafe | fraud | 25 |") < text.index("</details>")
    assert "driftcaps (cc-by-4.0), n = 60, SHA-256 `0123456789abcdef`" in text and "refusal-strings 1" in text
    assert "Uncertain verdicts: 5.0 % of the base model's answers, 10.0 % of this adapter's; among them" in text
    assert "which count as no refusal: 0.0 % and 5.0 %." in text
    assert "![Drift of this adapter](agl/drift.png)" in text and "disable_adapter()" in text
    assert text.count('"user/adapter"') == 2 and "[org/base-model](https://huggingface.co/org/base-model)" in text
    assert "This model was trained with SFT." in text and "Not measured" in text and text.count("2508.02079}") == 1
    code = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(code) == 2 and all(compile(part, "card", "exec") for part in code)


def test_metadata_survive_the_parser_of_the_hub(tmp_path):
    card, _ = written(tmp_path)
    data = card.data
    assert isinstance(data, ModelCardData) and (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert (data.base_model, data["base_model_relation"], data.datasets) == (
        "org/base-model",
        "adapter",
        "org/train-set",
    )
    expected = {"alignguard-lora", "base_model:adapter:org/base-model", "generated_from_trainer", "lora", "sft"}
    assert data.tags == sorted(expected | {"transformers", "trl"})
    assert "licence" not in data and data.license is None and "model_name" not in data.to_dict()
    assert values(card) == {
        "Mean relative drift of the weights": 0.0004883,
        "Refusal rate on unsafe prompts, base model": 0.95,
        "Refusal rate on unsafe prompts, this adapter": 0.9,
        "Over-refusal rate on safe prompts, base model": 0.05,
        "Over-refusal rate on safe prompts, this adapter": 0.05,
        "KL to the base model, nats per token": 0.0625,
    }
    assert {r.dataset_type for r in data.eval_results} == {"fisher-statistics", "agl_trl/driftcaps"}
    again = ModelCard(str(card))
    assert again.data.eval_results == data.eval_results and again.data.to_dict() == data.to_dict()


@pytest.mark.parametrize("measured", [True, False])
def test_same_bytes_when_written_again(measured, tmp_path):
    report = made_up_report(made_up_behaviour() if measured else None)
    _, once = written(tmp_path, report=report)
    _, twice = written(tmp_path, once, report=report)
    assert once == twice
    assert ("agl-trl attach" in once) == (not measured)


def test_licence_is_kept_and_never_invented(tmp_path):
    card, _ = written(tmp_path, TRL_CARD.replace("licence: license", "license: apache-2.0"))
    assert card.data.license == "apache-2.0"
    assert declared_license(tmp_path / "README.md") == "apache-2.0"
    assert written(tmp_path, license="mit")[0].data.license == "mit"
    card, text = written(tmp_path, TRL_CARD.replace("licence: license", "license: license"))
    assert declared_license(tmp_path / "README.md") is declared_license(tmp_path / "none.md") is None
    assert written(tmp_path, TRL_CARD.replace("org/train-set", "miniworld"))[0].data.datasets is None
    assert card.data.license is None and "licence" not in text.split("---")[1]


def test_no_path_of_a_machine(tmp_path):
    behaviour = made_up_behaviour()
    behaviour.metadata |= {"judge": {"name": "/srv/judge", "version": "1"}, "prompts": {"name": "C:\\data\\own.jsonl"}}
    report = made_up_report(behaviour, base_model=str(tmp_path))
    paths = TRL_CARD.replace("org/base-model", str(tmp_path)).replace("org/train-set", str(tmp_path))
    card, text = written(tmp_path, paths, report=report, name=str(tmp_path / "run"))
    assert str(tmp_path) not in text and "/srv" not in text and "C:" not in text
    assert card.data.base_model is None and "base_model_relation" not in card.data and card.data.datasets is None
    assert "not on the Hub" in text and "# run\n" in text and "own.jsonl" in text


def test_unpublished_statistics_and_continued_adapters_are_said(tmp_path):
    assert "`agl/fisher.safetensors`" in written(tmp_path)[1]
    report = made_up_report(made_up_behaviour())
    report.metadata["continued"] = True
    card, text = written(tmp_path, report=report, statistics_published=False)
    assert "`agl/fisher.safetensors`" not in text and "kept private" in text
    assert "| start of this training |" in text and "KL to the start of this training, nats per token" in values(card)


def test_what_was_held_is_said_and_what_was_not_measured_too(tmp_path):
    card, text = written(tmp_path, report=held_report())
    assert "| alignment | 128 | 1.95e-02 | 2.50e-02 | 0.02 |" in text and "| text | 64 | 4.00e-03 |" in text
    assert "| alignment, to refuse | | 2.10e-02 |" in text and "shrunk to 0.900 of itself" in text
    assert "KL budget 0.02 nats per answer token on protected rows" in text
    found = {r.dataset_config: r.metric_value for r in card.data.eval_results if r.dataset_type == "protected-rows"}
    assert found == {"alignment": 0.0195, "text": 0.004}
    report = held_report()
    report.metadata["protected"]["behaviours"]["text"]["kl"] = 0.011
    assert "**not held**" in written(tmp_path, report=report)[1]
    report.metadata["protected"]["behaviours"] = {"alignment": {"budget": None}}
    report.metadata["protected"]["scale"] = None
    card, text = written(tmp_path, report=report)
    assert "| alignment | – | – | – | none |" in text and "A dash: not measured" in text
    assert "protected-rows" not in {r.dataset_type for r in card.data.eval_results}
    del report.metadata["protected"]  # of statistics without reference answers
    report.metadata["coefficients"]["drift_budget"] = 0.004
    text = written(tmp_path, report=report)[1]
    assert "**not measured**" in text and "a limit on the relative drift of 4.00e-03" in text


def test_a_picture_that_there_is_not_is_not_shown(tmp_path, monkeypatch):
    """A trainer draws it after its card, and not without matplotlib; beside any other card it is there or not."""
    shown = "![Drift of this adapter](agl/drift.png)"
    (tmp_path / "agl").mkdir()
    assert shown in written(tmp_path)[1] and shown not in attached(tmp_path, None)[1]
    (tmp_path / "agl" / "drift.png").write_bytes(b"")
    assert shown in attached(tmp_path, None)[1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert shown not in written(tmp_path)[1]


def test_private_reference_answers_are_said(tmp_path):
    assert "`agl/reference_answers.safetensors`" in written(tmp_path, report=held_report())[1]
    text = written(tmp_path, report=held_report(), references_published=False)[1]
    assert "`agl/reference_answers.safetensors`" not in text and "The reference answers are kept private" in text
    assert "reference answers" not in written(tmp_path)[1], "there were none"


def test_names_of_others_break_nothing(tmp_path):
    behaviour = made_up_behaviour()
    behaviour.categories = [HOSTILE] * 25 + ["weapons"] * 35
    behaviour.metadata |= {"prompts": HOSTILE, "judge": {"name": HOSTILE, "version": HOSTILE}}
    report = made_up_report(behaviour)
    card, once = written(tmp_path, report=report, name=f"{HOSTILE}## Training procedure")
    assert "<script>" not in card.text and card.text.count(END) == 1 and "[l](" not in card.text
    (row,) = [line for line in card.text.splitlines() if line.startswith("| unsafe | a")]
    assert row.replace("\\|", "").count("|") == 6
    assert one_line(HOSTILE) in {result.dataset_name for result in card.data.eval_results}
    assert written(tmp_path, once, report=report, name=f"{HOSTILE}## Training procedure")[1] == once
    with pytest.raises(ValueError, match="not the id of a repo"):
        write_card(tmp_path / "README.md", "n", report, repo_id='x")\nimport os')


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_attached_section_leaves_the_card_of_someone_else_alone(newline, tmp_path):
    card, text = attached(tmp_path, FOREIGN.replace("\n", newline), repo_id="user/theirs")
    plain_text = text.replace("\r\n", "\n")
    assert text.count("\n") == text.count(newline)
    head, tail = FOREIGN.split("model-index")[0].replace("- a\n", "- a\n- alignguard-lora\n"), FOREIGN.split("---")[2]
    assert plain_text.startswith(head) and tail.rstrip() in plain_text
    assert card.data["library_name"] == "peft" and card.data.base_model == "org/base-model"
    index = card.data.to_dict()["model-index"]
    assert "another" in plain_text and "accuracy" in plain_text and len(index[0]["results"]) == 3
    section = plain_text.split(BEGIN)[1].split(END)[0]
    assert section.strip().startswith("## Measured drift") and "2508.02079}" in section
    lost = made_up_report(made_up_behaviour(refused_tuned=0))
    _, changed = attached(tmp_path, text + newline + "More of mine." + newline, report=lost)
    assert "0.0 % (0.0 to 8.8 %)" in changed and "90.0 %" not in changed and changed.count(BEGIN) == 1
    assert changed.replace("\r\n", "\n").endswith(END + "\n\nMore of mine.\n")


def test_attached_to_a_card_of_ours_replaces_its_evidence(tmp_path):
    _, text = written(tmp_path, report=made_up_report())
    _, changed = attached(tmp_path, text, name="n", report=made_up_report(made_up_behaviour()))
    assert changed.count("## Measured drift") == changed.count("2508.02079}") == 1
    assert "## Training procedure" in changed and "unsafe: refused" in changed and "was not measured" not in changed


def test_no_card_and_the_stub_of_peft_become_full_ones(tmp_path):
    stub = peft_stub(tmp_path)
    assert str(tmp_path) in stub and "[More Information Needed]" in stub
    texts = set()
    for existing in (None, stub):
        folder = tmp_path / str(existing is None)
        folder.mkdir()
        card, text = attached(folder, existing, name="mine", repo_id="user/mine")
        assert "# mine\n" in text and "not trained with it" in text and "More Information" not in text
        assert str(tmp_path) not in text and "## Training procedure" not in text
        assert card.data.base_model == "org/base-model" and card.data["base_model_relation"] == "adapter"
        assert card.data.tags == ["alignguard-lora", "base_model:adapter:org/base-model", "lora", "transformers"]
        texts.add(card.text)
    assert len(texts) == 1
    _, text = attached(tmp_path, None, report=made_up_report(), base_model="org/other")
    assert "not trained with it" not in text and "[org/other]" in text
    for unnamed in ("miniworld", str(tmp_path), "no id"):
        assert "[org/base-model]" in attached(tmp_path, None, base_model=unnamed)[1]
    filled = stub.replace("### Direct Use", "### Direct Use\n\nFor letters.")
    _, text = attached(tmp_path, filled)
    assert "For letters." in text and f"\n{BEGIN}\n## Measured drift" in text


@pytest.mark.parametrize(
    "broken", ["---\na: [\n---\n", "---\n- a\n---\n", "---\na: b: c\n---\n", f"x\n{BEGIN}\n", b"\xff"]
)
def test_broken_cards_are_refused_in_one_sentence_and_left_as_they_are(broken, tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="README.md") as failure:
        attach_card(path, "n", made_up_report())
    assert "\n" not in str(failure.value) and str(failure.value).endswith(".") and path.read_bytes() == before


def test_cards_of_the_demo(demo_folder, tmp_path):
    path = demo_folder / "README.md"
    before, report = path.read_bytes(), DriftReport.from_pretrained(demo_folder)
    write_card(path, "miniworld-agl", report)
    assert path.read_bytes() == before
    card = ModelCard.load(path)
    assert str(ROOT) not in str(card) and str(demo_folder) not in str(card) and "None" not in str(card)
    assert {r.dataset_type for r in card.data.eval_results} == {
        "fisher-statistics",
        "protected-rows",
        "agl_trl/miniworld",
    }
    rates = values(card)
    for tuned, which in ((False, "base model"), (True, "this adapter")):
        rate = report.behaviour.refusal(tuned).value
        assert rates[f"Refusal rate on unsafe prompts, {which}"] == pytest.approx(rate, abs=1e-4)

    statistics = FisherStatistics.from_pretrained(demo_folder)
    path = tmp_path / "README.md"
    for _ in range(2):
        write_statistics_card(path, "Statistics", statistics, repo_id="user/statistics")
        card = ModelCard.load(path)
        assert card.data.tags == ["alignguard-lora", "fisher-information"] and card.data.base_model is None
        assert f"| tokens | {statistics.num_tokens} |" in card.text and "| dataset | not recorded |" in card.text
        assert statistics.metadata["dataset_fingerprint"] in card.text and 'fisher_path="user/statistics"' in card.text
        (code,) = [part.split("```")[0] for part in card.text.split("```python\n")[1:]]
        assert compile(code, "card", "exec")
    once = path.read_bytes()
    statistics.metadata |= {"dataset": "org/rows"}
    statistics.metadata["base_model"] |= {"name": "org/base", "revision": "abc"}
    path.write_bytes(once.replace(b"---\n", b"---\nlicense: mit\n", 1))
    write_statistics_card(path, "Statistics", statistics)
    card = ModelCard.load(path)
    assert "Left out" not in card.text
    assert (card.data.license, card.data.base_model) == ("mit", "org/base")
    assert "| dataset | org/rows |" in card.text and "| its revision | `abc` |" in card.text


def test_a_report_that_counts_no_verdicts_says_nothing_of_them(tmp_path):
    behaviour = made_up_behaviour()
    del behaviour.metadata["verdicts"]  # as in reports of older versions
    assert "Uncertain" not in written(tmp_path, report=made_up_report(behaviour))[1]


def test_layers_that_the_statistics_leave_out_are_in_their_card(demo_folder, tmp_path):
    statistics, path = FisherStatistics.from_pretrained(demo_folder), tmp_path / "README.md"
    statistics.metadata["skipped_layers"] = [f"model.tower_a|b.{i}" for i in range(9)]
    write_statistics_card(path, "Statistics", statistics)
    text = path.read_text(encoding="utf-8")
    shown = ", ".join(rf"model.tower_a\|b.{i}" for i in range(8))
    assert f"they do not see every token of a text: 9 layers ({shown}, …)." in text
