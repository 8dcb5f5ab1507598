"""
Run time of the example script in two processes, with AGL and as TRL's own trainer, in turns:

    python -m examples.benchmark.processes
"""

import statistics as stats
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console


EXAMPLES = Path(__file__).parent.parent
PLAIN = dict(alignment_coef=0.0, alignment_dataset_name=None)  # TRL's trainer, bit for bit
VARIANTS = {"TRL": PLAIN, "default": {}, "penalty": dict(alignment_coef=3.0)}


def train_seconds(changes: dict, kind: str, steps: int, folder: str) -> float:
    """Seconds that the trainer reports for one run."""
    config = yaml.safe_load((EXAMPLES / "configs" / f"miniworld_{kind}.yaml").read_text())
    config |= dict(max_steps=steps, output_dir=folder, **changes)
    path = Path(folder) / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate/two_cpu_processes.yaml"]
    command = [sys.executable, *accelerate, EXAMPLES / f"{kind}.py", "--config", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split("'train_runtime': '")[1].split("'")[0])


def main(
    kind: Annotated[str, typer.Option(help="`sft` or `dpo`.")] = "sft",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 60,
) -> None:
    """Print the ratio of run times, median and range over rounds."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, changes in VARIANTS.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[variant].append(train_seconds(changes, kind, steps, folder))
    for variant, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["TRL"], strict=True)]
        Console().print(
            f"{variant}: {stats.median(values):.1f} s, ratio {stats.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    typer.run(main)
