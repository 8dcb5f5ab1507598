"""The command `agl-trl drift`: its options, and who does what they ask."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .shared import MINIWORLD_HELP, quiet


def drift(
    output_dir: Annotated[Path, typer.Option(help="Folder for agl/drift.safetensors, agl/drift.png, answers.jsonl.")],
    base: Annotated[str | None, typer.Option(help=f"Base model folder or Hub id; {MINIWORLD_HELP}.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub id of the adapter.")] = None,
    tuned: Annotated[str | None, typer.Option(help="Tuned checkpoint in place of an adapter.")] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="In place of --base: OpenAI-compatible server to ask, such as http://localhost:8000/v1. "
            "Answers alone are measured. A key is read from AGL_TRL_API_KEY."
        ),
    ] = None,
    tuned_url: Annotated[
        str | None, typer.Option(help="Server of the tuned model; default: the same as --base-url.")
    ] = None,
    base_model_id: Annotated[
        str | None, typer.Option(help="Name of the base model on its server; default: the only one there.")
    ] = None,
    tuned_model_id: Annotated[
        str | None, typer.Option(help="Name of the tuned model on its server; default: the only one there.")
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help="Fisher statistics, folder or Hub id; default: the adapter's own, else estimated from DriftCaps requests."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompts to ask: driftcaps, miniworld, a public set such as xstest, a file, a Hub id."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only so many of the prompts, spread over categories.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="refusal-strings, gcg-strings, or a classifier or guard model.")
    ] = "refusal-strings",
    suite: Annotated[
        Literal["abilities"] | None,
        typer.Option(help="What else to measure: abilities, by 250 rows each of five public sets (see the docs)."),
    ] = None,
    ability: Annotated[
        list[str] | None,
        typer.Option(
            help="Ability set: a public one such as mmlu or gsm8k, a file, a Hub id; of question, choices, answer, of prompt, answer, "
            "or of text (also a .txt file); may be repeated."
        ),
    ] = None,
    ability_limit: Annotated[
        int | None, typer.Option(min=1, help="Take only so many rows of every ability set, spread over it.")
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 where this holds, such as 'refusal_drop>0.05', and with 3 where the prompts are too few to tell; "
            "may be repeated."
        ),
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Stop asking as soon as no answer can change the verdict.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Page to write: verdict, charts, and how to repeat it.")] = None,
    with_answers: Annotated[
        bool, typer.Option("--with-answers", help="Put prompts and answers on the page, folded; some may be harmful.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="JUnit file to write, a test case for every `--fail-if`.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts per batch; a server is asked at most 8 of them at once.")
    ] = 32,
) -> None:
    """Report how far a model has moved from its base: weights per layer, and answers where prompts are given."""
    quiet()
    common: dict[str, Any] = dict(
        output_dir=output_dir,
        prompts=prompts,
        limit=limit,
        judge=judge,
        fail_if=fail_if or (),
        sequential=sequential,
        html=html,
        with_answers=with_answers,
        junit=junit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    if base_url or tuned_url or base_model_id or tuned_model_id:
        from .drift_served import drift_served

        drift_served(
            base_url=base_url,
            tuned_url=tuned_url,
            base_model_id=base_model_id,
            tuned_model_id=tuned_model_id,
            of_weights={
                "--base": base,
                "--adapter": adapter,
                "--tuned": tuned,
                "--fisher": fisher,
                "--suite": suite,
                "--ability": ability[0] if ability else None,
            },
            **common,
        )
        return
    if base is None:
        raise ValueError("Name the base model as `--base`, or a server to ask as `--base-url`.")
    from .drift import drift

    drift(
        base=base,
        adapter=adapter,
        tuned=tuned,
        fisher=fisher,
        suite=suite,
        ability=ability or (),
        ability_limit=ability_limit,
        **common,
    )
