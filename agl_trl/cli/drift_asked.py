"""What `agl-trl drift` is asked for: rules, files and prompts, checked before a model is loaded or a server asked."""

from collections.abc import Sequence
from pathlib import Path

import typer
from datasets import Dataset
from torch import Tensor

from ..artifacts.files import check_file, check_writable
from ..artifacts.location import shown_name
from ..data.abilities import AbilitySet, load_abilities
from ..data.labels import unsafe_column
from ..data.prompts import load_prompts
from ..drift.gate import hopeless
from ..drift.thresholds import Condition, check_measurable, on_sets


def rules_of(
    fail_if: Sequence[str],
    *,
    sequential: bool,
    prompts: str | None,
    html: Path | None,
    with_answers: bool,
    junit: Path | None,
) -> list[Condition]:
    """
    The rules, where no option beside them is without its meaning; arguments as in [`drift`].

    Raises:
        `ValueError`: If a rule can't be read, or an option is about another that is not there.
    """
    conditions = [Condition.parse(text) for text in fail_if]
    if not conditions and (sequential or junit is not None):
        raise ValueError(f"`{'--sequential' if sequential else '--junit'}` is about rules: set one as `--fail-if`.")
    if sequential and prompts is None:
        raise ValueError("`--sequential` is about asking: name prompts as `--prompts`.")
    if with_answers and html is None:
        raise ValueError("`--with-answers` is about the page: name it as `--html`.")
    return conditions


def check_files(output_dir: Path, *files: Path | None) -> None:
    """
    Check that a folder and files can be written.

    Raises:
        `OSError`: If one can't.
    """
    check_writable(output_dir)
    for file in files:
        if file is not None:
            check_file(file)


def load_asked(
    prompts: str | None,
    limit: int | None,
    conditions: Sequence[Condition],
    *,
    ability: Sequence[str] = (),
    suite: bool = False,
    ability_limit: int | None = None,
    served: bool = False,
) -> tuple[Dataset | None, Tensor | None, list[AbilitySet], list[Condition]]:
    """
    Prompts, which of them are unsafe (nothing where none are named), ability sets, and the rules on them, a rule for every set that
    it is on; rules that can't pass are told.

    Args:
        prompts (`str`, *optional*):
            Prompts to ask, as [`load_prompts`] takes them.
        limit (`int`, *optional*):
            Number of prompts asked.
        conditions (`Sequence[Condition]`):
            Rules.
        ability (`Sequence[str]`, *optional*):
            Ability sets, as [`load_ability`] takes them.
        suite (`bool`, *optional*, defaults to `False`):
            Whether the suite of public sets is measured, too.
        ability_limit (`int`, *optional*):
            Most rows of every set.
        served (`bool`, *optional*, defaults to `False`):
            Whether servers are asked.

    Raises:
        `ValueError`: If prompts or sets don't load, or a rule can't be measured on them.
    """
    questions = None if prompts is None else load_prompts(prompts, limit)
    unsafe = None if questions is None else unsafe_column(questions)
    check_measurable(conditions, unsafe, served=served)
    sets = load_abilities(ability, suite=suite, limit=ability_limit)
    rules = on_sets(conditions, {one.name: one.kind == "text" for one in sets})
    for sentence in hopeless(rules, unsafe, {one.name: len(one.rows) for one in sets}):
        typer.echo(f"Note: {sentence}")
    return questions, unsafe, sets, rules


def described(name: str, prompts: Dataset) -> dict[str, str | int | None]:
    """Prompts as a report names them."""
    return {"name": shown_name(name), "license": prompts.info.license, "count": len(prompts)}
