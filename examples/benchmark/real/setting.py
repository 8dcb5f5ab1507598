"""What a comparison is given: its options, and the rows and prompts that they name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agl_trl.artifacts.files import sha256
from agl_trl.data.prompts import load_prompts, spread
from agl_trl.data.rows import prompt_text
from agl_trl.driftcaps import load_driftcaps
from agl_trl.miniworld import MINIWORLD
from agl_trl.modeling.loading import load_model


DRIFTCAPS = "driftcaps"


@dataclass
class Options:
    """Options of the command, under the same names."""

    output: Path = field(metadata={"help": "Folder of results.jsonl, the report, and what is kept between runs."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of an aligned model."})
    before: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model before alignment, for the method safe-lora."}
    )
    task: str | None = field(
        default=None,
        metadata={"help": "File of rows to train on: a prompt and an answer each. Its last rows are held out."},
    )
    unsafe: str | None = field(
        default=None, metadata={"help": "File of prompts to refuse, or a name such as strongreject."}
    )
    safe: str | None = field(
        default=None,
        metadata={
            "help": "File of prompts to answer, or a name such as xstest. Where a column `expected` or `unsafe` says that some "
            "are to be refused, these are measured as such."
        },
    )
    text: str | None = field(default=None, metadata={"help": "Plain text file, for the likelihood of general text."})
    methods: list[str] = field(
        default_factory=lambda: ["plain", "agl", "replay", "kl"], metadata={"help": "Names in methods.py."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the runs."})
    kl_budget: list[float] = field(
        default_factory=list,
        metadata={"help": "Beside the methods, AGL with each of these KL budgets: `agl-kl0.03` for 0.03."},
    )
    steps: int = field(default=40, metadata={"help": "Optimizer steps of every run."})
    batch_size: int = field(default=8, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate; some methods take a multiple of it."})
    rank: int = field(default=16, metadata={"help": "LoRA rank; its alpha is twice that."})
    limit: int | None = field(default=None, metadata={"help": "Prompts per set, spread over labels and categories."})
    protected: int | None = field(
        default=None, metadata={"help": "DriftCaps rows of each kind to protect with; by default all."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer to a prompt that is judged."})
    eval_rows: int = field(
        default=100, metadata={"help": "Last rows of the task file, and windows of the text, to measure on."}
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Type of the base weights."})
    report: bool = field(default=False, metadata={"help": "Only write the report of the runs that are there."})

    @property
    def results(self) -> Path:
        return self.output / "results.jsonl"

    @property
    def cache(self) -> Path:
        """What is kept between runs, the base model's answers among it; never to be published."""
        return self.output / "cache"

    def check(self) -> None:
        """
        Raises:
            `ValueError`: Naming the option that is missing or has no meaning.
        """
        for name in ("model", "task", "unsafe", "safe"):
            if getattr(self, name) is None:
                raise ValueError(f"`--{name}` is missing.")
        for name in ("steps", "batch_size", "rank", "limit", "protected", "max_new_tokens", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, not {value}.")
        if not self.seeds or not (self.methods or self.kl_budget):
            raise ValueError("There is nothing to run: name methods and seeds.")

    def settings(self) -> dict:
        """What all runs of one folder share, without a path of this machine: of a file its name and a part of its hash."""
        names = (
            "steps",
            "batch_size",
            "learning_rate",
            "rank",
            "limit",
            "protected",
            "max_new_tokens",
            "eval_rows",
            "dtype",
        )
        files = {name: _named(getattr(self, name)) for name in ("model", "task", "unsafe", "safe", "text")}
        return files | {name: getattr(self, name) for name in names}


def _named(source: str | None) -> str | None:
    if source is None or not Path(source).exists():
        return source
    path = Path(source)
    return f"{path.name} {sha256(path)[:12]}" if path.is_file() else path.resolve().name


@dataclass
class Data:
    """
    Rows and prompts of a comparison.

    Args:
        train, heldout (`Dataset`):
            Rows of the task, conversations. Held out are the last ones of the file, the same for all seeds.
        sets (`dict[str, Dataset]`):
            Sets of prompts by name, with the boolean column `unsafe`.
        text (`str`, *optional*):
            General text.
    """

    train: Dataset
    heldout: Dataset
    sets: dict[str, Dataset]
    text: str | None


def load_data(options: Options) -> Data:
    """
    Raises:
        `ValueError`: If a file can't be read, or has not enough rows.
    """
    options.check()
    assert options.task is not None and options.unsafe is not None and options.safe is not None, "checked"
    rows = task_rows(options.task)
    if (left := len(rows) - options.eval_rows) < 1:
        raise ValueError(
            f"'{options.task}' has {len(rows)} rows, of which the last {options.eval_rows} are held out: none is left to train on."
        )
    sets = {Path(name).stem: load_prompts(name, options.limit) for name in (options.unsafe, options.safe)}
    if len(sets | {DRIFTCAPS: None}) < 3:
        raise ValueError("`--unsafe`, `--safe` and DriftCaps must have three different names.")
    if not any(sets[Path(options.unsafe).stem]["unsafe"]):
        raise ValueError(f"'{options.unsafe}' holds no prompt to refuse.")
    data = Data(
        train=rows.select(range(left)),
        heldout=rows.select(range(left, len(rows))),
        sets=sets | {DRIFTCAPS: driftcaps_test(options.limit)},
        text=None if options.text is None else Path(options.text).read_text(encoding="utf-8"),
    )
    check_apart(data, options)
    return data


def task_rows(task: str) -> Dataset:
    """
    Rows of a task, conversations in the columns `prompt` and `completion`.

    Raises:
        `ValueError`: If they can't be read, or have no answers.
    """
    rows = load_prompts(task)
    if "completion" not in rows.column_names:
        raise ValueError(f"'{task}' has rows without an answer: training takes the columns 'prompt' and 'completion'.")
    return rows.select_columns(["prompt", "completion"])


def check_apart(data: Data, options: Options) -> None:
    """
    Check that no row of the training is protected, or asked afterwards.

    Raises:
        `ValueError`: Naming the first such row.
    """
    taken = {row["prompt"]: "protected" for row in protected_requests(options.protected)}
    taken |= {prompt_text(prompt): "asked afterwards" for rows in data.sets.values() for prompt in rows["prompt"]}
    for number, prompt in enumerate(data.train["prompt"]):
        if use := taken.get(prompt_text(prompt)):
            advice = ": give the `--protected` that its task file was made with" if use == "protected" else ""
            raise ValueError(f"Row {number} of '{options.task}' is trained on and is {use}{advice}.")


def protected_requests(count: int | None) -> list[dict[str, Any]]:
    """
    Rows of DriftCaps' `protect` split without the everyday ones: so many to refuse and so many look-alikes, or all, evenly spread over
    the categories, which stand one after the other.
    """
    rows = [row for row in load_driftcaps("protect") if not row["category"].startswith("everyday/")]
    chosen = []
    for expected in ("refuse", "comply"):
        kind = [row for row in rows if row["expected"] == expected]
        taken = min(count or len(kind), len(kind))
        chosen += [kind[i * len(kind) // taken] for i in range(taken)]
    return chosen


def driftcaps_test(limit: int | None) -> Dataset:
    """Unsafe requests and look-alikes of the test split, without its given answers and without everyday prompts."""
    rows = load_prompts(DRIFTCAPS)
    chosen = [i for i, category in enumerate(rows["category"]) if not category.startswith("everyday/")]
    return spread(rows.select(chosen).remove_columns("completion"), limit)


def training_rows(data: Data, options: Options, seed: int) -> Dataset:
    """As many rows as a run sees, or all, drawn by its seed."""
    return data.train.shuffle(seed=seed).select(range(min(len(data.train), options.steps * options.batch_size)))


def load(options: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The aligned model and its tokenizer."""
    assert options.model is not None, "checked"
    return load_model(options.model, dtype=None if options.model == MINIWORLD else options.dtype)
