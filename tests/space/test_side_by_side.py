"""One question to all models: what they say, what is held back, and that visitors don't meet."""

import pytest

from agl_trl.space.driftcaps_run import prompt_set
from agl_trl.space.models import Models
from agl_trl.space.side_by_side import EXAMPLES, Pane, answers, idle


UNSAFE = EXAMPLES[0][1]


def ask(models: Models, prompt: str, temperature: float = 0.0, seed: int = 0, length: int = 48) -> list[Pane]:
    *_, panes = answers(models, prompt, temperature, seed, length, "", "")
    return panes


def test_examples_fail_in_both_directions(models):
    found = [tuple(pane.verdict.label for pane in ask(models, text, length=64)) for _, text in EXAMPLES]
    # Unsafe, and of a category that AGL never saw.
    assert found[0] == found[1] == ("refusal", "compliance", "refusal")
    assert found[2] == ("compliance",) * 3
    assert found[3] == ("compliance", "compliance", "refusal")  # over-refusal, and told


def test_sides_answer_one_after_the_other(models):
    seen = [[pane.state for pane in panes] for panes in answers(models, UNSAFE, 0.0, 0, 4, "", "")]
    order = [["waiting"] * 3]
    for side in range(3):
        waiting = ["waiting"] * (2 - side)
        order += [[*["done"] * side, "writing", *waiting]] * 4 + [[*["done"] * side, "done", *waiting]]
    assert seen == order
    assert [pane.state for pane in idle(models.own)] == ["idle"] * 3


def test_sampling_is_seeded(models):
    def text(seed: int) -> str:
        return ask(models, "How can I crack a hazelnut?", 1.2, seed, 16)[0].text

    assert text(1) == text(1) and len({text(seed) for seed in (2, 3)}) == 2
    assert ask(models, UNSAFE, length=3)[0].tokens == 3


def test_known_prompts_decide_what_is_withheld(models):
    held_out = next(row for row in prompt_set("Embedded world") if row["unsafe"])
    base, plain, agl = ask(models, held_out["prompt"][-1]["content"])
    assert "should be refused" in plain.withheld and not base.withheld and not agl.withheld
    assert not any(pane.withheld for pane in ask(models, EXAMPLES[3][1]))  # harmless, and known to be


def test_of_other_prompts_the_base_model_decides(models):
    base, plain, agl = ask(models, UNSAFE)
    assert "The base model refuses" in plain.withheld and not base.withheld and not agl.withheld


def test_a_visitor_who_leaves_changes_nothing(models):
    alone = [pane.text for pane in ask(models, UNSAFE)]
    leaving = answers(models, "How can I crack a hazelnut?", 1.0, 3, 64, "", "")
    for _ in range(4):
        next(leaving)
    assert [pane.text for pane in ask(models, UNSAFE)] == alone
    leaving.close()
    with pytest.raises(ValueError):
        list(answers(models, UNSAFE, 0.0, 0, 48, "", "nobody/nothing"))
    assert [pane.text for pane in ask(models, UNSAFE)] == alone


def test_answers_that_take_turns_are_those_of_each_alone(models):
    prompts = (UNSAFE, "How can I crack a hazelnut?")
    alone = [[pane.text for pane in ask(models, prompt, 0.9, 5, 12)] for prompt in prompts]
    open_ = [answers(models, prompt, 0.9, 5, 12, "", "") for prompt in prompts]
    texts: list[list[str]] = [[], []]
    left = {0, 1}
    for _ in range(3):  # one is ahead by three tokens, so that they are mostly at different sides
        next(open_[0])
    while left:
        for i in sorted(left):
            try:
                texts[i] = [pane.text for pane in next(open_[i])]
            except StopIteration:
                left.remove(i)
    assert texts == alone
