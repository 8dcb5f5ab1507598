"""Corrupted, truncated, foreign and mistyped files: refused in one sentence, nothing unpickled, no other exception."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load as load_bytes

from agl_trl import DriftReport, FisherStatistics, estimate_fisher
from agl_trl.artifacts.files import ArtifactError, canonical_json, load_tensors
from agl_trl.data.alignment import tokenize_rows
from agl_trl.drift.plots import plot_drift
from agl_trl.evaluation.abilities import Ability
from agl_trl.evaluation.behaviour import Behaviour
from agl_trl.fisher.calibration import drift_at, is_calibrated
from agl_trl.fisher.reference_answers import ReferenceAnswers
from agl_trl.modeling.loading import load_adapter
from agl_trl.modeling.lora import AdaptedLayer, adapted_layers, linear_layers
from agl_trl.modeling.reference_factors import REFERENCE_FILE, load_reference, save_reference
from tests.helpers.damage import DAMAGES, ROUNDS, Good, flipped
from tests.helpers.models import adapted, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def good_file(path: Path, load: Callable[[Path], Any], folder: Path) -> Good:
    tensors, metadata = load_tensors(path)
    metadata.pop("schema_version")
    return Good(path.name, path.read_bytes(), tensors, metadata, load, folder)


@cache
def base() -> PeftModel:
    """Few layers, two of which read the same input: every damage is done to all of them."""
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]))


@pytest.fixture(scope="module")
def fisher(tokenizer, alignment_rows, folder) -> Good:
    statistics = estimate_fisher(base(), alignment_rows, tokenizer, shrinkage=0.5, rank=8, progress=False)
    statistics.metadata["kl_curve"] = {"drifts": [1e-3, 1e-2], "kl": [[1e-3, 1e-2], [0.1, 1.0]]}
    return good_file(statistics.save_pretrained(folder / "good"), FisherStatistics.from_pretrained, folder)


@pytest.fixture(scope="module")
def drift(tokenizer, alignment_rows, folder) -> Good:
    model = adapted(0.1)
    statistics = estimate_fisher(model, alignment_rows, tokenizer, progress=False)
    report = DriftReport.measure(model, statistics)
    report.history = {name: torch.rand(3) for name in ("step", "relative_drift", "penalty", "loss")}
    report.global_step, report.budget_multiplier, report.adapter_sha256 = 40, 0.5, "ab" * 32
    flags, figures, states = torch.tensor([True, True, False]), torch.rand(3), torch.rand(3)
    judge = {"judge": {"name": "refusal-strings", "version": "1"}, "decoding": "greedy", "kl_tokens": 8}
    answers = [t.clone() for t in (*[flags] * 3, *[figures] * 5, *[states] * 2)]
    report.behaviour = Behaviour(["a", "b", "c"], *answers, metadata=judge)
    kept = {"budget": 0.02, "kl": 0.015, "kl_first_tokens": 0.03, "rows": 8, "kinds": {"refuse": 0.01, "comply": 0.02}}
    scores = [torch.tensor([True, False]) for _ in range(4)]
    report.abilities = [
        Ability("arc_easy", "multiple choice", *scores, metadata={"source": "allenai/ai2_arc", "rows": 2}),
        Ability("notes", "text", torch.rand(3).double(), torch.rand(3).double(), metadata={"unmeasured": 1}),
    ]
    report.metadata["protected"] = {"behaviours": {"alignment": kept}, "scale": 0.9}
    report.metadata |= {"continued": False, "coefficients": {"variant": "kfac", "alignment": 0.25}}
    return good_file(report.save_pretrained(folder / "good"), DriftReport.from_pretrained, folder)


@pytest.fixture(scope="module")
def answers(tokenizer, alignment_rows, folder) -> Good:
    rows = tokenize_rows(list(alignment_rows)[:4], tokenizer)
    kinds = ["alignment/refuse", "alignment/comply", "chat", "chat"]
    references = ReferenceAnswers.measure(base(), tokenizer, rows, kinds, progress=False)
    return good_file(references.save_pretrained(folder / "good"), ReferenceAnswers.from_pretrained, folder)


@pytest.fixture(scope="module")
def reference(folder) -> Good:
    layers = adapted_layers(adapted(0.1))
    save_reference(folder / "good", [layer.with_reference() for layer in layers])

    def load(path: Path) -> list[AdaptedLayer]:
        (path.parent / "agl").mkdir(exist_ok=True)
        shutil.copy(path, path.parent / "agl" / REFERENCE_FILE)
        return load_reference(path.parent, layers)

    return good_file(folder / "good" / "agl" / REFERENCE_FILE, load, folder)


@pytest.fixture(scope="module")
def adapter(folder) -> Good:
    model = tiny_model()
    adapted(0.1).save_pretrained(folder / "adapter")

    def load(path: Path) -> Any:
        shutil.copy(path, folder / "adapter" / "adapter_model.safetensors")
        loaded = load_adapter(model, folder / "adapter")
        loaded.unload()
        return loaded

    path = folder / "adapter" / "adapter_model.safetensors"
    return Good(path.name, path.read_bytes(), load_bytes(path.read_bytes()), {}, load, folder)


def refused(good: Good, content: bytes, what: str) -> bool:
    """Whether a file is refused, and as it must be; any other exception fails the test."""
    path = good.folder / good.file
    path.write_bytes(content)
    try:
        good.load(path)
    except ArtifactError as error:
        sentence = str(error)
        assert sentence.isprintable() and sentence.endswith("."), (what, sentence)
        assert len(sentence.replace(str(good.folder), "")) < 400 and good.folder.name in sentence, (what, sentence)
        return True
    return False


@pytest.mark.parametrize("artifact", DAMAGES)
def test_damaged_and_foreign_files_are_refused(artifact, request):
    good: Good = request.getfixturevalue(artifact)
    accepted, count = [], 0
    assert not refused(good, good.content, "good")
    for what, damage in DAMAGES[artifact].items():
        for seed in range(ROUNDS):
            content = damage(good, random.Random(f"{what} {seed}"))
            count += 1
            if not refused(good, content, what):
                accepted.append((what, seed))
    assert not accepted and count >= (80 if artifact == "adapter" else 150)
    assert not (good.folder / "marker").exists()
    assert not refused(good, good.content, "good, at the end")


def test_early_files_without_a_checksum_are_read_and_flips_in_them_never_crash(fisher, drift):
    """Their numbers may be wrong where nothing says so, but never nonsense."""
    for good in (fisher, drift):
        early = good.said(canonical_json({"schema_version": 1, **good.metadata}))
        assert not refused(good, early, "early")
        draw, count = random.Random(0), 0
        for _ in range(60):
            content = flipped(early, draw, 8, len(early), draw.choice([1, 5]))
            if refused(good, content, "early, flipped"):
                count += 1
            else:
                use(good.load(good.folder / good.file), good)
        assert 0 < count


WRONG: tuple[Any, ...] = (None, True, -1, 10**30, 0.5, 1e300, "<b>$x^$\n\x1b[31m", "", [], [None], {}, {"a": [1]})


def subtrees(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything in a JSON value; of what it holds for every layer to the first eight."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    entries = list(entries)
    for key, inner in entries if not path or len(entries) < 10 else entries[:8]:
        yield from subtrees(inner, (*path, key))


def exchanged(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = exchanged(value[path[0]], path[1:], new)
    return changed


def use(loaded: FisherStatistics | DriftReport | ReferenceAnswers, good: Good) -> None:
    """Everything a user may do with it; nothing may fail but with a sentence."""
    again = loaded.save_pretrained(good.folder / "again")
    assert not refused(replace(good, load=type(loaded).from_pretrained), again.read_bytes(), "saved again")
    if isinstance(loaded, DriftReport):
        assert (loaded.relative_drift >= -1e-6).all() and f"{loaded.mean_relative_drift:.3e}" in loaded.summary()
        return
    if isinstance(loaded, ReferenceAnswers):
        try:
            loaded.check_fits(base())
        except ArtifactError as error:
            assert str(error).isprintable()
        return
    if is_calibrated(loaded):
        assert all(drift > 0 for drift in drift_at(loaded, 0.02))
    for name in loaded.input_of:
        metric = loaded.metric(name)
        assert torch.isfinite(metric.input.trace()) and metric.weight_norm > 0
    model = base()
    try:
        loaded.check_fits(model, linear_layers(model))
    except ArtifactError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("artifact", "least"), [("fisher", 3), ("drift", 3), ("answers", 1)]
)  # mostly a free description
def test_metadata_of_other_types_is_refused_or_harmless(artifact, least, request, tmp_path):
    good: Good = request.getfixturevalue(artifact)
    outcomes = {True: 0, False: 0}
    for path in subtrees(good.metadata):
        if not path:
            continue
        for new in WRONG:
            content = good.written(good.tensors, exchanged(good.metadata, path, new))
            outcome = refused(good, content, f"{path} = {new!r:.30}")
            outcomes[outcome] += 1
            if not outcome:
                loaded = good.load(good.folder / good.file)
                use(loaded, good)
                if path[0] in ("layers", "behaviour") and isinstance(loaded, DriftReport) and new == WRONG[6]:
                    plot_drift(loaded, tmp_path / "drift.png")
    assert outcomes[True] > least * outcomes[False] > 0
