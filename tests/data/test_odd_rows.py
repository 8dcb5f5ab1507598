"""Two hundred rows of odd shape: each is read as TRL reads it, or refused in one sentence that names row or file."""

import json
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from agl_trl.data.alignment import AlignmentRow, select_rows, tokenize_rows
from agl_trl.data.files import load_rows
from agl_trl.data.prompts import load_prompts
from agl_trl.data.rows import check_prompts, is_prompt_only
from tests.helpers.models import byte_tokenizer, preference_rows, tiny_model


ODD = 200
# The template reads strings and parts; of calls it prints nothing.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('No tools here') }}{% endif %}"
    "<{{ message['role'] }}>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What TRL trains on though it makes no sense: an image without image, null or numbers as text, a prompt without end.
REFUSED_ALL_THE_SAME = (
    "that is no text",
    "whose content is no text",
    "without content",
    "without a role",
    "has nothing in the column",
    "neither text nor a conversation",
    "has no token of an answer",
    "mixes formats",
    "not true or false",
)
# What TRL does not read, and AGL does.
READ_ALL_THE_SAME = ({"response"}, {"answer"}, {"output"}, {"prompt", "messages"}, {"prompt", "text"})


class Odd:
    """Draws rows, and writes them to files."""

    def __init__(self, seed: int):
        self.draw = random.Random(f"odd:{seed}")

    def text(self) -> str:
        return self.draw.choice(
            [
                "Bread",
                "Crème brûlée",
                "a,b;c\td",
                'He said "no"',
                "two\nlines",
                "",
                " ",
                "null",
                "5",
                "🍞",
                "end</s>",
                "{}",
                "[]",
            ]
        )

    def content(self) -> Any:
        if self.draw.random() < 0.8:
            return self.text()
        parts = [{"type": "text", "text": self.text()} for _ in range(self.draw.choice([1, 2]))]
        return self.draw.choice([parts, parts, parts, None, 5, [], [{"type": "image"}]])

    def message(self, names: tuple[str, str] = ("role", "content")) -> Any:
        role = self.draw.choice(["user", "assistant"] * 6 + ["system", "tool", "human", None])
        message = {names[0]: role, names[1]: self.content()}
        if self.draw.random() < 0.03:
            del message[self.draw.choice(names)]
        return message if self.draw.random() < 0.98 else self.draw.choice([None, "user: hi", ["user", "hi"]])

    def conversation(self, names: tuple[str, str] = ("role", "content")) -> list:
        return [self.message(names) for _ in range(self.draw.choice([0, *[1] * 6, 2, 2, 3]))]

    def good(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text()}]

    def cell(self, conversational: bool) -> Any:
        if self.draw.random() < 0.05:
            return self.draw.choice(
                [None, 5, 0.5, True, [], {}, {"role": "user"}, ["a", "b"], [[self.message()]], float("nan")]
            )
        if self.draw.random() < 0.05:
            conversational = not conversational
        return (self.conversation() if self.draw.random() < 0.6 else self.good()) if conversational else self.text()

    def row(self) -> dict[str, Any]:
        conversational = self.draw.random() < 0.6
        columns = self.draw.choice(
            [
                *[("prompt", "completion")] * 4,
                *[("prompt", "chosen", "rejected")] * 2,
                *[("chosen", "rejected"), ("prompt",), ("messages",), ("text",), ("conversations",)] * 2,
                *[
                    ("prompt", "response"),
                    ("prompt", "answer"),
                    ("prompt", "messages"),
                    ("prompt", "text"),
                    ("question",),
                ],
            ]
        )
        row = {column: self.cell(conversational) for column in columns}
        if "conversations" in row and self.draw.random() < 0.8:
            row["conversations"] = self.conversation(("from", "value"))
        if self.draw.random() < 0.2:
            row["tools"] = self.draw.choice(
                [None, [], "[]", "{", 5, [{"type": "function", "function": {"name": "f"}}]]
            )
        if self.draw.random() < 0.2:
            row["chat_template_kwargs"] = self.draw.choice([None, {"x": 1}, {}, 5, {"add_generation_prompt": True}])
        if self.draw.random() < 0.3:
            row[self.draw.choice(["unsafe", " unsafe "])] = self.draw.choice(
                [True, 1, "yes", "TRUE", "maybe", None, 2, [1]]
            )
        return row

    def file(self, folder: Path, row: dict[str, Any]) -> Path:
        """The row in a file of some kind, ending and encoding."""
        suffix = self.draw.choice(["jsonl", "JSONL", "json", "csv", "tsv", "Csv", "parquet", "txt", "xlsx"])
        encoding = self.draw.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
        path, kind = folder / f"row.{suffix}", suffix.lower()
        if kind == "parquet":
            with suppress(ArrowException):  # it can't write a message without keys
                Dataset.from_list([row]).to_parquet(path)
            return path
        if kind in ("csv", "tsv"):
            mark = {"csv": self.draw.choice([",", ",", ";"]), "tsv": "\t"}[kind]
            cells = [["" if cell is None else str(cell) for cell in line] for line in (row, row.values())]
            quoted = [mark.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
            content = "\n".join(quoted)
        elif kind == "txt":
            content = str(next(iter(row.values())))
        else:
            content = json.dumps([row] if kind == "json" else row, ensure_ascii=False)
        path.write_bytes(content.encode(encoding, errors="replace"))
        return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def trainers(tokenizer, tmp_path_factory) -> dict[str, Any]:
    quiet = dict(report_to="none", use_cpu=True, bf16=False, max_length=None)
    rows, lora = Dataset.from_list(preference_rows(2, "q", "a", "b")), LoraConfig(target_modules=["q_proj"])
    folder, texts = str(tmp_path_factory.mktemp("trl")), Dataset.from_dict({"text": ["a"]})
    return {
        "sft": SFTTrainer(tiny_model(), SFTConfig(folder, **quiet), train_dataset=texts, processing_class=tokenizer),
        "dpo": DPOTrainer(
            tiny_model(),
            args=DPOConfig(folder, **quiet),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        ),
    }


def as_trl_reads_it(
    rows: Dataset, trainers: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> AlignmentRow | None:
    """What `DPOTrainer` makes of a row with a chosen answer, and `SFTTrainer` of others; nothing if they can't."""
    names = {*rows.column_names}
    try:
        if "chosen" in names:
            trainer = trainers["dpo"]
            (row,) = trainer._prepare_dataset(rows, tokenizer, trainer.args, "train")
            return AlignmentRow(row["prompt_ids"] + row["chosen_ids"], max(len(row["prompt_ids"]), 1))
        trainer = trainers["sft"]
        trainer.completion_only_loss = names >= {"prompt", "completion"}
        (row,) = trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train")
        start = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
        return AlignmentRow(row["input_ids"], max(start, 1))
    except Exception:  # noqa: BLE001 (there is a class for every way to fail)
        return None


def refusal(error: ValueError, path: Path | None) -> str:
    """What a refusal says, which is one sentence that names the row or its file."""
    said = str(error)
    assert "\n" not in said and said.endswith(".") and ("Row 0" in said or (path and str(path) in said)), said
    return said


def in_memory(row: dict[str, Any]) -> Dataset | None:
    """As a user would pass it, unless Arrow can't hold it."""
    try:
        return Dataset.from_list([row])
    except (ValueError, TypeError, ArrowException):
        return None


def test_odd_rows_are_read_as_trl_reads_them_or_refused(tmp_path, trainers, tokenizer):
    counts = Counter[str]()
    for seed in range(ODD):
        odd = Odd(seed)
        row = odd.row()
        given: Any = in_memory(row)
        path = None
        if given is not None and odd.draw.random() < 0.7:
            (tmp_path / str(seed)).mkdir()
            path = odd.file(tmp_path / str(seed), row)
            try:
                given = load_rows(str(path))
            except ValueError as error:
                refusal(error, path)
                counts["file refused"] += 1
                continue
        ours, said = None, ""
        try:
            selected = select_rows([row] if given is None else given, None, 0)
            if is_prompt_only(selected[0]):
                check_prompts(tokenizer, selected, 500)
                counts["asked"] += 1
                continue
            (ours,) = tokenize_rows(selected, tokenizer, context=500)
        except ValueError as error:
            said = refusal(error, path)
        if given is None:
            counts["a list alone holds it"] += 1
            continue
        expected = as_trl_reads_it(given, trainers, tokenizer)
        counts[f"{'read' if ours else 'refused'}, {'read' if expected else 'refused'} by TRL"] += 1
        if ours and expected:
            assert ours == expected, (seed, row)
        elif ours:
            beyond = any(names <= {*row} for names in READ_ALL_THE_SAME)
            assert beyond or None in (row.get("tools", 0), row.get("chat_template_kwargs", 0)), (seed, row)
        elif expected:
            assert any(reason in said for reason in REFUSED_ALL_THE_SAME), (seed, row, said)
        if path:
            try:
                assert len(load_prompts(str(path))) >= 1
                counts["prompts"] += 1
            except ValueError as error:
                refusal(error, path)
                counts["prompts refused"] += 1
    assert len(counts) == 9 and min(counts.values()) >= 3, f"every case is met: {counts}"
