"""What importing the package costs, what it needs and says so, and what happens where an extra is missing."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from agl_trl import DriftReport, FisherStatistics


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agl_trl"
OF_EXTRAS = {"matplotlib", "scipy", "gradio"}
# What the Hub's client speaks HTTP with, which it brings: the older one before its version 2. And a front end and a harness that import us.
BROUGHT = {"httpx", "httpx2", "axolotl", "inspect_ai"}
HEAVY = OF_EXTRAS | {"jinja2", "ruamel"}
# TRL by those that train; the callback works in any Trainer.
TRL_FOLDERS = {"trainer", "scripts", "experiments"}
WITHOUT_TRL = {
    f"trainer/{name}.py"
    for name in [
        "anchor",
        "callback",
        "checks",
        "config",
        "drift_callback",
        "evidence",
        "gradients",
        "regularizer",
        "resume",
    ]
}


def run(code: str, *arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, on the package of this folder."""
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_package_imports_in_no_time_and_without_torch():
    report = run("import agl_trl; agl_trl.__version__", options=("-X", "importtime")).stderr
    cumulative = {
        name.strip(): int(total) for _, total, name in re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| (.+)", report)
    }
    assert cumulative["agl_trl"] <= 300_000, "microseconds"
    assert not {name.partition(".")[0] for name in cumulative} & {*HEAVY, "torch", "transformers", "numpy"}


def test_trainer_loads_nothing_heavy_beyond_what_trls_own_does():
    code = """
import json, sys
from trl import SFTTrainer
before = {*sys.modules}
from agl_trl import AGLSFTTrainer
print(json.dumps(sorted({*sys.modules} - before)))
"""
    added = json.loads(run(code).stdout)
    assert "agl_trl.trainer.base" in added and "agl_trl.drift.plots" in added
    assert not [name for name in added if name.partition(".")[0] in HEAVY]


def test_callback_statistics_and_report_load_no_trl():
    code = """
import json, sys
from agl_trl import AlignGuardCallback, AlignGuardConfig, DriftCallback, DriftReport, FisherStatistics, estimate_fisher
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    loaded = {*json.loads(run(code).stdout)}
    assert "peft" in loaded and not loaded & {"trl", "matplotlib", "gradio"}


def imported(tree: ast.Module, whole: bool) -> set[str]:
    """Top-level names of other packages that a file imports: anywhere in it, or (not `whole`) as soon as it is imported itself."""
    nodes = ast.walk(tree) if whole else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found - {*sys.stdlib_module_names, "agl_trl"}


def normalised(requirement: str) -> str:
    """Name of a distribution as package indexes compare it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def test_whatever_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = {normalised(requirement) for requirement in project["dependencies"]}
    extras = {name: {*map(normalised, listed)} for name, listed in project["optional-dependencies"].items()}
    wanted = extras["report"] | extras["space"] | extras["qlora"] | extras["deepspeed"] | extras["trackers"]
    distributions, used, wrong = packages_distributions(), set(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree, place = ast.parse(path.read_text()), path.relative_to(PACKAGE)
        at_once = imported(tree, whole=False)
        for root in sorted(imported(tree, whole=True) - BROUGHT):
            names = {normalised(name) for name in distributions.get(root, [root])}
            used |= names
            if not names & (always | wanted):
                wrong.append(f"{place} imports {root}, which is not declared")
            # The app is imported as a whole or not at all; everywhere else an extra may be missing.
            elif root in at_once and not names & always and place.parts[0] != "space":
                wrong.append(f"{place} imports {root} at once, which an extra alone brings")
    assert not wrong, "\n".join(wrong)
    assert not always - used, "declared, and never imported"


def test_trl_is_imported_by_those_that_train():
    wrong = [
        place.as_posix()
        for path in sorted(PACKAGE.rglob("*.py"))
        for place in [path.relative_to(PACKAGE)]
        if "trl" in imported(ast.parse(path.read_text()), whole=False)
        and (place.parts[0] not in TRL_FOLDERS or place.as_posix() in WITHOUT_TRL)
        and place.as_posix() != "miniworld/build.py"
    ]
    assert not wrong, ", ".join(wrong)


WITHOUT_EXTRAS = """
import json, logging, sys
from pathlib import Path
sys.modules |= dict.fromkeys(json.loads(sys.argv[2]))  # None: as if they were not installed
from peft import LoraConfig
from agl_trl import AGLSFTConfig, AGLSFTTrainer, DriftReport
from agl_trl.artifacts.extras import MissingExtra
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.rates import Rate
from agl_trl.experiments.demo import TRAINING, run_demo
from agl_trl.miniworld import alignment_dataset, heldout_prompts, load_model, load_tokenizer, task_dataset

folder = Path(sys.argv[1])
(folder / "agl").mkdir()
(folder / "agl" / "drift.png").write_bytes(b"of an earlier run")
trainer = AGLSFTTrainer(
    model=load_model(),
    args=AGLSFTConfig(str(folder), max_steps=2, **TRAINING | {"save_strategy": "steps", "save_steps": 1}),
    train_dataset=task_dataset("extract").select(range(64)),
    processing_class=load_tokenizer(),
    peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    alignment_dataset=alignment_dataset().select(range(16)),
)
trainer.train()
trainer.save_model()
trainer.create_model_card()

def scaling():
    from agl_trl.experiments import scaling_law

def app():
    from agl_trl.space import build_app

said = []
for attempt in (
    lambda: measure_behaviour(trainer.model, load_tokenizer(), heldout_prompts(), progress=False),
    lambda: run_demo(folder / "demo"),
    lambda: Rate(1, 2).interval,
    scaling,
    app,
):
    try:
        attempt()
    except MissingExtra as error:
        said.append(str(error))
print("SAID " + json.dumps(said))
"""


def test_without_extras_training_saves_its_evidence_and_the_rest_says_what_is_missing(tmp_path):
    done = run(WITHOUT_EXTRAS, tmp_path, json.dumps(sorted(OF_EXTRAS)))
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert DriftReport.from_pretrained(folder).adapter_sha256 is not None
        assert FisherStatistics.from_pretrained(folder).num_tokens > 0
        assert not (folder / "agl" / "drift.png").exists(), "none, and none of an earlier run"
    assert "relative drift" in (tmp_path / "README.md").read_text().lower()
    warning = "There is no picture beside the drift report. Pictures need matplotlib: pip install 'agl-trl[report]'."
    assert done.stderr.count(warning) == 1
    tests = "Intervals and tests of refusal rates need scipy: pip install 'agl-trl[report]'."
    assert json.loads(done.stdout.partition("SAID ")[2]) == [
        *[tests] * 3,
        "Fits of the scaling law need scipy: pip install 'agl-trl[report]'.",
        "Comparisons in the browser need gradio: pip install 'agl-trl[space]'.",
    ]
    assert not (tmp_path / "demo").exists()


def test_command_without_its_extra_ends_with_one_sentence(tmp_path):
    code = """
import sys
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(","))
from agl_trl.cli.app import main
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
"""
    done = run(code, ",".join(sorted(OF_EXTRAS)), "scaling", "--output-dir", tmp_path)
    assert done.stderr == "agl-trl: Fits of the scaling law need scipy: pip install 'agl-trl[report]'.\n"
    assert not [*tmp_path.iterdir()], "told before any run is made"
