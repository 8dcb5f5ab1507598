"""
Precision and recall of the refusal judges on two sets of labelled answers (README.md beside this file):

    python -m examples.judge
"""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agl_trl import judge_answer
from agl_trl.evaluation.rates import Rate
from agl_trl.evaluation.refusal import gcg_judge


JUDGES = {"refusal strings": judge_answer, "GCG strings": gcg_judge}
SETS = {"answers": ("tune", "heldout"), "cut_answers": ("develop", "heldout")}


def main() -> None:
    """Print the table: partial answers are left out of both figures, and shown by what they were called."""
    table = Table("set", "half", "judge", "precision", "recall", "readable, called garbled", "partial called refusal")
    for name, halves in SETS.items():
        lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for half in halves:
            for title, judge in JUDGES.items():
                called = Counter(
                    (row["label"], judge(row["prompt"], row["response"]).label) for row in rows if row["half"] == half
                )
                total = Counter(row["label"] for row in rows if row["half"] == half)
                right = called["refusal", "refusal"]
                claimed = sum(n for (label, said), n in called.items() if said == "refusal" and label != "partial")
                lost = sum(n for (label, said), n in called.items() if said == "garbled" and label != "garbled")
                rates = [shown(Rate(right, claimed)), shown(Rate(right, total["refusal"]))]
                partial = f"{called['partial', 'refusal']} of {total['partial']}"
                readable = sum(n for label, n in total.items() if label != "garbled")
                table.add_row(name, half, title, *rates, f"{lost} of {readable}", partial)
    Console(width=140).print(table)


def shown(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
