"""Two served models side by side: the order of answers, what is kept, what is told before anything is asked."""

from contextlib import closing

import pytest
from datasets import Dataset

from agl_trl.data.rows import RowError
from agl_trl.evaluation import engine
from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.engine import EngineError, ServedModel
from agl_trl.evaluation.served import measure_served
from tests.helpers.chat_server import COMPLIANCE, REFUSAL, chat_server


PROMPTS = Dataset.from_list([{"prompt": f"text {i}", "unsafe": i % 2 == 0} for i in range(20)])


@pytest.fixture
def models(monkeypatch):
    monkeypatch.delenv("AGL_TRL_API_KEY", raising=False)
    monkeypatch.setattr(engine, "FIRST_WAIT", 0.01)
    with (
        chat_server(
            base=lambda text: f"{REFUSAL} {text}",
            tuned=lambda text: {"text": f"{COMPLIANCE} {text}", "finish_reason": "length" if "1" in text else "stop"},
        ) as server,
        closing(ServedModel(server.url, "base", side="base")) as base,
        closing(ServedModel(server.url, "tuned", side="tuned")) as tuned,
    ):
        yield server, base, tuned


def test_plain_texts_are_answered_in_their_order(models):
    server, base, tuned = models
    server.faults = [503, "drop", None, 500]
    answers = measure_served(base, tuned, PROMPTS, progress=False)
    assert {call.path for call in server.calls} == {"/v1/completions"}
    assert [entry["response_base"] for entry in answers.answers] == [f"{REFUSAL} text {i}" for i in range(20)]
    assert [entry["response_tuned"] for entry in answers.answers] == [f"{COMPLIANCE} text {i}" for i in range(20)]
    assert answers.refused_base.all() and not answers.refused_tuned.any()
    cut = sum("1" in prompt for prompt in PROMPTS["prompt"])
    assert answers.metadata["served"]["tuned"]["at_length"] == cut and answers.metadata["kl_tokens"] == 0
    for name in ("kl_first_tokens", "nll_base", "nll_tuned", "margin_base", "margin_tuned"):
        assert getattr(answers, name).shape == (20,) and getattr(answers, name).isnan().all(), name


def test_prompts_left_out_are_in_no_count(models):
    _, base, tuned = models
    looks = iter([False, True])
    seen = []

    def certain(refused_base, refused_tuned, asked, unfinished):
        seen.append(int(asked.sum()))
        return next(looks)

    answers = measure_served(base, tuned, PROMPTS, batch_size=5, progress=False, certain=certain)
    texts = [entry["prompt"] for entry in answers.answers]
    assert seen == [5, 10] and answers.num_unasked == 10 and len(texts) == 10
    assert [entry["response_tuned"] for entry in answers.answers] == [f"{COMPLIANCE} {text}" for text in texts]
    assert answers.metadata["served"]["tuned"]["at_length"] == sum("1" in text for text in texts)


def test_kept_answers_are_not_asked_again_and_count_as_before(models, tmp_path):
    server, base, tuned = models
    server.faults = [None] * 33 + [400]
    options = dict(progress=False, batch_size=1)
    with pytest.raises(EngineError, match="status 400"):
        measure_served(base, tuned, PROMPTS, store=AnswerCache(tmp_path / "a.jsonl", "s"), **options)
    there, asked = len((tmp_path / "a.jsonl").read_text().splitlines()), len(server.calls)
    assert 33 <= there <= asked <= 36, "one or two that were on their way, and no other, are asked after a failure"
    tuned.stopped.clear()
    kept = measure_served(base, tuned, PROMPTS, store=AnswerCache(tmp_path / "a.jsonl", "s"), **options)
    assert len(server.calls) == asked + 40 - there
    whole = measure_served(base, tuned, PROMPTS, **options)
    assert kept.answers == whole.answers and kept.metadata == whole.metadata


def test_row_that_cant_be_asked_is_told_before_any_is(models):
    server, base, tuned = models
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "user", "content": None}]}]
    with pytest.raises(
        RowError, match="Row 1 has, in the column 'prompt', a message of the role 'user' without content"
    ):
        measure_served(base, tuned, Dataset.from_list(rows), progress=False)
    assert not server.calls
