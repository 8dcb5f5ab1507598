"""Other models than the app's own: from the Hub, from this machine, broken, private, too large."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model

from agl_trl.artifacts.files import ADAPTER_FILE
from agl_trl.data.prompts import spread
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.modeling.loading import load_adapter, load_model
from agl_trl.space.driftcaps_run import prompt_set, run
from agl_trl.space.models import ADAPTERS, EMBEDDED, Models
from agl_trl.space.questions import Decoding
from agl_trl.space.side_by_side import EXAMPLES, answers
from agl_trl.space.tabs import map_html
from tests.helpers.models import scripted_model, thinking_tokenizer


UNSAFE = EXAMPLES[0][1]


def put(folder: Path, repo: str, private: bool = False) -> None:
    HfApi().create_repo(repo, private=private)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)


def test_adapter_from_the_hub_has_two_panes(hub, online):
    put(ADAPTERS / "agl", "alice/adapter")
    models = Models(hosted=True)
    *_, panes = answers(models, UNSAFE, 0.0, 0, 48, "", "alice/adapter")
    assert [pane.verdict.label for pane in panes] == ["refusal", "refusal"] and panes[1].side.detail == "alice/adapter"
    assert "<h4>Relative drift by layer" in map_html(models.get("", "alice/adapter"), "Relative drift")
    *_, own = answers(models, UNSAFE, 0.0, 0, 48, "", "")
    assert len(own) == 3
    assert Models(EMBEDDED, "alice/adapter").own.sides[1].detail == "alice/adapter"


def test_of_a_prompt_only_the_last_logits_are_made():
    model, made = Models().own, []
    head = model._model.get_output_embeddings()
    with head.register_forward_hook(lambda *args: made.append(args[-1].shape[:2].numel())):
        written = [*model.stream(model.sides[0], UNSAFE, Decoding(0.0, 0, 4))]
    assert len(written) == 4 and made == [1] * 4


def test_adapter_that_was_trained_with_other_words_is_told(hub, online, tmp_path):
    shutil.copytree(ADAPTERS / "agl", tmp_path / "adapter")
    put(tmp_path / "adapter", "alice/same")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    put(tmp_path / "adapter", "alice/other")
    models = Models(hosted=True)
    assert models.get(EMBEDDED, "alice/same").sides[1].detail == "alice/same"
    assert models.get(EMBEDDED, "alice/other").sides[1].detail == "alice/other, asked with the base model's tokenizer"


def test_visitors_do_not_read_what_only_the_owner_may(hub, online):
    put(ADAPTERS / "agl", "alice/secret", private=True)
    with pytest.raises(ValueError, match="Can't read 'alice/secret'"):
        Models(hosted=True).get(EMBEDDED, "alice/secret")
    assert (
        Models(EMBEDDED, "alice/secret", hosted=True).own.sides[1].detail == "alice/secret"
    )  # the owner's own choice


def test_broken_adapters_get_a_sentence(hub, online, tmp_path):
    shutil.copytree(ADAPTERS / "agl", tmp_path / "cut")
    file = tmp_path / "cut" / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:1000])
    put(tmp_path / "cut", "alice/cut")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    put(tmp_path / "empty", "alice/empty")
    for repo in ("alice/cut", "alice/empty"):
        with pytest.raises(ValueError) as error:
            Models(hosted=True).get(EMBEDDED, repo)
        assert repo in str(error.value) and str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_giants_are_refused_before_they_are_loaded(hub, online, monkeypatch):
    put(ADAPTERS / "agl", "alice/adapter")
    monkeypatch.setattr("agl_trl.space.models.LARGEST_ADAPTER", 1e5)
    with pytest.raises(ValueError, match="more than this Space loads"):
        Models(hosted=True).get(EMBEDDED, "alice/adapter")


def test_local_folder_with_the_name_of_a_repo_is_not_read(models, tmp_path, monkeypatch):
    shutil.copytree(ADAPTERS / "agl", tmp_path / "alice" / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not name a repo"):
        models.get(EMBEDDED, "alice/adapter")
    own = Models()
    named = own.get(EMBEDDED, "alice/adapter")  # on a machine of one's own it is
    assert len(named.sides) == 2 and own.get(EMBEDDED, " alice/adapter") is named  # and stays loaded
    shutil.copytree(ADAPTERS / "plain", tmp_path / "alice" / "other")
    with pytest.raises(ValueError):
        own.get(EMBEDDED, "alice/none/such")
    assert own.get(EMBEDDED, "alice/adapter") is named
    own.get(EMBEDDED, "alice/other")
    assert own.get(EMBEDDED, "alice/adapter") is not named  # until the next one is
    assert own.get() is own.own


def test_a_batch_and_a_stream_say_the_same(models):
    model, prompt = models.own, [{"role": "user", "content": UNSAFE}]
    for side in (*model.sides, *reversed(model.sides)):  # each after each other
        *_, (text, _) = model.stream(side, UNSAFE, Decoding(length=24))
        assert model.answer_all(side, [prompt], 24) == [text.strip()]


def test_reasoning_is_read_as_drift_reads_it(tmp_path):
    """The template opens it in the prompt, and its marks are special tokens: what closes it decides, and so does what never does."""
    thought, refusal = "Sure, here is how it is done. ", "I can't help with that."
    tokenizer = thinking_tokenizer(thought, refusal)
    base = scripted_model(tokenizer, "<think>", thought, "</think>", refusal)
    tuned = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    factors = dict(tuned.named_parameters())  # it ends within its thought
    for part, token, size in (("A", thought, 1.0), ("B", tokenizer.eos_token, 9.0)):
        factor = factors[f"base_model.model.lm_head.lora_{part}.default.weight"].data.zero_()
        factor.view(-1)[tokenizer.convert_tokens_to_ids(token)] = size
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.unload().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    space = Models(str(tmp_path / "base"), str(tmp_path / "adapter"))
    *_, result = run(space, "DriftCaps", [], 4, 16, "", "")
    model, own = load_model(str(tmp_path / "base"))
    prompts = spread(prompt_set("DriftCaps"), 4)
    adapted = load_adapter(model, tmp_path / "adapter")
    found = measure_behaviour(adapted, own, prompts, max_new_tokens=16, progress=False)
    assert [entry["label_base"] for entry in found.answers] == ["refusal"] * 4
    assert [entry["reason_tuned"] for entry in found.answers] == ["while reasoning"] * 4
    for row, entry in zip(result.rows, found.answers, strict=True):
        for side, ours in (("base", "base"), ("agl", "tuned")):
            names = (f"label_{side}", f"reason_{side}", f"answer_{side}")
            assert [row[name] for name in names] == [
                entry[f"{part}_{ours}"] for part in ("label", "reason", "response")
            ]
        *_, panes = answers(space, row["prompt"], 0.0, 0, 16, "", "")
        assert [pane.verdict.reason for pane in panes] == [entry["reason_base"], entry["reason_tuned"]]
        assert [pane.text for pane in panes] == [entry["response_base"], entry["response_tuned"]]
        assert panes[0].text == f"{thought}</think>{refusal}"
