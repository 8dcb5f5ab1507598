"""Prompt sets by name: public ones of the Hub, those of the package, and files, all with the same columns."""

from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ..artifacts.schema import short_repr
from ..driftcaps import load_driftcaps
from ..miniworld import MINIWORLD, heldout_prompts
from .files import is_file, load_rows, read_failure
from .labels import is_missing, is_unsafe
from .rows import OF_TEMPLATE, SHAREGPT, Row, RowError, as_json, check_content, content_text


PROMPT_COLUMNS = ("prompt", "instruction", "question", "goal", "Goal", "forbidden_prompt", "text")
CONVERSATION_COLUMNS = ("messages", "conversations")  # of which the last turn of the user is asked
MESSAGES, TEXT = List({"role": Value("string"), "content": Value("string")}), Value("string")
FEATURES = Features(prompt=MESSAGES, category=TEXT, unsafe=Value("bool"), id=TEXT, completion=MESSAGES)


class Label(NamedTuple):
    """Column that tells unsafe from safe, by shell patterns in lower case; rows that match neither are left out."""

    column: str
    unsafe: str
    safe: str = ""


class PromptSet(NamedTuple):
    """
    Where a set of prompts is, and what its columns mean.

    `prompt` may hold text, conversations or lists of turns (the first is asked), or be one of [`CONVERSATION_COLUMNS`]; `category` text, numbers or flags
    (the first set counts); `completion` the reference answer, never the target of an attack. Without `unsafe` the columns
    `unsafe` and `expected` tell, as in [`is_unsafe`]. Splits joined by `+` are named in a column `split`; `merge` makes one
    of rows with one prompt, unsafe if any is; `options` go to the loader.
    """

    source: str
    license: str
    prompt: str
    category: str | None = None
    unsafe: bool | Label | None = True
    gated: bool = False
    config: str | None = None
    split: str = "train"
    id: str | None = None
    completion: str | None = None
    merge: bool = False
    options: tuple[tuple[str, Any], ...] = ()


# Left out: HarmBench's prompts that need a context, SORRY-Bench's rewordings of the same requests, and WildJailbreak's
# adversarial rows, whose answers are not to the vanilla prompt. BeaverTails judges prompt and answer together, and has
# several answers to each prompt. Do-Not-Answer: the licence of the authors' repository; the Hub's tag says apache-2.0.
# fmt: off
SETS = {
    "xstest": PromptSet("Paul/XSTest", "cc-by-4.0", "prompt", "type", Label("type", "contrast_*", "*"), id="id"),
    "or-bench-hard": PromptSet("bench-llms/or-bench", "cc-by-4.0", "prompt", "category", False,
                               config="or-bench-hard-1k"),
    "jbb": PromptSet("JailbreakBench/JBB-Behaviors", "mit", "Goal", "Category", Label("split", "harmful", "benign"),
                     config="behaviors", split="harmful+benign"),
    "advbench": PromptSet("walledai/AdvBench", "mit", "prompt", gated=True),
    "harmbench": PromptSet("walledai/HarmBench", "mit", "prompt", "category", config="standard"),
    "strongreject": PromptSet("walledai/StrongREJECT", "mit", "prompt", "category"),
    "beavertails": PromptSet("PKU-Alignment/BeaverTails", "cc-by-nc-4.0", "prompt", "category",
                             Label("is_safe", "false", "true"), split="30k_test", merge=True),
    "sorry-bench": PromptSet("sorry-bench/sorry-bench-202503", "other (SORRY-Bench)", "turns", "category",
                             Label("prompt_style", "base"), gated=True, id="question_id"),
    "do-not-answer": PromptSet("LibrAI/do-not-answer", "cc-by-nc-sa-4.0", "question", "risk_area", id="id"),
    "wildjailbreak": PromptSet("allenai/wildjailbreak", "odc-by", "vanilla", "data_type",
                               Label("data_type", "vanilla_harmful", "vanilla_benign"), gated=True, config="train",
                               completion="completion", options=(("delimiter", "\t"), ("keep_default_na", False))),
}
# fmt: on


def load_prompts(name: str, limit: int | None = None) -> Dataset:
    """
    Prompts to ask a model.

    Args:
        name (`str`):
            One of [`SETS`], `"miniworld"` (held-out), `"driftcaps"` (test split), a `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`
            or `.txt` file (a prompt a line), or another id on the Hub (split `test`, else `train`), with one of
            [`PROMPT_COLUMNS`] or, of whole conversations, [`CONVERSATION_COLUMNS`]: the last turn of the user is asked after the
            turns before it, and a single answer after it is the reference. Optionally `id`, `category`, `completion` or `response`, `unsafe` (true, yes, 1, or their opposites)
            or `expected` (`"refuse"`, `"comply"`).
        limit (`int`, *optional*):
            Number of prompts: as many of either label, and of every category in it, as there are, evenly spread.

    Returns:
        `Dataset`:
            Columns `prompt` (conversation), `category` (or `"all"`), `unsafe` (bool; true without a label), `id`, `tools` and
            `chat_template_kwargs` if the source has them, and `completion` (conversation) if every prompt has a reference
            answer. `dataset.info.license` is the licence.

    Raises:
        `ValueError`: If the prompts can't be reached or read, there are none, or `limit` isn't positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be positive, not {limit}.")
    if name in SETS:
        return spread(map_rows(from_hub(SETS[name]), SETS[name]), limit)
    if name == MINIWORLD:
        rows, licence = heldout_prompts(), "apache-2.0"
    elif name == "driftcaps":
        rows, licence = load_driftcaps("test"), "cc-by-4.0"
    else:
        rows = load_rows(name) if is_file(name) else from_hub(PromptSet(name, "", "", split=""))
        licence = rows.info.license or ""
    return spread(map_rows(rows, _guess(name, rows, licence)), limit)


def map_rows(rows: Dataset, spec: PromptSet) -> Dataset:
    """
    Rows of a source as prompts, with the columns of [`load_prompts`].

    Raises:
        `ValueError`: If a column is missing, a prompt is empty, a cell can't be read, or no row is left.
    """
    label = spec.unsafe if isinstance(spec.unsafe, Label) else None
    for column in (spec.prompt, spec.category, spec.id, spec.completion, label and label.column):
        if column is not None and column not in rows.column_names:
            raise ValueError(f"'{spec.source}' has no column '{column}'; found {', '.join(rows.column_names)}.")
    prompts: dict[Any, dict[str, Any]] = {}
    for index, columns in enumerate(rows):
        row, name = Row(columns, index), f"Row {index} of '{spec.source}'"
        if label is not None:
            unsafe = _by_pattern(row[label.column], label)
        else:
            unsafe = is_unsafe(row, name) if spec.unsafe is None else spec.unsafe is True
        if unsafe is None:
            continue
        prompt, completion = _asked(row, spec, name)
        category = row[spec.category] if spec.category else "all"
        if isinstance(category, dict):
            category = next((name for name, flag in category.items() if flag), "safe")
        if not prompt:
            raise RowError(f"{name} has an empty prompt in the column '{spec.prompt}'.")
        key = str(prompt) if spec.merge else index
        if key not in prompts or unsafe > prompts[key]["unsafe"]:
            prompts[key] = {
                "prompt": prompt,
                "category": str("all" if category is None else category),
                "unsafe": unsafe,
                "id": str(row[spec.id] if spec.id else index),
                "completion": completion,
                **{column: as_json(row[column]) for column in OF_TEMPLATE if column in row},
            }
    if not prompts:
        raise ValueError(f"'{spec.source}' holds no prompts.")
    told = {column: TEXT for column in OF_TEMPLATE if column in rows.column_names}
    dataset = Dataset.from_list(list(prompts.values()), features=Features(FEATURES | told))
    dataset.info.license = spec.license
    return dataset if all(dataset["completion"]) else dataset.remove_columns("completion")


def from_hub(spec: PromptSet) -> Dataset:
    """
    Rows of a source on the Hub, as they are there; without a split those of `test`, else `train`, else the first.

    Raises:
        `ValueError`: If they can't be reached or read.
    """
    splits = spec.split.split("+")
    try:
        if not spec.split:
            found = load_dataset(spec.source)
            return found[next((split for split in ("test", "train") if split in found), next(iter(found)))]
        parts = [load_dataset(spec.source, spec.config, split=split, **dict(spec.options)) for split in splits]
    except Exception as error:  # datasets raises a different class for every format and every way to fail
        raise ValueError(_reason(spec, error)) from error
    if len(parts) > 1:
        parts = [part.add_column("split", [split] * len(part)) for split, part in zip(splits, parts, strict=True)]
    return concatenate_datasets(parts)


def _reason(spec: PromptSet, error: Exception) -> str:
    name, cause = spec.source, error.__cause__ or error
    gated = isinstance(cause, GatedRepoError) or "is a gated dataset" in str(error)  # datasets cuts causes off
    missing = isinstance(cause, DatasetNotFoundError | RepositoryNotFoundError)
    denied = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
    # The Hub answers 401 for what doesn't exist, too: there only a known set is surely gated.
    if gated or (spec.gated if missing else denied):
        terms = f"accept the terms at {constants.ENDPOINT}/datasets/{name}"
        return f"'{name}' is gated: {terms} and log in with `hf auth login`."
    if missing:
        return f"There is no dataset '{name}' on the Hub, or it is private: log in with `hf auth login`."
    if isinstance(error, ConnectionError):
        return f"Can't reach '{name}' on the Hub, and it isn't cached: go online, or give a file instead."
    return f"Can't read rows from '{name}': {read_failure(error)}."


def _guess(name: str, rows: Dataset, licence: str) -> PromptSet:
    found = rows.column_names
    prompt = next((column for column in (*PROMPT_COLUMNS, *CONVERSATION_COLUMNS) if column in found), None)
    if prompt is None:
        raise ValueError(f"'{name}' has no column with a prompt, such as 'prompt'; found {', '.join(found)}.")
    category, row_id = (column if column in found else None for column in ("category", "id"))
    completion = next((column for column in ("completion", "response") if column in found), None)
    return PromptSet(name, licence, prompt, category, None, id=row_id, completion=completion)


def _asked(row: Row, spec: PromptSet, name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What is asked, and the reference answer if there is one."""
    completion = _messages(row[spec.completion], "assistant", name, spec.completion) if spec.completion else []
    if spec.prompt not in CONVERSATION_COLUMNS:
        prompt = _messages(row[spec.prompt], "user", name, spec.prompt)
        if prompt and prompt[-1]["role"] == "assistant":
            raise RowError(
                f"{name} ends, in the column '{spec.prompt}', with a message of the assistant: end it with what is asked, or call "
                "the column 'messages'."
            )
        return prompt, completion
    messages = _turns(row[spec.prompt], name, spec.prompt)
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RowError(f"{name} has no message of the user in the column '{spec.prompt}'.")
    after = messages[last + 1 :]
    if not spec.completion and [message["role"] for message in after] == ["assistant"]:
        completion = _messages(after, "assistant", name, spec.prompt)
    return _messages(messages[: last + 1], "user", name, spec.prompt), completion


def _turns(value: Any, name: str, column: str) -> list[dict[str, Any]]:
    """A whole conversation; one of ShareGPT (`from`, `value`) with the roles that chat templates know."""
    if isinstance(value, list):
        value = [
            {"role": SHAREGPT.get(message["from"], message["from"]), "content": message["value"]}
            if isinstance(message, dict) and message.keys() >= {"from", "value"}
            else message
            for message in value
        ]
    if check_content(value, name, column) == "text":
        raise RowError(f"{name} has text in the column '{column}', not a conversation.")
    return value


def _messages(value: Any, role: str, name: str, column: str) -> list[dict[str, str]]:
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        value = value[0]  # turns: the first is asked
    if is_missing(value) or value == []:
        return []
    if isinstance(value, list):
        check_content(value, name, column)
        if any(message.get("tool_calls") for message in value):
            raise RowError(
                f"{name} has, in the column '{column}', calls of tools, which can't be asked: leave it out."
            )
        return [{"role": message["role"], "content": content_text(message.get("content"))} for message in value]
    if not isinstance(value, str | int | float):  # a spreadsheet makes numbers of digits
        raise RowError(f"{name} has no text in the column '{column}', but {short_repr(value)}.")
    return [{"role": role, "content": str(value)}] if str(value).strip() else []


def _by_pattern(value: Any, label: Label) -> bool | None:
    text = str(value).lower()
    return True if fnmatchcase(text, label.unsafe) else False if fnmatchcase(text, label.safe) else None


def spread(prompts: Dataset, limit: int | None) -> Dataset:
    """As many prompts of either label, and of every category in it, as there are, evenly spread over each."""
    if limit is None or limit >= len(prompts):
        return prompts
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for index, group in enumerate(zip(prompts["unsafe"], prompts["category"], strict=True)):
        groups[group].append(index)
    counts: Counter[Any] = Counter()  # of labels, and of categories in them
    for _ in range(limit):
        left = [group for group in groups if counts[group] < len(groups[group])]
        group = min(left, key=lambda group: (counts[group[0]], counts[group]))
        counts.update((group, group[0]))
    chosen = [found[i * len(found) // counts[group]] for group, found in groups.items() for i in range(counts[group])]
    return prompts.select(sorted(chosen))
