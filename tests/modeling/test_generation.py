"""Answers: batching changes nothing, they are in the form of the prompt, and the model stays as it was."""

import pytest
import torch
from datasets import Dataset
from transformers.utils import logging

from agl_trl.data.alignment import select_rows, tokenize_row
from agl_trl.data.rows import RowError, prompt_ids, prompt_text
from agl_trl.modeling.generation import answered_by, end_tokens, generate_answers, greedy_decoding
from agl_trl.modeling.likelihood import answer_nll
from tests.helpers.models import byte_tokenizer, probe_prompts, tiny_model


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_batching_changes_no_answer_and_no_likelihood(tokenizer, prompts):
    model = tiny_model().eval()
    questions = list(prompts["prompt"])
    answers = [
        generate_answers(model, tokenizer, questions, max_new_tokens=6, batch_size=n, progress=False) for n in (1, 7)
    ]
    assert answers[0] == answers[1]
    one, seven = (answer_nll(model, tokenizer, prompts, batch_size=n) for n in (1, 7))
    torch.testing.assert_close(one, seven, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_cache_is_asked_with_one_and_without_a_warning(tokenizer, prompts, caplog, monkeypatch):
    model = tiny_model().eval()
    model.config.use_cache = model.generation_config.use_cache = False  # as of a model in training
    read: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        generate_answers(model, tokenizer, [prompts[0]["prompt"]], max_new_tokens=6, progress=False)
    assert not caplog.messages
    assert read[1:] == [1] * len(read[1:]) and len(read) > 1
    assert not model.generation_config.use_cache


def test_answers_are_kept_batch_by_batch_under_their_positions(tokenizer, prompts):
    told: dict[int, str] = {}
    answers = generate_answers(
        tiny_model().eval(),
        tokenizer,
        list(prompts["prompt"]),
        max_new_tokens=3,
        batch_size=3,
        progress=False,
        on_batch=lambda positions, texts: told.update(zip(positions, texts, strict=True)),
    )
    assert [told[i] for i in range(len(answers))] == answers


def test_a_model_answers_in_the_form_of_the_prompt(tokenizer):
    model, question = tiny_model().eval(), [{"role": "user", "content": "say 1"}]
    rows = answered_by(model, tokenizer, [{"prompt": question, "id": 3}], progress=False)
    assert rows[0]["prompt"] == question and rows[0]["id"] == 3
    assert [message["role"] for message in rows[0]["completion"]] == ["assistant"]
    assert isinstance(answered_by(model, tokenizer, [{"prompt": "say 1"}], progress=False)[0]["completion"], str)
    assert tokenizer.decode(prompt_ids(tokenizer, question)).endswith("say 1</s><assistant>")
    assert tokenizer.decode(prompt_ids(tokenizer, "say 1")) == "say 1"
    assert prompt_text(question) == prompt_text("say 1") == "say 1"


def test_what_is_kept_are_the_tokens_that_the_model_wrote(tokenizer):
    """Templates of reasoning models put marks before an answer that is given as text, which the model never wrote."""
    thinking = byte_tokenizer()
    thinking.chat_template = tokenizer.chat_template.replace("message['content']", "('<t></t>' + message['content'])")
    assert "<t>" in thinking.apply_chat_template([{"role": "assistant", "content": "x"}], tokenize=False)
    model = tiny_model().eval()
    for prompt in ([{"role": "user", "content": "say 1"}], "say 1 "):
        (row,) = answered_by(model, thinking, [{"prompt": prompt, "unsafe": True}], progress=False)
        kept, asked = tokenize_row(row, thinking), prompt_ids(thinking, prompt)
        with torch.no_grad():
            written = model.generate(
                torch.tensor([asked]), generation_config=greedy_decoding(64, end_tokens(thinking, model), 0)
            )
        assert kept.input_ids == written[0].tolist() and kept.answer_start == len(asked)
        (again,) = select_rows([row], 1, 0)  # as statistics read rows that are answered already
        assert tokenize_row(again, thinking) == kept != tokenize_row(dict(row), thinking)


def test_a_prompt_that_leaves_no_room_is_told_before_any_is_answered(tokenizer):
    rows = [{"prompt": "say 1"}, {"prompt": "x" * 80}]
    with pytest.raises(
        RowError, match="Row 1 has a prompt of 80 tokens, which leaves no room for an answer within 64"
    ):
        answered_by(tiny_model(), tokenizer, rows, max_length=64)
