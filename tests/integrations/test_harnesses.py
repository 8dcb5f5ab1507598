"""DriftCaps in lm-evaluation-harness and in Inspect, on the embedded model: the rates of the package, from the same answers."""

from pathlib import Path

import pytest
from datasets import concatenate_datasets

from agl_trl.driftcaps import load_driftcaps
from agl_trl.evaluation.answers import Answers, answer_prompts
from agl_trl.integrations import lm_eval_tasks
from agl_trl.miniworld import load_model, load_tokenizer


FEW = 12  # of either kind


@pytest.fixture(scope="module")
def rows():
    found = load_driftcaps("test")
    kinds = [[i for i, said in enumerate(found["expected"]) if said == kind][:FEW] for kind in ("refuse", "comply")]
    return concatenate_datasets([found.select(kind) for kind in kinds])


@pytest.fixture(scope="module")
def own(rows) -> Answers:
    """What `agl-trl drift --prompts driftcaps` has of these prompts."""
    prompts = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return answer_prompts(load_model(), load_tokenizer(), prompts, progress=False)


def rates(refused: list[bool]) -> dict[str, float]:
    return {"refusal_rate": sum(refused[:FEW]) / FEW, "over_refusal_rate": sum(refused[FEW:]) / FEW}


def test_lm_evaluation_harness_has_our_rates(rows, own, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ids = set(rows["id"])
    monkeypatch.setattr(
        "agl_trl.driftcaps.load_driftcaps", lambda split: load_driftcaps(split).filter(lambda row: row["id"] in ids)
    )
    folder = Path(lm_eval_tasks.__path__[0])
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    model = HFLM(pretrained=load_model(), tokenizer=load_tokenizer(), batch_size=8, device="cpu")
    found = lm_eval.simple_evaluate(
        model, tasks=["driftcaps"], task_manager=tasks, apply_chat_template=True, log_samples=True, bootstrap_iters=0
    )
    samples = {sample["doc"]["id"]: sample for sample in found["samples"]["driftcaps"]}
    answers = [samples[name]["filtered_resps"][0].strip() for name in rows["id"]]
    assert answers == own.texts, "token by token"
    result = found["results"]["driftcaps"]
    assert {name: result[f"{name},none"] for name in rates([])} == rates(own.refused.tolist())
    assert {True, False} == {*own.refused.tolist()}, "the answers are of both kinds"


def test_inspect_has_our_rates(rows, own, tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai")
    from agl_trl.integrations.inspect_tasks import driftcaps

    task = driftcaps()
    assert len(task.dataset) == len(load_driftcaps("test"))
    load_model().save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    (log,) = inspect_ai.eval(
        task, model="hf/local", model_args={"model_path": path, "tokenizer_path": path, "device": "cpu", "do_sample": False},
        sample_id=list(rows["id"]), log_dir=str(tmp_path / "logs"), display="none",
    )  # fmt: skip
    assert log.status == "success", log.error
    samples = {sample.id: sample for sample in log.samples}
    assert [samples[name].output.completion.strip() for name in rows["id"]] == own.texts
    found = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    assert found == rates(own.refused.tolist())
    assert samples[rows[0]["id"]].scores["refusal"].answer == own.verdicts[0].label
