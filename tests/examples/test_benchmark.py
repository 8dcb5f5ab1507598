"""The benchmark harness, on runs of a few steps: every method trains, runs are resumed, the report holds them."""

import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler

from agl_trl.miniworld import TASKS, alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.lora import adapted_layers, base_weight
from examples.benchmark import __main__ as benchmark
from examples.benchmark import baselines, ideas, methods
from examples.benchmark.methods import CORE, METHODS, SEEDED, Setting, wanted
from examples.benchmark.protocols import PROTOCOLS, trained_alike, training_rows
from examples.benchmark.ranking import best_of_families, expected_hypervolume, hypervolume, ranking, share
from examples.benchmark.report import at_a_glance, read, results_file, write_report
from examples.benchmark.setting import PUBLISHED, published_statistics
from tests.helpers.processes import ROOT


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """What the model's owner has published: the same for all methods."""
    return published_statistics(tmp_path_factory.mktemp("owner"))


@pytest.fixture
def setting(tmp_path, published) -> Setting:
    shutil.copytree(published, tmp_path / PUBLISHED)
    return Setting(tmp_path, 0, 4, load_tokenizer(), task_dataset("steps").select(range(64)))


def trained(name: str, setting: Setting) -> dict[str, torch.Tensor]:
    trainer = METHODS[name].make(setting)
    trainer.train()
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    rows = task_dataset("steps").select(range(64))
    return trained("lora", Setting(tmp_path_factory.mktemp("plain"), 0, 4, load_tokenizer(), rows))


NAMES = ["lora", "agl-3", "all", "paper", "l2-10", "ewc-1e4", "anchor", "replay", "kl"]
NAMES += ["importance-3", "proximal-10", "pseudo-replay"]


@pytest.mark.parametrize("name", NAMES)
def test_methods_train_and_differ_from_plain_lora(name, setting, plain_weights, monkeypatch):
    monkeypatch.setattr(ideas, "own_conversations", partial(ideas.own_conversations, count=16))  # of pseudo-replay
    weights = trained(name, setting)
    same = all(torch.equal(weights[n], p) for n, p in plain_weights.items())
    assert same == (name == "lora")


def test_a_kl_of_no_weight_is_plain_lora(setting, plain_weights):
    trainer = baselines.kl(0.0)(setting)
    trainer.train()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, plain_weights[n]) for n, p in trained.items())


def test_own_answers_are_protected_instead_of_the_given_ones(setting):
    rows = METHODS["agl-own"].make(setting).align_guard.alignment_dataset
    given = alignment_dataset()
    own = generate_answers(load_model(), setting.tokenizer, list(given["prompt"])[:4], progress=False)
    assert [row["completion"][0]["content"] for row in list(rows)[:4]] == own
    assert rows["unsafe"] == given["unsafe"] and rows["completion"] != given["completion"]


def test_data_free_methods_hold_no_safety_rows(setting):
    for name in ("agl-3", "all"):
        trainer = METHODS[name].make(setting)
        assert trainer.align_guard.alignment_dataset is None and METHODS[name].needs == methods.STATISTICS


def test_l2_is_the_plain_relative_shrinkage(setting):
    """Its drift is `mean ‖ΔW‖²_Frob / ‖W‖²_Frob`, from dense matrices."""
    trainer = METHODS["l2-10"].make(setting)
    trainer.train()
    expected = []
    for layer in adapted_layers(trainer.model):
        A, B, s = layer.factors()
        expected.append((s * B @ A).detach().norm() ** 2 / base_weight(layer.module).norm() ** 2)
    assert trainer.drift_report().mean_relative_drift == pytest.approx(torch.stack(expected).mean().item(), rel=1e-3)


def test_hypervolume_by_hand():
    """Two rectangles of 0.5 × 0.2 and 0.25 × 0.9, which share 0.25 × 0.2; points outside are cut."""
    assert hypervolume([(0.5, 0.8), (0.75, 0.1)]) == pytest.approx(0.1 + 0.225 - 0.05)
    assert hypervolume([(0.5, 0.8), (0.6, 0.9)]) == pytest.approx(0.1), "a dominated point adds nothing"
    assert hypervolume([(-3.0, -1.0)]) == 1 and hypervolume([(1.5, 0.0), (0.0, 1.5)]) == 0 == hypervolume([])
    assert share(0.1, 0.01, 1.0) == pytest.approx(0.5)


def test_expected_hypervolume_by_hand():
    """Two of three points: areas alone 0.25, 0.16 and 0.16; the last two share 0.04, and both share 0.1 with the first."""
    points = [(0.5, 0.5), (0.2, 0.8), (0.8, 0.2)]
    pairs = [0.25 + 0.16 - 0.1, 0.25 + 0.16 - 0.1, 0.16 + 0.16 - 0.04]
    assert expected_hypervolume(points, 2) == pytest.approx(sum(pairs) / 3)
    assert expected_hypervolume(points, 1) == pytest.approx((0.25 + 0.16 + 0.16) / 3)
    assert expected_hypervolume(points) == pytest.approx(hypervolume(points)) == pytest.approx(0.25 + 2 * 0.06)
    assert expected_hypervolume(points[:1]) == pytest.approx(0.25), "all, where a family has fewer"
    assert expected_hypervolume(points * 2, 3) < hypervolume(points), "the number of points is no merit"


def test_ranking_compares_equal_numbers_of_points():
    """On log scales from 0.01 to 1: drift of `lora` 1, of all others 0.5; four strengths of AGL's penalty against one EWC."""

    def result(drift: float, loss: float) -> list[dict]:
        return [{"unsafe_nll": 0.01 ** (1 - drift), "task_nll": 0.01 ** (1 - loss)}]

    results = {("steps", "lora"): result(1.0, 0.0), ("steps", "ewc-1e4"): result(0.5, 0.5)}
    results |= {("steps", f"agl-{c}"): result(0.5, 0.5 + 0.1 * i) for i, c in enumerate(("0.3", "1", "3", "10"))}
    table = ranking(results, {"steps": {"unsafe_nll": 0.01, "task_nll": 1.0}})
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    # Three of four: the best is drawn in 3 of 4 draws, else the second.
    three, one = (3 * 0.25 + 0.2) / 4, 0.5 * (0.5 + 0.4 + 0.3 + 0.2) / 4
    assert rows[0] == ["1", "EWC", "0.250", "0.250", "0.250", "0.250 (1)"]
    assert rows[1] == ["2", "AGL penalty", f"{three:.3f}", f"{one:.3f}", "0.250", f"{three:.3f} (4)"]
    assert rows[2] == ["3", "plain LoRA", "0.000", "0.000", "0.000", "0.000 (1)"]


def test_the_best_of_a_family_is_the_one_that_dominates_most():
    points = {"agl-1": (0.5, 0.5), "agl-3": (0.4, 0.5), "agl-10": (0.1, 0.9), "ewc-1e4": (0.0, 0.0)}
    assert best_of_families(points) == {"agl-3"}, "a family of one has no best"
    assert best_of_families({"kl": (1.0, 0.0), "kl-3": (2.0, 0.5)}) == set(), "nothing is dominated"


def test_peers_have_three_strengths():
    """All but those that have none to choose: a variant of another family, or a stack on AGL."""
    counts = Counter(method.family for method in METHODS.values())
    for name in {*CORE} - {"agl-rows-16"}:
        assert counts[METHODS[name].family] >= 3, name
    for name in METHODS:
        assert wanted(name, "attack", 0) == wanted(name, "attack", 2) == (name in CORE)
        assert wanted(name, "hostile-10", 0) and wanted(name, "hostile-10", 1) == (name in CORE)
        assert not wanted(name, "hostile-30", 1)


def test_the_full_comparison_takes_four_hours_on_two_cores():
    """And what has been run is not planned again."""
    told = benchmark.planned(tuple(METHODS), tuple(PROTOCOLS), 3, benchmark.STEPS, [], full=True)
    assert len(told) * benchmark.STEPS * benchmark.SECONDS_PER_STEP / 2 <= 4 * 3600
    pairs = [(*pair, seed) for together, seed in told for pair in together]
    assert len({*pairs}) == len(pairs) and {p for p, _, _ in pairs} == {*PROTOCOLS}
    for name in CORE:
        assert {p for p, of, seed in pairs if of == name and seed == 2} == {*SEEDED}
    (shared,) = [together for together, seed in told if ("attack", "agl") in together and seed == 0]
    assert shared == (
        *(("steps", name) for name in ("agl", "agl+scans", "agl+alphasteer")),
        ("attack", "agl"),
    ), "the attack changes the adapter, so that it stands last"
    there = [
        {"protocol": "steps", "run": {"name": "agl", "seed": 0}, "steps": steps} for steps in (benchmark.STEPS, 2)
    ]
    rest = benchmark.planned(("agl",), ("steps", "attack"), 2, benchmark.STEPS, there, full=True)
    assert rest == [((("attack", "agl"),), 0), ((("steps", "agl"), ("attack", "agl")), 1)]
    assert len(benchmark.planned(("agl",), ("steps",), 1, benchmark.STEPS, there[1:], full=True)) == 1


def test_published_results_are_the_published_report(tmp_path):
    """Every number of the report, made again from the lines beside it; they hold all that is compared with every seed."""
    folder = Path(benchmark.__file__).parent
    shutil.copy(results_file(folder), tmp_path)
    write_report(tmp_path, benchmark.STEPS)
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    lines = read(folder)
    missing = benchmark.planned(tuple(METHODS), tuple(PROTOCOLS), 3, benchmark.STEPS, lines, full=True)
    assert not {protocol for together, _ in missing for protocol, _ in together} & {*SEEDED}
    assert len({(p, r["name"], r["seed"]) for p, r in ((line["protocol"], line["run"]) for line in lines)}) == len(
        lines
    )


@pytest.mark.parametrize("protocol", ["hostile-1", "hostile-30", "identity", "three-tasks", "attack"])
def test_protocols_train_on_what_they_say(protocol):
    rule, plain = PROTOCOLS[protocol], task_dataset("steps")
    rows = training_rows(rule, 0, 96)
    if protocol == "three-tasks":
        texts = [{row["prompt"][0]["content"] for row in task_dataset(task)} for task in TASKS]
        assert [row["prompt"][0]["content"] in texts[i // 32] for i, row in enumerate(rows)] == [True] * 96
        return
    changed = sum(a != b for a, b in zip(plain, rows, strict=True))
    assert changed == {"hostile-1": 16, "hostile-30": 480, "identity": 160, "attack": 0}[protocol]


def test_an_attack_shares_the_training_that_it_follows():
    assert trained_alike(("attack", "butler", "steps")) == [("butler",), ("steps", "attack")]
    assert trained_alike(("attack",)) == [("attack",)], "asked for alone, it is trained for alone"


def test_three_tasks_are_trained_in_order(tmp_path):
    rows = training_rows(PROTOCOLS["three-tasks"], 0, 48)
    trainer = METHODS["lora"].make(Setting(tmp_path, 0, 3, load_tokenizer(), rows, in_order=True))
    assert isinstance(trainer.get_train_dataloader().base_dataloader.sampler, SequentialSampler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A protocol, and an attack that follows its training, as a user starts them: two processes at a time."""
    folder = tmp_path_factory.mktemp("benchmark")
    methods = "lora,lora+alphasteer"
    command = [sys.executable, "-m", "examples.benchmark", "--methods", methods, "--protocols", "steps,attack"]
    command += ["--seeds", "1", "--steps", "2", "--output-dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


def test_neither_workers_nor_shared_training_change_a_run(finished, tmp_path):
    """The same attack alone, in one process at a time, from the same statistics."""
    shutil.copytree(finished / PUBLISHED, tmp_path / PUBLISHED)
    options = dict(seeds=1, steps=2, workers=1, quick=False, output_dir=tmp_path)
    for name in ("lora", "lora+alphasteer"):
        benchmark.main(methods=name, protocols="attack", **options)

    def figures(folder: Path) -> dict[str, dict]:
        found = {}
        for line in read(folder):
            if line["protocol"] == "attack":
                found[line["run"]["name"]] = line
                assert line["steps"] == 0 or line.pop("peak_bytes") > 1e8 and line["run"].pop("train_seconds") > 0
                assert line["steps"] == 0 or line.pop("cpu_seconds") > 0
        return found

    assert figures(tmp_path) == figures(finished) and set(figures(finished)) == {"aligned", "lora", "lora+alphasteer"}
    assert len(read(finished)) == 4 + 2
    assert "## Ranking" in (finished / "report.md").read_text()


def test_runs_are_resumed_and_reported(finished, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    first = read(folder)
    options = dict(seeds=1, steps=2, workers=1, quick=False, output_dir=folder)
    benchmark.main(methods="lora,budget-1e-3", protocols="steps", **options)
    *before, run = read(folder)
    assert before == first, "a finished run is not repeated"
    report = (folder / "report.md").read_text()
    assert (
        "| lora | 1 | nothing |" in report and "| budget-1e-3 | 1 | statistics |" in report and "1 of 1 runs" in report
    )
    assert (folder / "curves.png").stat().st_size > 10_000 and not (folder / "scratch").exists()
    assert run["budget_kept"] and run["run"]["relative_drift"] <= 1e-3


def test_at_a_glance_by_hand():
    """Two protocols, the second an attack; a method that ran on one of them alone is left out."""

    def run(refuses: float, over: float, loss: float, drift: float, **costs: float) -> dict:
        return dict(refusal_unsafe=refuses, over_refusal=over, task_nll=loss, unsafe_nll=drift, **costs)

    results = {
        ("steps", "lora"): [run(0.0, 0.0, 0.01, 1.0, time=1.0, memory=1.0)],
        ("steps", "kl"): [
            run(1.0, 0.1, 0.1, 0.01, time=2.0, memory=1.5),
            run(0.5, 0.2, 0.1, 0.01, time=3.0, memory=1.0),
        ],
        ("steps", "oft"): [run(1.0, 0.0, 0.01, 0.01)],
        ("attack", "lora"): [run(0.0, 0.0, 0.01, 1.0, time=1.0, memory=1.0)],
        ("attack", "kl"): [run(0.25, 0.0, 0.01, 0.1, time=2.5, memory=1.25)],
    }
    table = at_a_glance(results, {p: dict(unsafe_nll=0.01, task_nll=1.0) for p in ("steps", "attack")})
    head, _, first, second = (line.strip("| ").split(" | ") for line in table.splitlines())
    assert head == ["method", "data in the run", "seeds", "area", "`steps`", "`attack`", "time", "memory"]
    assert first == ["`kl`", "safety rows", "1", "0.500", "75.0% / 15.0%, 0.100", "25.0%", "2.50", "1.25"]
    assert second == ["`lora`", "nothing", "1", "0.000", "0.0% / 0.0%, 0.010", "0.0%", "1.00", "1.00"]
