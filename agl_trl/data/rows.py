"""One reading of rows: their columns as TRL reads them, their prompts as the model is asked; what is wrong, told by the row."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import first_line
from ..artifacts.schema import short_repr
from .labels import is_missing


Conversation: TypeAlias = list[dict[str, Any]]
# What a model is asked: text, a conversation, or a row whose columns `tools` and `chat_template_kwargs` belong to the prompt.
Messages: TypeAlias = Conversation | str | Mapping[str, Any]

OF_TEMPLATE = ("tools", "chat_template_kwargs")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its roles, by those that chat templates know
ANSWERS = ("completion", "response", "answer", "output")  # TRL's own name first
FORMATS = (
    "prompt-completion ('prompt', 'completion'), preference ('prompt', 'chosen', 'rejected'), prompt-only ('prompt'), "
    "or language modeling ('messages', 'text', or ShareGPT's 'conversations')"
)


class RowError(ValueError):
    """A row that can't be read; the message is one sentence that names it."""


class Row(dict[str, Any]):
    """
    A row that knows its place in the dataset, so that what is wrong with it can be told by it.

    Args:
        columns (`Mapping`):
            The row; spaces around the names of its columns are left out.
        number (`int`):
            Its number in the dataset, from 0.
        tokens (`tuple[list[int], int]`, *optional*):
            Tokens of the row and the position where its answer begins, as a model wrote them: a chat template may render the
            text of the answer as something else. They are no column.
    """

    def __init__(self, columns: Mapping[str, Any], number: int, tokens: tuple[list[int], int] | None = None):
        if not isinstance(columns, Mapping):
            raise RowError(f"Row {number} has no columns: it is {short_repr(columns)}.")
        super().__init__({str(name).strip(): value for name, value in columns.items()})
        self.number: int = columns.number if isinstance(columns, Row) else number
        self.tokens: tuple[list[int], int] | None = (
            columns.tokens if isinstance(columns, Row) and tokens is None else tokens
        )


def row_name(row: Mapping[str, Any]) -> str:
    """What a row is called in a sentence."""
    return f"Row {row.number}" if isinstance(row, Row) else f"A row with the columns {', '.join(map(str, row))}"


def is_prompt_only(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt and no answer, so that the reference model must give one."""
    answered = {*ANSWERS, "chosen", "messages", "conversations", "text", "input_ids"}
    return "prompt" in row and not row.keys() & answered


@contextmanager
def told_by(name: str) -> Iterator[None]:
    """Whatever goes wrong inside, chat templates raise what they like, is told in one sentence that names the row."""
    try:
        yield
    except RowError:
        raise
    except Exception as error:
        raise RowError(f"{name} can't be read: {type(error).__name__}, {first_line(error)}.") from error


def read_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    The columns of a row that hold its text, as TRL names them: ShareGPT's `conversations` become `messages`, an answer in another
    of [`ANSWERS`] the `completion`. Prompt and answer are both text, or both conversations.

    Args:
        row (`Mapping`):
            Row as it is in the dataset.

    Raises:
        [`RowError`]: If a prompt or an answer is missing, or is neither text nor a conversation.
    """
    name, columns = row_name(row), dict(row)
    with told_by(name):
        if _is_sharegpt(columns.get("conversations")):
            columns["messages"] = [_with_roles(message) for message in columns.pop("conversations")]
    answer = next((column for column in ANSWERS if column in columns), None)
    if "prompt" in columns and answer is not None and not columns.keys() & {"chosen", "messages", "text"}:
        columns["completion"] = columns.pop(answer)
        if answer != "completion" and isinstance(columns["completion"], str) and isinstance(columns["prompt"], list):
            columns["completion"] = [{"role": "assistant", "content": columns["completion"]}]
    used = next(
        (
            names
            for names in (("prompt", "completion"), ("prompt", "chosen"), ("chosen",))
            if columns.keys() >= {*names}
        ),
        next(((column,) for column in ("messages", "text", "prompt") if column in columns), ()),
    )
    if not used:
        raise RowError(
            f"{name} has the columns {', '.join(sorted(columns))}, which make no known format; use {FORMATS}."
        )
    if "chosen" in used and "rejected" in columns:
        used = (*used, "rejected")
    elif used == ("chosen",):
        raise RowError(f"{name} has the column 'chosen', but neither 'prompt' nor 'rejected' to tell its answer from.")
    kinds = {column: check_content(columns[column], name, column) for column in used}
    for column, kind in (("text", "text"), ("messages", "a conversation")):
        if kinds.get(column, kind) != kind:
            raise RowError(f"{name} has {kinds[column]} in the column '{column}', not {kind}.")
    if len({*kinds.values()}) > 1:
        said = ", ".join(f"'{column}' is {kind}" for column, kind in kinds.items())
        advice = "; leave 'prompt' out if 'chosen' begins with it" if "chosen" in used else ""
        raise RowError(f"{name} mixes formats ({said}): write all as text or all as conversations{advice}.")
    return {column: columns[column] for column in used}


# TRL reads ShareGPT's rows the same way; without TRL, because its trainers alone need it, and front ends bring old ones.
def _is_sharegpt(conversation: Any) -> bool:
    first = conversation[0] if isinstance(conversation, list) and conversation else None
    return isinstance(first, Mapping) and {"from", "value"} <= first.keys()


def _with_roles(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {{"from": "role", "value": "content"}.get(name, name): value for name, value in message.items()}


def check_content(value: Any, name: str, column: str) -> str:
    """
    Check that a cell can be read as text or as a conversation.

    Args:
        value (`Any`):
            The cell.
        name (`str`):
            What its row is called in a sentence.
        column (`str`):
            Its column.

    Returns:
        `str`: `"text"` or `"a conversation"`.

    Raises:
        [`RowError`]: If it can't.
    """
    if isinstance(value, str):
        return "text"
    place = f"{name} has, in the column '{column}',"
    if is_missing(value) or value == []:
        raise RowError(f"{name} has nothing in the column '{column}'.")
    if not isinstance(value, list):
        raise RowError(f"{place} neither text nor a conversation: {short_repr(value)}.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"{place} a message without a role: {short_repr(message)}.")
        content = message.get("content")
        others = [key for key, other in message.items() if key not in ("role", "content", "name") and other]
        if isinstance(content, list) and content:
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise RowError(f"{place} a part of a message that is no text: {short_repr(part)}.")
        elif content is None and not others:
            raise RowError(f"{place} a message of the role '{message['role']}' without content.")
        elif content is not None and not isinstance(content, str):
            raise RowError(f"{place} a message whose content is no text: {short_repr(content)}.")
    return "a conversation"


def content_text(content: Any) -> str:
    """Text of the content of a message: a string, parts, or nothing (of a call of a tool)."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def prompt_text(prompt: Messages) -> str:
    """Text of a prompt: of a conversation the last message."""
    prompt = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
    return prompt if isinstance(prompt, str) else content_text(prompt[-1].get("content"))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    """
    Tokens of a prompt up to where the answer begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template of the model.
        prompt (`str`, `list[dict]` or `Mapping`):
            Text, a conversation, or a row with the column `prompt`.

    Raises:
        [`RowError`]: If it can't be read, or the template refuses it.
    """
    row = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    name = row_name(row) if isinstance(row, Row) else "A prompt"
    check_content(row.get("prompt"), name, "prompt")
    with told_by(name):
        return content_ids(tokenizer, row["prompt"], add_generation_prompt=True, **template_options(row, name))


def questions_of(prompts: Dataset) -> list[Messages]:
    """Prompts of a set as rows of what belongs to asking them, with their numbers: see [`Messages`]."""
    asked = prompts.select_columns([column for column in ("prompt", *OF_TEMPLATE) if column in prompts.column_names])
    return [Row(row, number) for number, row in enumerate(asked)]


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Messages], context: int | None) -> None:
    """
    Check, before any is answered, that all prompts can be asked.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template of the model.
        prompts (`Iterable`):
            Prompts, as [`prompt_ids`] takes them.
        context (`int`, *optional*):
            Most tokens that the model reads.

    Raises:
        [`RowError`]: If one can't be read, the template refuses it, or it leaves no room for an answer.
    """
    for number, prompt in enumerate(prompts):
        row = Row(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}, number)
        length = len(prompt_ids(tokenizer, row))
        if context is not None and length >= context:
            raise RowError(
                f"{row_name(row)} has a prompt of {length} tokens, and the model reads {context}: shorten it."
            )


def content_ids(tokenizer: PreTrainedTokenizerBase, content: Conversation | str, **options: Any) -> list[int]:
    """
    Tokens of a text, or of a conversation through the chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer with the chat template of the model. Of one that reads strings alone, and would print parts as they are
            written in Python, parts of text are joined.
        content (`str` or `list[dict]`):
            Text or conversation.
        options:
            What goes to the template.
    """
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    if any(isinstance(message.get("content"), list) for message in content) and not _reads_parts(tokenizer):
        content = [
            message | {"content": content_text(message["content"])} if message.get("content") else message
            for message in content
        ]
    return tokenizer.apply_chat_template(content, tokenize=True, return_dict=True, **options)["input_ids"]


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    contents = ("A word.", [{"type": "text", "text": "A word."}])
    try:
        text, parts = (
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in contents
        )
    except Exception:  # noqa: BLE001 (a template raises what it likes)
        return False
    return text == parts


def template_options(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """
    What a row tells the chat template: its columns `tools` and `chat_template_kwargs`, in which a gap is nothing.

    Args:
        row (`Mapping`):
            Row.
        name (`str`):
            What it is called in a sentence.

    Raises:
        [`RowError`]: If they can't be read.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    with told_by(name):
        tools, options = (json.loads(value) if isinstance(value, str) else value for value in (tools, options))
    if options is not None and not isinstance(options, Mapping):
        raise RowError(f"{name}: 'chat_template_kwargs' holds {short_repr(options)}, not names and values.")
    return {"tools": tools, **(options or {})}


def as_json(value: Any) -> str | None:
    """A value as [`template_options`] reads it again, of a type that every row of a dataset has."""
    return value if value is None or isinstance(value, str) else json.dumps(value)
