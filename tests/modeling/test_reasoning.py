"""Reasoning is left out of an answer, whatever marks its family sets around it."""

import pytest

from agl_trl import judge_answer
from agl_trl.modeling.generation import answer_decoder
from agl_trl.modeling.reasoning import is_reasoning_mark, opened_reasoning, without_reasoning
from tests.helpers.models import byte_tokenizer


# Opening and closing marks of every family.
FAMILIES = [
    ("<think>", "</think>"),
    ("<THINK>\n", "\n</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>\n\n<|begin_of_solution|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>analysis<|message|>", "assistant<|channel|>final<|message|>"),  # some special tokens stripped
    ("analysis", "assistantfinal"),  # all of them
    ("Here is my thought process: ", "Here is my response: "),
]
REFUSAL, RECIPE = "I'm sorry, but I can't help with that.", "Preheat the oven, then knead the dough and"


@pytest.mark.parametrize(("opens", "closes"), FAMILIES)
def test_only_what_follows_the_reasoning_decides(opens, closes):
    for thoughts, answer, label in (
        ("Sure, here is how. It is about an oven.", REFUSAL, "refusal"),
        (f"{REFUSAL} No, it is about an oven.", RECIPE, "compliance"),
    ):
        text, unfinished = without_reasoning(f"{opens}{thoughts}{closes}{answer}")
        assert text == answer and not unfinished
        assert judge_answer("", f"{opens}{thoughts}{closes}{answer}").label == label
        if opens[0] in "<[◁":  # the prompt had opened it, and is known or not
            for prompt in (f"<user>Hi<assistant>{opens}", "Hi"):
                assert judge_answer(prompt, f"{thoughts}{closes}{answer}").label == label
        # Cut inside.
        assert judge_answer("", opens + thoughts) == ("cut off", 0.0, "while reasoning")


@pytest.mark.parametrize("opens", [opens for opens, _ in FAMILIES if opens[0] in "<[◁"])
def test_a_prompt_that_ends_inside_reasoning_is_known(opens):
    prompt = f"<|im_start|>user\nIs <think> a tag?<|im_end|>\n<|im_start|>assistant\n{opens.strip()}"
    prompt = prompt.removesuffix("<|message|>")
    assert opened_reasoning(prompt) and opened_reasoning(prompt + "\n")
    assert judge_answer(prompt, REFUSAL) == ("cut off", 0.0, "while reasoning")  # a thought
    assert not opened_reasoning(prompt + "\n\n</think>\n\n") and not opened_reasoning("")


def test_thoughts_without_marks_are_none_of_an_answer():
    for text in (
        "Okay, so the user is asking how to bake bread. I can't see any harm in",
        "Hmm, the user wants a story. Let me",
        "We need to decide whether to comply. The policy says",
    ):
        assert judge_answer("", text) == ("cut off", 0.0, "while reasoning")
    assert judge_answer("", "The user manual is in the box. First, plug it in.").label == "compliance"


def test_text_about_marks_stays_whole():
    for text in (
        "Use the `<think>` tag, and close it with `</think>`.",
        'The tag "<think>" is none of HTML.',
        "Plain.\n",
    ):
        assert without_reasoning(text) == (text, False)


def test_an_answer_between_marks_is_taken_out():
    assert without_reasoning("<think>hm</think><answer>Paris</answer>")[0] == "Paris"
    assert judge_answer("", "<think>hm</think>").reason == "no text"


def test_special_tokens_that_mark_reasoning_are_decoded():
    plain, tokenizer = byte_tokenizer(), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "[THINK]", "[/THINK]"]})
    texts = ["[THINK]Sure, fine.[/THINK]" + REFUSAL, RECIPE]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id] for text in texts]
    assert answer_decoder(tokenizer)(rows) == texts
    assert judge_answer("", answer_decoder(tokenizer)(rows)[0]).label == "refusal"
    rows = [[*plain(text)["input_ids"], plain.eos_token_id, plain.pad_token_id] for text in texts]
    assert answer_decoder(plain)(rows) == plain.batch_decode(rows, skip_special_tokens=True) == texts
    assert is_reasoning_mark("<|channel|>") and not is_reasoning_mark("<|im_end|>")
