"""What a tokenizer beside an adapter changes: template, vocabulary, end; told in words, or nothing where it changes nothing."""

import shutil

import pytest

from agl_trl.artifacts.files import ArtifactError
from agl_trl.modeling.own_tokenizer import GREETING, difference, own_tokenizer
from tests.helpers.models import TEMPLATE, byte_tokenizer


SYSTEM = [{"role": "system", "content": "Be brief."}, *GREETING]


def own(folder, **changes):
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return own_tokenizer(folder, byte_tokenizer())


def test_nothing_is_told_where_nothing_is_asked_otherwise(tmp_path):
    assert own_tokenizer(tmp_path, byte_tokenizer()) is None
    for changes in (
        {},
        {"pad_token": "</s>", "padding_side": "left", "model_max_length": 7},
        {"chat_template": TEMPLATE + "{# of training #}"},
        {"chat_template": None},
    ):
        shutil.rmtree(tmp_path)
        assert difference(own(tmp_path, **changes), byte_tokenizer(), [GREETING, SYSTEM, "text"]) is None, changes


def test_what_differs_is_named(tmp_path):
    base = byte_tokenizer()
    other = own(tmp_path, chat_template=TEMPLATE.replace("%}<assistant>{%", "%}<assistant>Sure: {%"))
    assert difference(other, base, [GREETING, SYSTEM, "text"]) == (
        "writes 2 of 3 prompts otherwise (such as 'Hello' as '<user>Hello</s><assistant>Sure: ', not "
        "'<user>Hello</s><assistant>')"
    )
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    assert (
        difference(own(tmp_path, chat_template=refuses), base, [GREETING, SYSTEM]) == "writes 1 of 2 prompts otherwise"
    )
    assert difference(own(tmp_path, eos_token="<assistant>"), base, ["text"]) == "ends with '<assistant>', not '</s>'"
    longer = byte_tokenizer()
    longer.add_tokens(["Hello"])
    assert difference(longer, base, [GREETING]).startswith("writes 1 of 1 prompts otherwise"), (
        "the same text in other tokens"
    )


def test_a_template_alone_is_that_of_the_bases_tokenizer(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    base = byte_tokenizer()
    found = own_tokenizer(tmp_path, base)
    assert "as 'Q: Hello A:'" in difference(found, base, [GREETING]) and base.chat_template == TEMPLATE


def test_a_broken_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="The tokenizer beside the adapter can't be read: "):
        own_tokenizer(tmp_path, byte_tokenizer())
