"""Abilities against plain twins: one row, one choice, one forward pass at a time, without padding, added up in float64."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest

from agl_trl.data.abilities import AbilitySet, ExactMatch, MultipleChoice, load_ability
from agl_trl.data.alignment import AlignmentRow
from agl_trl.evaluation.abilities import Ability, measure_abilities, text_rows
from agl_trl.evaluation.answer_cache import AnswerCache
from agl_trl.evaluation.exact_match import is_right, last_number
from agl_trl.evaluation.multiple_choice import choice_rows, chosen
from agl_trl.miniworld import load_model, load_tokenizer, task_dataset
from agl_trl.modeling import likelihood
from agl_trl.modeling.generation import generate_answers
from agl_trl.modeling.likelihood import log_likelihoods
from tests.helpers.models import scripted_model, thinking_tokenizer


@pytest.fixture(scope="module")
def moved():
    """The embedded model with an adapter that changes it."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    rows = [
        (row["prompt"][0]["content"], json.loads(row["completion"][0]["content"]))
        for row in task_dataset("extract", "test")
    ]
    cities = sorted({facts["city"] for _, facts in rows})
    questions, prompts = [], []
    for i, (question, facts) in enumerate(rows[:20]):
        others = [city for city in cities if city != facts["city"]][: 2 + i % 3]
        questions.append({"question": question, "choices": sorted([facts["city"], *others]), "answer": facts["city"]})
        prompts.append({"prompt": question, "answer": json.dumps(facts)})
    for name, found in (("cities", questions), ("facts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "notes.txt").write_text("\n".join(question for question, _ in rows[:60]))
    return folder


def twin(model, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of what follows, token by token out of one row alone, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("template", [True, False])
def test_choices_have_the_likelihood_of_rows_one_by_one(files, moved, template):
    tokenizer, one = load_tokenizer(), load_ability(str(files / "cities.jsonl"))
    if not template:
        tokenizer.chat_template = None
    rows, numbers = choice_rows(one, tokenizer)
    found = log_likelihoods(moved, rows, pad_token_id=tokenizer.pad_token_id, batch_size=7, progress=False)
    expected, right = [], {"norm": [], "raw": []}
    for row in one.rows:
        if template:
            messages = [{"role": "user", "content": row.question}]
            asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            answers = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in row.choices]
        else:
            asked = tokenizer(f"Question: {row.question}\nAnswer:")["input_ids"]
            answers = [
                tokenizer(f"Question: {row.question}\nAnswer: {choice}")["input_ids"][len(asked) :]
                for choice in row.choices
            ]
        values = [twin(moved, asked, answer) for answer in answers]
        expected += values
        by_length = [value / len(choice) for value, choice in zip(values, row.choices, strict=True)]
        right["norm"].append(by_length.index(max(by_length)) == row.answer)
        right["raw"].append(values.index(max(values)) == row.answer)
    assert numbers == [i for i, row in enumerate(one.rows) for _ in row.choices]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    said = chosen(one, found)
    assert said.right.tolist() == right["norm"] and said.right_by_raw.tolist() == right["raw"]
    assert 0 < sum(right["norm"]) < len(one.rows), "the figure tells rows apart"


def test_letters_are_chosen_where_the_question_shows_the_choices(files, moved):
    tokenizer = load_tokenizer()
    one = replace(load_ability(str(files / "cities.jsonl")), lettered=True)
    rows, _ = choice_rows(one, tokenizer)
    first = one.rows[0]
    shown = "\n".join([first.question, *(f"{letter}. {c}" for letter, c in zip("ABCDE", first.choices, strict=False))])
    assert shown in tokenizer.decode(rows[0].input_ids) and tokenizer.decode(rows[1].input_ids).endswith("B")
    calls = []
    hook = moved.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = log_likelihoods(moved, rows, pad_token_id=tokenizer.pad_token_id, batch_size=4, progress=False)
    hook.remove()
    assert sum(lines for lines, _ in calls) == len(one.rows), "choices of one token are one line"
    expected = [twin(moved, row.input_ids[: row.answer_start], row.input_ids[row.answer_start :]) for row in rows]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)


def test_batches_shrink_where_logits_would_be_large(moved, monkeypatch):
    rows = [AlignmentRow(list(range(5, 25)), 1)] * 3 + [AlignmentRow(list(range(6, 46)), 1)]
    whole = log_likelihoods(moved, rows, pad_token_id=0, progress=False)
    sizes = []
    hook = moved.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(out.logits.numel()), with_kwargs=True
    )
    monkeypatch.setattr(likelihood, "LOGITS", 39 * moved.config.vocab_size)
    small = log_likelihoods(moved, rows, pad_token_id=0, progress=False)
    hook.remove()
    assert max(sizes) <= likelihood.LOGITS and small.tolist() == pytest.approx(whole.tolist(), abs=1e-4)


def test_texts_have_the_likelihood_of_a_plain_forward_pass(files, moved):
    tokenizer, one = load_tokenizer(), load_ability(str(files / "notes.txt"))
    (measured,) = measure_abilities(moved, tokenizer, [one], batch_size=3, progress=False)
    ids = tokenizer(one.rows[0])["input_ids"]
    count = -(-len(ids) // 256)  # what the embedded model reads
    assert count > 2 and measured.total == count
    bounds = [i * len(ids) // count for i in range(count + 1)]
    for values, off in ((measured.base, True), (measured.tuned, False)):
        for i, value in enumerate(values.tolist()):
            piece = torch.tensor([ids[bounds[i] : bounds[i + 1]]])
            with torch.no_grad():
                if off:
                    with moved.disable_adapter():
                        logits = moved(piece).logits
                else:
                    logits = moved(piece).logits
            expected = torch.nn.functional.cross_entropy(logits[0, :-1].double(), piece[0, 1:])
            assert value == pytest.approx(expected.item(), abs=1e-5)
    difference = (measured.tuned - measured.base).numpy()
    low, high = measured.change.interval()
    assert measured.change.value == pytest.approx(difference.mean()) and low < difference.mean() < high


def test_a_token_before_every_text_is_before_every_piece_and_every_token_is_counted():
    tokenizer = load_tokenizer()
    ids = tokenizer("one two three four five six seven")["input_ids"]
    pieces = text_rows(tokenizer, "one two three four five six seven", 4)
    assert [token for piece in pieces for token in piece.input_ids] == ids
    assert max(len(piece.input_ids) for piece in pieces) <= 4 and {piece.answer_start for piece in pieces} == {1}
    tokenizer.bos_token = tokenizer.eos_token

    class Starting:
        """A tokenizer that puts its first token before a text, as Llama's does."""

        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text):
            return {"input_ids": [self.bos_token_id, *tokenizer(text)["input_ids"]]}

    pieces = text_rows(Starting(), "one two three four five six seven", 4)
    assert all(piece.input_ids[0] == Starting.bos_token_id for piece in pieces)
    assert [token for piece in pieces for token in piece.input_ids[1:]] == ids


def test_exact_match_is_of_the_answers_that_are_generated(files, moved, tmp_path):
    tokenizer, one = load_tokenizer(), load_ability(str(files / "facts.jsonl"))
    store = AnswerCache(tmp_path / "kept.jsonl", "settings")
    (measured,) = measure_abilities(moved, tokenizer, [one], store=store, max_new_tokens=4, progress=False)
    prompts = [[{"role": "user", "content": row.prompt}] for row in one.rows]
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in one.rows)
    texts = generate_answers(moved, tokenizer, prompts, max_new_tokens=longest + 8, progress=False)
    assert [row["answer_tuned"] for row in measured.answers] == texts, "with room for the right answer"
    # All answers of both sides were kept: no model is asked again.
    again = AnswerCache(tmp_path / "kept.jsonl", "settings")
    assert len(again.answers) == 2 * len(one.rows)
    for key in again.answers:
        again.answers[key] = json.dumps({"name": "nobody"})
    (kept,) = measure_abilities(moved, tokenizer, [one], store=again, max_new_tokens=4, progress=False)
    assert {row["answer_base"] for row in kept.answers} == {'{"name": "nobody"}'}


def test_right_answers_of_a_model_that_learned_the_task_are_found(files):
    """By hand: an answer of the base is right where it is the expected one."""
    one = load_ability(str(files / "facts.jsonl"))
    tokenizer, model = load_tokenizer(), get_peft_model(load_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    (before,) = measure_abilities(model, tokenizer, [one], progress=False)
    answer = before.answers[3]["answer_base"]
    rows = [row._replace(answer=f"  {answer.upper()} ") if i == 3 else row for i, row in enumerate(one.rows)]
    (after,) = measure_abilities(model, tokenizer, [replace(one, rows=rows)], progress=False)
    assert after.base.nonzero().flatten().tolist() == [3] and after.rate(tuned=False).count == 1


@pytest.mark.parametrize(
    ("answer", "expected", "number", "right"),
    [
        (" Paris. ", "paris", False, True),
        ("PARIS  is\nold", "Paris is old", False, True),
        ("ﬁne", "fine", False, True),
        ("Paris!", "Paris", False, False),
        ("It is 1,234.00 dollars", "so\n#### 1234", True, True),
        ("first 7, then 18.", "#### 18", True, True),
        ("18, or 7", "#### 18", True, False),
        ("-3", "3", True, False),
        ("no idea", "3", True, False),
        ("no idea", "none", True, False),
    ],
)
def test_what_counts_as_right(answer, expected, number, right):
    assert is_right(answer, expected, number) is right
    assert str(last_number("a 2.50 b")) == "2.50"


def test_paired_figures_by_hand_and_by_scipy():
    base = torch.tensor([True] * 30 + [False] * 10)
    tuned = torch.tensor([True] * 18 + [False] * 12 + [True] * 3 + [False] * 7)
    one = Ability("a", "exact match", base, tuned)
    assert (one.lost, one.won, one.total) == (12, 3, 40)
    assert one.paired_p_value == pytest.approx(binomtest(12, 15).pvalue) and one.change.value == pytest.approx(9 / 40)
    assert (one.rate(False).value, one.rate(True).value) == (0.75, 21 / 40)
    assert one.rate(True).interval == pytest.approx(binomtest(21, 40).proportion_ci(method="wilson"))
    assert Ability("a", "exact match", base, base).paired_p_value == 1


def test_adapter_that_does_nothing_changes_nothing(files):
    model = get_peft_model(load_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    sets = [load_ability(str(files / name)) for name in ("cities.jsonl", "facts.jsonl", "notes.txt")]
    measured = measure_abilities(model, load_tokenizer(), sets, progress=False)
    assert all(torch.equal(one.base, one.tuned) for one in measured) and measured[2].change.value == 0
    beside = measure_abilities(load_model(), load_tokenizer(), sets, base=load_model(), progress=False)
    assert all(torch.equal(one.base, other.base) for one, other in zip(measured, beside, strict=True))


def test_likelihoods_that_are_no_numbers_are_in_no_figure(files):
    model = get_peft_model(load_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(torch.nan)
    sets = [load_ability(str(files / name)) for name in ("cities.jsonl", "notes.txt")]
    for one in measure_abilities(model, load_tokenizer(), sets, progress=False):
        assert one.total == 0 and one.unmeasured > 0 and one.answers == []


def test_answers_that_are_nothing_but_unfinished_reasoning_are_in_no_figure():
    """A base model that answers both questions, and a tuned one that thinks about the first until it is cut."""
    tokenizer = thinking_tokenizer("alpha", "beta", "Paris", "gamma")
    tokenizer.chat_template = None
    base = scripted_model(tokenizer, "beta", "Paris")
    alpha, paris = tokenizer.convert_tokens_to_ids(["alpha", "Paris"])
    base.get_output_embeddings().weight.data[paris, alpha] = 1.0
    tuned = scripted_model(tokenizer, "beta", "Paris", tokenizer.eos_token, "alpha", "<think>", "gamma")
    rows = [ExactMatch("alpha", "Paris"), ExactMatch("beta", "Paris")]
    one = AbilitySet("facts", "exact match", rows, [4, 7], "facts.jsonl", 9)
    (found,) = measure_abilities(tuned, tokenizer, [one], base=base, progress=False)
    assert (found.total, found.unmeasured, found.lost) == (1, 1, 0)
    assert [entry["row"] for entry in found.answers] == [7] and found.answers[0]["answer_tuned"] == "Paris"
    (back,) = measure_abilities(base, tokenizer, [one], base=tuned, progress=False)
    assert (back.total, back.unmeasured) == (1, 1), "unfinished on either side"
    (whole,) = measure_abilities(base, tokenizer, [one], base=base, progress=False)
    assert (whole.total, whole.unmeasured) == (2, 0) and whole.tuned.all()


def test_row_that_the_model_can_not_read_is_told_before_any_is_measured(moved):
    rows = {
        "multiple choice": MultipleChoice("word " * 400, ["a", "b"], 0),
        "exact match": ExactMatch("word " * 400, "a"),
    }
    for kind, row in rows.items():
        with pytest.raises(ValueError, match=r"Row 5 of 'long.jsonl' has \d+ tokens, and the model reads 256"):
            measure_abilities(moved, load_tokenizer(), [AbilitySet("long", kind, [row], [5], "long.jsonl", 6)])
