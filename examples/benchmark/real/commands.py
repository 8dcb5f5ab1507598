"""
Run the README's commands on a real model, one after the other, and say what each costs:

    python -m examples.benchmark.real.commands --model ID --task rows.jsonl --prompts prompts.jsonl --output outputs/commands

Every command is a process of its own, as a user would start it: statistics, the same of the model in 4 bits, a training through
`accelerate launch` with a YAML file, drift, evidence attached to the adapter, a projection of it, the app, which is asked once. With
`--repo user/name` also a push to the Hub, and the drift of what comes back from there. Time is from start to end, with
imports and loading. Memory is the largest that the process (or one that it started) had resident, over the size of the model's files.
A command that has ended is not repeated: what was interrupted goes on where it stopped.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import copytree, rmtree

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from agl_trl.artifacts.files import check_writable


GIB = 2**30
LINES_FILE, TRAINED, ATTACHED = "commands.jsonl", "adapter", "attached"


@dataclass
class Options:
    """Options of the command, under the same names."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with a chat template."})
    task: str = field(metadata={"help": "File with rows to train on."})
    prompts: str = field(metadata={"help": "File with prompts to ask."})
    output: Path = field(metadata={"help": "Folder of what is written."})
    rows: int = field(default=256, metadata={"help": "Rows of the statistics."})
    limit: int = field(default=100, metadata={"help": "Prompts asked, of both models."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    steps: int = field(default=5, metadata={"help": "Optimizer steps of the training, of 8 rows."})
    dtype: str = field(default="bfloat16", metadata={"help": "Type of the weights in training and statistics."})
    repo: str | None = field(
        default=None, metadata={"help": "Repo on the Hub to push to; by default there is no push."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of commands; by default all of them."})


@dataclass
class Cost:
    """What one command took, in seconds and bytes."""

    name: str
    seconds: float
    peak_bytes: int
    model_bytes: int
    code: int


def plan(options: Options) -> dict[str, list[str]]:
    """The commands by name, in the order in which they need each other."""
    out, launched = options.output, [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    agl = [str(Path(sys.executable).with_name("agl-trl"))]
    adapter, statistics = str(out / TRAINED), str(out / "fisher")
    fisher = [*agl, "fisher", "--model", options.model, "--dataset", "driftcaps", "--num-samples", str(options.rows)]
    fisher += ["--dtype", options.dtype]
    asked = [
        "--prompts",
        options.prompts,
        "--limit",
        str(options.limit),
        "--max-new-tokens",
        str(options.max_new_tokens),
    ]
    based = ["--base", options.model]
    hub: dict[str, list[str]] = {}
    if options.repo is not None:
        hub["push"] = [*agl, "push", str(out / ATTACHED), options.repo]
        hub["load back"] = [*agl, "drift", *based, "--adapter", options.repo, "--output-dir", str(out / "back")]
    return {
        "fisher": [*fisher, "--output-dir", statistics],
        "fisher --bits 4": [*fisher, "--bits", "4", "--output-dir", f"{statistics}-4bit"],
        "train": [*launched, "-m", "agl_trl.scripts.sft", "--config", str(out / "train.yaml")],
        "drift": [*agl, "drift", *based, "--adapter", adapter, *asked, "--output-dir", str(out / "report")],
        "attach": [*agl, "attach", str(out / ATTACHED), *based, *asked[:2], "--limit", "20"],
        "project": [*agl, "project", adapter, *based, "--budget", "1e-6", "--output-dir", str(out / "projected")],
        "space": [sys.executable, "-m", "examples.benchmark.real.ask_space", *based, "--adapter", adapter],
    } | hub


def main(options: Options) -> int:
    """
    Run what has not been run, and print the table.

    Returns:
        `int`: 1 if a command failed, 0 otherwise.

    Raises:
        `ValueError`: If there is no such command.
        `OSError`: If the folder can't be written.
    """
    commands = plan(options)
    if unknown := [name for name in options.only if name not in commands]:
        raise ValueError(f"There is no command '{unknown[0]}'; known are {', '.join(commands)}.")
    check_writable(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = options.output / LINES_FILE
    told = [Cost(**json.loads(line)) for line in lines.read_text().splitlines()] if lines.exists() else []
    costs = [cost for cost in told if cost.code == 0]
    done = {cost.name for cost in costs}
    model_bytes = size_of(options.model)
    (options.output / "train.yaml").write_text(yaml.safe_dump(training(options)))
    for name, command in commands.items():
        if name in done or (options.only and name not in options.only):
            continue
        if name == "attach":  # beside the adapter as it was, which `project` reads
            rmtree(options.output / ATTACHED, ignore_errors=True)
            copytree(options.output / TRAINED, options.output / ATTACHED)
        Console().rule(name)
        cost = run(name, command, model_bytes)
        costs.append(cost)
        with lines.open("a") as file:
            file.write(json.dumps(asdict(cost)) + "\n")
        if cost.code and name == "train":
            break  # the others are about its adapter
    Console().print(table(costs))
    return int(any(cost.code for cost in costs))


def training(options: Options) -> dict[str, object]:
    """What the training is called with, as a YAML file has it."""
    return {
        "model_name_or_path": options.model,
        "dtype": options.dtype,
        "dataset_name": options.task,
        "fisher_path": str(options.output / "fisher"),
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "output_dir": str(options.output / TRAINED),
        "max_steps": options.steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.dtype == "bfloat16",
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
    }


def size_of(model: str) -> int:
    """
    Bytes of the model's weights on disk, which are downloaded where they are not there.

    Raises:
        `ValueError`: If they can't be had.
    """
    try:
        folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"Can't get the model '{model}', which is no folder here: {reason}") from error
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(name: str, command: list[str], model_bytes: int) -> Cost:
    """Run a command to its end, with its output as it comes."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)  # the only wait that tells of this child alone, and of what it started
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(name, time.monotonic() - start, usage.ru_maxrss * unit, model_bytes, os.waitstatus_to_exitcode(status))


def table(costs: list[Cost]) -> Table:
    """The costs, a row each; a command that failed says so."""
    shown = Table("command", "seconds", "memory", "of the model's size", "")
    for cost in costs:
        ratio = f"{cost.peak_bytes / cost.model_bytes:.2f} x" if cost.model_bytes else "not known"
        failed = f"failed with exit code {cost.code}" if cost.code else ""
        shown.add_row(cost.name, f"{cost.seconds:.0f}", f"{cost.peak_bytes / GIB:.2f} GiB", ratio, failed)
    return shown


if __name__ == "__main__":
    try:
        sys.exit(main(HfArgumentParser(Options).parse_args_into_dataclasses()[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"commands: {error}")
