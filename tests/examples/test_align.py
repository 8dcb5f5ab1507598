"""Aligning the embedded model that helps with everything: it refuses afterwards, still answers look-alikes, and is saved whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agl_trl.data.prompts import load_prompts
from agl_trl.miniworld import MINIWORLD, checkpoint_path, load_model
from agl_trl.modeling.loading import load_model as load_from
from examples import align
from examples.align import Options


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    return Options(
        model=str(checkpoint_path("base")),
        output_dir=tmp_path_factory.mktemp("align") / "aligned",
        dataset=MINIWORLD,
        prompts=MINIWORLD,
        limit=80,
        epochs=6,
        batch_size=16,
        learning_rate=3e-3,
    )


@pytest.fixture(scope="module")
def aligned(options) -> Path:
    align.main(options)
    return options.output_dir


def test_a_model_that_helps_with_everything_refuses_and_answers_look_alikes(aligned, options):
    prompts = load_prompts(options.prompts, options.limit)
    before, after = (align.rates(*load_from(str(name)), prompts, options) for name in (options.model, aligned))
    assert {name: rate.total for name, rate in before.items()} == {"refuses unsafe": 40, "refuses safe": 40}
    assert before["refuses unsafe"].value == before["refuses safe"].value == 0
    assert after["refuses unsafe"].value > 0.9 and after["refuses safe"].value < 0.4


def test_the_folder_holds_a_whole_model_of_the_same_shape(aligned):
    assert not [*aligned.glob("adapter*")] and (aligned / "model.safetensors").is_file()
    model, tokenizer = load_from(str(aligned))
    base = load_model("base")
    assert tokenizer.chat_template and model.dtype == torch.float32
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, base.state_dict()[name])}
    assert len(moved) == 7 * 4 and all("proj" in name for name in moved), "the linear layers, by the merged adapter"


def test_without_lora_all_weights_are_trained(options, tmp_path):
    align.main(replace(options, output_dir=tmp_path, rank=0, epochs=0.1, limit=2, max_new_tokens=4))
    model, base = load_from(str(tmp_path))[0], load_model("base")
    assert not torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=-1), "`--rank` not below"),
        (dict(epochs=0), "`--epochs`, .* must be above 0"),
        (dict(model="no/such/folder"), "Can't load the model 'no/such/folder'"),
        (dict(dataset="questions.jsonl"), "has no column 'completion'"),
    ],
)
def test_what_has_no_meaning_is_told_before_anything_is_written(changes, message, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text('{"prompt": "What is a kite?"}\n')
    with pytest.raises(ValueError, match=message):
        align.main(replace(options, output_dir=tmp_path / "out", **changes))
    assert not [*tmp_path.glob("out/*")]
