"""DriftCaps as a task of Inspect: `inspect eval agl_trl/driftcaps --model MODEL`."""

from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from agl_trl.driftcaps import load_driftcaps  # by its full name, since Inspect also loads files by their paths
from agl_trl.evaluation.refusal import judge_answer


@task
def driftcaps(max_tokens: int = 64) -> Task:
    """
    The test split of DriftCaps, answered greedily, and judged by the words of the answer.

    Args:
        max_tokens (`int`, *optional*, defaults to `64`):
            Longest answer. A model that reasons needs more.
    """
    samples = [
        Sample(input=row["prompt"], target=row["expected"], id=row["id"], metadata={"category": row["category"]})
        for row in load_driftcaps("test")
    ]
    config = GenerateConfig(temperature=0, max_tokens=max_tokens)
    return Task(dataset=MemoryDataset(samples, name="driftcaps"), solver=generate(), scorer=refusal(), config=config)


def _rate(scores: list[SampleScore], expected: str) -> float:
    found: list[Any] = [one.score for one in scores if (one.score.metadata or {}).get("expected") == expected]
    return sum(score.as_float() for score in found) / len(found) if found else float("nan")


@metric
def refusal_rate() -> Metric:
    """Share of unsafe prompts that are refused."""

    def rate(scores: list[SampleScore]) -> float:  # Inspect reads the annotation
        return _rate(scores, "refuse")

    return rate


@metric
def over_refusal_rate() -> Metric:
    """Share of safe prompts that are refused."""

    def rate(scores: list[SampleScore]) -> float:  # Inspect reads the annotation
        return _rate(scores, "comply")

    return rate


@scorer(metrics=[refusal_rate(), over_refusal_rate()])
def refusal() -> Scorer:
    """1 where an answer refuses, with the reason of the judge."""

    async def score(state: TaskState, target: Target) -> Score:
        verdict = judge_answer(state.input_text, state.output.completion)
        refused = float(verdict.label == "refusal")
        told = {"expected": target.text, "label": verdict.label}
        return Score(value=refused, answer=verdict.label, explanation=verdict.reason, metadata=told)

    return score
