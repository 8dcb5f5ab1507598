"""Answers kept while they are made: an interrupted report goes on where it stopped."""

import pytest

from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.behaviour import measure_behaviour
from tests.helpers.models import adapted, probe_prompts


def test_interrupted_report_goes_on_where_it_stopped(tmp_path, tokenizer):
    model, prompts, asked = adapted(0.1), probe_prompts(), []
    whole = measure_behaviour(model, tokenizer, prompts, max_new_tokens=4, batch_size=2, progress=False)
    path = tmp_path / "unfinished.jsonl"
    store = AnswerCache(path, "settings")
    generate = model.generate

    def interrupted(**kwargs):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(1)
        return generate(**kwargs)

    model.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        measure_behaviour(model, tokenizer, prompts, store=store, max_new_tokens=4, batch_size=2, progress=False)
    with path.open("a") as file:
        file.write('{"key": "cut o')
    model.generate = generate
    again = AnswerCache(path, "settings")
    assert len(again.answers) == 6
    resumed = measure_behaviour(model, tokenizer, prompts, store=again, max_new_tokens=4, batch_size=2, progress=False)
    assert resumed.answers == whole.answers
    assert AnswerCache(path, "other settings").key("Base model", "x") not in again.answers


def test_answers_are_kept_at_once_and_read_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    cache = AnswerCache(path, "settings")
    assert not path.parent.exists(), "nothing is made before there is an answer"
    texts = ["plain", "two\nlines \u2028 and \x85", "Zürich, 東京"]
    keys = [cache.key("Base model", text) for text in texts]
    for key, text in zip(keys, texts, strict=True):
        cache.add([key], [text])
        assert AnswerCache(path, "settings").answers == cache.answers
    assert cache.answers == dict(zip(keys, texts, strict=True))


def test_keys_tell_settings_sides_and_prompts_apart(tmp_path):
    keys = [
        AnswerCache(tmp_path / "none", settings).key(side, prompt)
        for settings in ("a", "b")
        for side in ("Base model", "Tuned model")
        for prompt in ("x", "y")
    ]
    assert len({*keys}) == 8 and keys[0] == AnswerCache(tmp_path / "none", "a").key("Base model", "x")
