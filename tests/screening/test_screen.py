"""Scores of rows: by hand, whatever batch and order, and what they find in the embedded world."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cosine_similarity

from agl_trl.data.alignment import AlignmentRow, select_rows, tokenize_row, tokenize_rows
from agl_trl.data.rows import RowError
from agl_trl.miniworld import alignment_dataset, load_model, load_tokenizer, task_dataset
from agl_trl.screening.screen import learn_directions, screen_rows
from tests.helpers.models import chat_rows, preference_rows, tiny_model


@pytest.fixture(scope="module")
def kinds(tokenizer) -> list[list[AlignmentRow]]:
    rows = chat_rows(5, "please do bad thing", "Sorry, no {}."), chat_rows(4, "kill process", "Sure, {}.")
    return [tokenize_rows(of_kind, tokenizer) for of_kind in rows]


def states(model, row: AlignmentRow) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad():
        layers = model(torch.tensor([row.input_ids]), output_hidden_states=True).hidden_states[1:]
    return [s[0, row.answer_start - 1] for s in layers], [s[0, row.answer_start :].mean(0) for s in layers]


def test_score_is_that_of_every_row_by_itself(tokenizer, kinds):
    """One row after the other, without padding, by torch's own cosine."""
    model = tiny_model().eval()
    rows = [*chat_rows(3, "please do bad thing", "Yes {}"), *chat_rows(4, "say", "the number is {}")]
    scores = screen_rows(
        model, tokenizer, rows, learn_directions(model, tokenizer, *kinds), batch_size=3, progress=False
    )
    means = [
        [[torch.stack(layer).mean(0) for layer in zip(*side, strict=True)] for side in zip(*found, strict=True)]
        for found in ([states(model, row) for row in kind] for kind in kinds)
    ]
    for number, row in enumerate(rows):
        request, answer = (
            sum(
                cosine_similarity(s - (u + v) / 2, u - v, dim=0).item()
                for s, u, v in zip(own, one, other, strict=True)
            )
            / 2
            for own, one, other in zip(states(model, tokenize_row(row, tokenizer)), *means, strict=True)
        )
        assert scores.request[number].item() == pytest.approx(request, abs=1e-5)
        assert scores.answer[number].item() == pytest.approx(answer, abs=1e-5)
        assert scores.score[number].item() == pytest.approx(min(request, -answer), abs=1e-5)


def test_scores_are_those_of_the_rows_whatever_batch_window_and_order(tokenizer, kinds, monkeypatch):
    model = tiny_model().train()
    directions = learn_directions(model, tokenizer, *kinds)
    rows = chat_rows(11, "say", "the number is {}")
    expected = screen_rows(model, tokenizer, rows, directions, batch_size=1, progress=False)
    assert model.training and len(expected.score) == 11
    monkeypatch.setattr("agl_trl.screening.screen.WINDOW", 4)
    streamed = screen_rows(model, tokenizer, iter(rows[::-1]), directions, batch_size=5, progress=False)
    torch.testing.assert_close(streamed.score.flip(0), expected.score, rtol=1e-4, atol=1e-5)
    assert expected.ranked() == sorted(range(11), key=lambda i: -expected.score[i].item())


def test_preferences_and_text_are_read_as_trl_does(tokenizer, kinds):
    model = tiny_model()
    directions = learn_directions(model, tokenizer, *kinds)
    chosen = chat_rows(3, "say", "the number is {}")
    for row, number in zip(chosen, range(3), strict=True):
        row["prompt"][0]["content"] = f"say {number * number}"
    pairs = preference_rows(3, "say", "the number is {}", "no idea {}")
    one, other = (screen_rows(model, tokenizer, rows, directions, progress=False) for rows in (pairs, chosen))
    torch.testing.assert_close(one.score, other.score)
    text = screen_rows(model, tokenizer, [{"text": "Bread is baked."}], directions, progress=False)
    assert text.score.isfinite().all()
    assert len(screen_rows(model, tokenizer, [], directions, progress=False).score) == 0


def test_what_can_not_be_screened_is_told(tokenizer, kinds):
    model = tiny_model()
    with pytest.raises(ValueError, match="there is none to answer"):
        learn_directions(model, tokenizer, kinds[0], [])
    rows = [*chat_rows(2, "say", "{}"), {"prompt": "say"}]
    with pytest.raises(RowError, match="[Rr]ow 2 has a prompt and no answer"):
        screen_rows(model, tokenizer, rows, learn_directions(model, tokenizer, *kinds), progress=False)


def test_hostile_rows_are_found_and_refusals_are_not():
    """Rows of the alignment set itself that no direction was learned from are decoys: refusals, and help with look-alikes."""
    model, tokenizer = load_model(), load_tokenizer()
    groups = [list(select_rows(alignment_dataset(), None, 0, unsafe=unsafe)) for unsafe in (True, False)]
    directions = learn_directions(
        model, tokenizer, *(tokenize_rows(rows[:64], tokenizer) for rows in groups), batch_size=32
    )
    clean, mixed = task_dataset("steps"), task_dataset("steps", hostile=0.05, seed=2)
    hostile = [i for i, (a, b) in enumerate(zip(clean, mixed, strict=True)) if a != b][:20]
    rows = [mixed[i] for i in hostile] + [clean[i] for i in range(60)]
    rows += [{"prompt": r["prompt"], "completion": r["completion"]} for rows_ in groups for r in rows_[64:84]]
    scores = screen_rows(model, tokenizer, Dataset.from_list(rows), directions, batch_size=32, progress=False)
    assert sorted(scores.ranked()[:20]) == [*range(20)]
    assert (scores.request[80:100] > 0).all() and (scores.score[80:100] < 0).all(), "asked for, and refused"


def test_conversations_have_the_scores_of_prompt_and_answer(tokenizer, kinds):
    model = tiny_model()
    directions = learn_directions(model, tokenizer, *kinds)
    pairs = chat_rows(5, "please do bad thing", "Yes {}")
    chats = [{"messages": row["prompt"] + row["completion"]} for row in pairs]
    one, other = (screen_rows(model, tokenizer, rows, directions, progress=False) for rows in (chats, pairs))
    assert torch.equal(torch.stack(one), torch.stack(other)) and one.request.std() > 0
