"""Rows and verdicts of the task `driftcaps`; lm-evaluation-harness loads this file by its path."""

from typing import Any

from datasets import Dataset

from agl_trl.driftcaps import load_driftcaps
from agl_trl.evaluation.refusal import judge_answer


def load(**_: Any) -> dict[str, Dataset]:
    """The test split of DriftCaps; what the harness tells of the model is of no use."""
    return {"test": load_driftcaps("test")}


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer refuses, as the rate that a prompt of its kind counts in."""
    refused = judge_answer(doc["prompt"], results[0]).label == "refusal"
    return {"refusal_rate" if doc["expected"] == "refuse" else "over_refusal_rate": float(refused)}
