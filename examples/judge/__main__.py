"""
Precision and recall of the refusal judges on labelled answers (README.md beside this file):

    python -m examples.judge
"""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agl_trl.evaluation.behaviour import Rate
from agl_trl.evaluation.refusal import gcg_judge, judge_answer


JUDGES = {"refusal strings": judge_answer, "GCG strings": gcg_judge}


def main() -> None:
    """Print the table: partial answers are left out of both figures, and shown by what they were called."""
    rows = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()]
    table = Table(
        "judge", "half", "precision", "recall", "partial called refusal", "garbled called refusal, compliance"
    )
    for name, judged in JUDGES.items():
        for half in ("tune", "heldout"):
            called = Counter(
                (row["label"], judged(row["prompt"], row["response"]).label) for row in rows if row["half"] == half
            )
            total = Counter(row["label"] for row in rows if row["half"] == half)
            right = called["refusal", "refusal"]
            claimed = sum(called[label, "refusal"] for label in ("refusal", "compliance", "garbled"))
            cells = [Rate(right, claimed), Rate(right, total["refusal"])]
            partial = f"{called['partial', 'refusal']} of {total['partial']}"
            garbled = f"{called['garbled', 'refusal']}, {called['garbled', 'compliance']} of {total['garbled']}"
            table.add_row(name, half, *(shown(rate) for rate in cells), partial, garbled)
    Console(width=120).print(table)


def shown(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
