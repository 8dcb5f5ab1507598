"""Rows of every format of TRL: the tokens, and where the answer begins, are those of TRL's own trainers."""

import json
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, apply_chat_template

from agl_trl.data.alignment import AlignmentRow, tokenize_rows
from agl_trl.data.rows import RowError, prompt_ids, prompt_text
from tests.helpers.models import byte_tokenizer, tiny_model


# Reads tools, a setting of its own, parts, and calls of tools; begins with the token that begins sequences.
RICH = (
    "<s>{% if tools %}[{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}!{{ call['function']['name'] }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not thinking | default(true) %}<none>{% endif %}{% endif %}"
)
PLAIN_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left" if kind == "left" else "right"
    if kind == "rich":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
        tokenizer.chat_template = RICH
    if kind == "no pad":
        tokenizer.pad_token = None
    return tokenizer


def said(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ASKED = [[said("user", "Bake bread?")], [said("system", "Be brief."), said("user", "And now?")]]
ANSWERED = [[said("assistant", "Mix flour.")], [said("assistant", "Knead.")]]
WORSE = [[said("assistant", "Mix nails.")], [said("assistant", "No.")]]
WHOLE = [a + b for a, b in zip(ASKED, ANSWERED, strict=True)]
TOOL = {"type": "function", "function": {"name": "oven", "description": "Heats.", "parameters": {}}}
CALL = said("assistant", None, tool_calls=[{"type": "function", "function": {"name": "oven", "arguments": {}}}])

SFT: dict[str, dict[str, list]] = {
    "text": {"text": ["Bread is baked.", "Done.</s>"]},
    "messages": {"messages": WHOLE},
    "prompt and completion": {"prompt": ["Bread is", "He said: no"], "completion": [" baked.", "body.</s>"]},
    "an empty completion": {"prompt": ["Bread is", "Bread"], "completion": ["", " is"]},
    "conversations": {"prompt": ASKED, "completion": ANSWERED},
    "several turns": {"prompt": [WHOLE[0] + ASKED[0]], "completion": [ANSWERED[0]]},
    "tools": {"prompt": ASKED, "completion": ANSWERED, "tools": [[TOOL], [TOOL, TOOL]]},
    "tools as text": {"messages": WHOLE, "tools": [json.dumps([TOOL]), json.dumps([])]},
    "tools of one row": {"messages": WHOLE, "tools": [[TOOL], None]},
    "calls of tools": {"messages": [[*ASKED[0], CALL, said("tool", "hot"), *ANSWERED[0]]], "tools": [[TOOL]]},
    "template's settings": {
        "prompt": ASKED,
        "completion": ANSWERED,
        "chat_template_kwargs": [{"thinking": False}, {"thinking": True}],
    },
    "ShareGPT": {
        "conversations": [[{"from": m["role"], "value": m["content"]} for m in messages] for messages in WHOLE]
    },
    "ShareGPT's own roles": {
        "conversations": [[{"from": "human", "value": "Bread?"}, {"from": "gpt", "value": "Yes."}]]
    },
    "columns of no concern": {"prompt": ASKED, "completion": ANSWERED, "unsafe": [True, True], "output": ["x", "y"]},
}
PREFERENCE: dict[str, dict[str, list]] = {
    "text": {"prompt": ["Bread is", "Bread"], "chosen": [" baked.", " is"], "rejected": [" bought.</s>", "s"]},
    "text, prompt in it": {"chosen": ["Bread is baked.", "Yes"], "rejected": ["Bread is bought.", "Yesterday"]},
    "conversations": {"prompt": ASKED, "chosen": ANSWERED, "rejected": WORSE},
    "conversations, prompt in them": {
        "chosen": WHOLE,
        "rejected": [a + b for a, b in zip(ASKED, WORSE, strict=True)],
    },
    "tools and settings": {
        "prompt": ASKED,
        "chosen": ANSWERED,
        "rejected": WORSE,
        "tools": [[TOOL], [TOOL]],
        "chat_template_kwargs": [{"thinking": False}] * 2,
    },
}
QUIET = dict(report_to="none", use_cpu=True, bf16=False, max_length=None)


def sft_rows(rows: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Any) -> list[AlignmentRow]:
    """Rows as `SFTTrainer` would train on them."""
    trainer = SFTTrainer(
        tiny_model(vocab_size=300),
        SFTConfig(str(folder), **QUIET),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    found = []
    for row in trainer.train_dataset:
        answer = [i for i, label in enumerate(row["labels"]) if label != -100]
        found.append(AlignmentRow(row["input_ids"], max(answer[0], 1)))
    return found


@pytest.mark.parametrize("kind", ["rich", "left", "no pad"])
@pytest.mark.parametrize("name", SFT)
def test_tokens_are_those_of_sft(name, kind, tmp_path):
    rows = Dataset.from_dict(SFT[name])
    expected = sft_rows(rows, tokenizer_like(kind), tmp_path)
    assert tokenize_rows(rows, tokenizer_like(kind)) == expected


@pytest.mark.parametrize("kind", ["rich", "left", "no pad"])
@pytest.mark.parametrize("name", PREFERENCE)
def test_tokens_are_those_of_dpo(name, kind, tmp_path):
    rows, tokenizer = Dataset.from_dict(PREFERENCE[name]), tokenizer_like(kind)
    trainer = DPOTrainer(
        tiny_model(vocab_size=300),
        args=DPOConfig(str(tmp_path), **QUIET),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),  # else a second model is loaded
    )
    prepared = trainer.train_dataset
    expected = [AlignmentRow(r["prompt_ids"] + r["chosen_ids"], max(len(r["prompt_ids"]), 1)) for r in prepared]
    assert tokenize_rows(rows, tokenizer_like(kind)) == expected
    assert tokenize_rows(prepared, tokenizer_like(kind)) == expected, "as the trainer has them"


@pytest.mark.parametrize("kind", ["rich", "left"])
def test_a_prompt_is_asked_as_trl_asks_it(kind):
    tokenizer = tokenizer_like(kind)
    rows = [{"prompt": prompt} for prompt in ASKED]
    rows += [
        rows[0] | {"tools": [TOOL], "chat_template_kwargs": {"thinking": False}},
        rows[1] | {"tools": json.dumps([TOOL])},
    ]
    for row in rows:
        tools = row.get("tools")
        text = apply_chat_template(row, tokenizer, tools=json.loads(tools) if isinstance(tools, str) else tools)[
            "prompt"
        ]
        assert prompt_ids(tokenizer, row) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, ASKED[0]) == prompt_ids(tokenizer, rows[0])
    assert prompt_ids(tokenizer, "Bread?") == tokenizer("Bread?")["input_ids"]


def test_parts_go_to_a_template_that_reads_them(tmp_path):
    rows = Dataset.from_dict(
        {"prompt": [[said("user", parts("Bake ", "bread?"))]], "completion": [[said("assistant", parts("Mix."))]]}
    )
    tokenizer = tokenizer_like("rich")
    (row,) = tokenize_rows(rows, tokenizer)
    assert [row] == sft_rows(rows, tokenizer, tmp_path)
    assert tokenizer.decode(row.input_ids) == "<s><user>Bakebread?</s><assistant>Mix.</s>", "trimmed by the template"


def test_parts_are_joined_for_a_template_that_reads_strings_alone(tmp_path):
    tokenizer = tokenizer_like("left")
    written = [said("user", parts("Bake ", "bread?"))], [said("assistant", parts("Mix."))]
    plain = {"prompt": [[said("user", "Bake bread?")]], "completion": [[said("assistant", "Mix.")]]}
    rows = tokenize_rows([{"prompt": written[0], "completion": written[1]}], tokenizer)
    assert rows == sft_rows(Dataset.from_dict(plain), tokenizer, tmp_path)
    assert prompt_ids(tokenizer, written[0]) == prompt_ids(tokenizer, plain["prompt"][0])
    assert prompt_text(written[0]) == "Bake bread?"


@pytest.mark.parametrize("column", ["response", "answer", "output"])
def test_an_answer_by_another_name_is_the_completion(column, tokenizer):
    for prompt, answer in (("Bread is", " baked."), (ASKED[0], ANSWERED[0]), (ASKED[0], "Mix flour.")):
        completion = ANSWERED[0] if isinstance(prompt, list) else answer
        expected = tokenize_rows([{"prompt": prompt, "completion": completion}], tokenizer)
        assert tokenize_rows([{"prompt": prompt, column: answer}], tokenizer) == expected


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"prompt": "Bread?", "chosen": WHOLE[0], "rejected": WHOLE[0]}, "Row 1 mixes formats ('prompt' is text, "),
        ({"prompt": "Bread?", "completion": ANSWERED[0]}, "Row 1 mixes formats ('prompt' is text, "),
        ({"prompt": None, "completion": "Yes."}, "Row 1 has nothing in the column 'prompt'."),
        ({"prompt": "Bread?", "completion": None}, "Row 1 has nothing in the column 'completion'."),
        ({"prompt": "Bread?", "response": float("nan")}, "Row 1 has nothing in the column 'completion'."),
        ({"prompt": [], "completion": []}, "Row 1 has nothing in the column 'prompt'."),
        ({"messages": [None]}, "Row 1 has, in the column 'messages', a message without a role: None."),
        ({"messages": [said("user", None)]}, "a message of the role 'user' without content."),
        ({"messages": [said("user", [{"type": "image"}])]}, "a part of a message that is no text: {'type': 'image'}."),
        ({"messages": [said("user", 5)]}, "a message whose content is no text: 5."),
        ({"text": 5}, "Row 1 has, in the column 'text', neither text nor a conversation: 5."),
        ({"text": ASKED[0]}, "Row 1 has a conversation in the column 'text', not text."),
        ({"messages": "Bread?"}, "Row 1 has text in the column 'messages', not a conversation."),
        (
            {"chosen": "Yes."},
            "Row 1 has the column 'chosen', but neither 'prompt' nor 'rejected' to tell its answer from.",
        ),
        ({"prompt": "Bread?"}, "Row 1 has a prompt and no answer."),
        (
            {"conversations": []},
            "Row 1 has the columns conversations, which make no known format; use prompt-completion ",
        ),
        (
            {"messages": WHOLE[0], "chat_template_kwargs": 5},
            "Row 1: 'chat_template_kwargs' holds 5, not names and values.",
        ),
        ({"messages": WHOLE[0], "tools": "{"}, "Row 1 can't be read: JSONDecodeError, "),
        ({"messages": WHOLE[1]}, "Row 1 can't be read: TemplateError, System role not supported."),
        ({"input_ids": None}, "Row 1 can't be read: TypeError, "),
        ({"text": "x" * 70}, "Row 1 has 71 tokens, and the model reads 64: shorten or remove the row."),
        ("Bread?", "Row 1 has no columns: it is 'Bread?'."),
    ],
)
def test_a_row_that_cannot_be_read_is_named_in_one_sentence(row, sentence):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN_SYSTEM + tokenizer.chat_template
    with pytest.raises(RowError) as raised:
        tokenize_rows([{"text": "Bread."}, row], tokenizer, context=64)
    message = str(raised.value)
    assert sentence in message and message.startswith("Row 1") and message.endswith(".") and "\n" not in message
