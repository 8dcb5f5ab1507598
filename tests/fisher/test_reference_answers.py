"""Reference answers: their KL against a dense twin, and a file that fits one model alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from agl_trl.artifacts.files import ArtifactError, load_tensors, save_tensors
from agl_trl.data.alignment import AlignmentRow, tokenize_rows
from agl_trl.fisher import reference_answers
from agl_trl.fisher.reference_answers import TOP_K, ReferenceAnswers
from agl_trl.modeling.lora import adapted_layers, at_reference
from tests.helpers.models import chat_rows, moved_by, tiny_model
from tests.helpers.training import telling_model


def rows_of(tokenizer, count: int = 5) -> list[AlignmentRow]:
    answers = ("No.", "Sorry, no {}.", "I can't help with that, whatever you say about {}.")
    rows = [row for i in range(count) for row in chat_rows(i + 1, "tell me of", answers[i % 3])[-1:]]
    return tokenize_rows(rows, tokenizer)


@pytest.fixture
def taken(tokenizer):
    """Model, its reference answers, and the KL of the moved model by brute force."""
    rows = rows_of(tokenizer)
    kinds = ["alignment/refuse", "alignment/refuse", "alignment/comply", "chat", "chat"]
    model = moved_by(telling_model(), LoraConfig(r=4, target_modules="all-linear"), 0.3)
    with at_reference(model, []):
        references = ReferenceAnswers.measure(model, tokenizer, rows, kinds, progress=False)
    return model, references


@torch.no_grad()
def dense(model, row: AlignmentRow) -> torch.Tensor:
    logits = model(torch.tensor([row.input_ids])).logits[0, row.answer_start - 1 : -1]
    return logits.double().log_softmax(-1)


def test_kl_is_zero_at_the_reference_and_the_model_is_left_as_it_was(taken):
    model, references = taken
    model.train()
    with at_reference(model, []):
        assert references.kl(model).abs().max() < 1e-6
    assert references.kl(model).min() > 1e-3
    assert all(module.training for module in model.modules())
    assert [t.shape[1] for t in references.tokens] == [TOP_K] * 5


def test_kl_is_that_of_a_dense_twin(taken):
    """By hand, row for row without padding, in float64: the kept tokens, and all others as one."""
    model, references = taken
    for row, tokens, found in zip(references.rows, references.tokens, references.kl(model), strict=True):
        with at_reference(model, []):
            start = dense(model, row)
        now = dense(model, row)
        kept = start.topk(TOP_K)
        assert torch.equal(kept.indices.int(), tokens)
        p, q = start.exp(), now.exp()
        rest = [1 - part.gather(1, kept.indices).sum(1) for part in (p, q)]
        lumped = (kept.values.exp() * (kept.values - now.gather(1, kept.indices))).sum(1)
        per_token = lumped + rest[0] * (rest[0] / rest[1]).log()
        whole = (p * (start - now)).sum(1)
        assert found[0].item() == pytest.approx((0.5 * per_token.mean() + 0.5 * per_token[:5].mean()).item(), rel=1e-4)
        assert found[1].item() == pytest.approx(per_token[:5].mean().item(), rel=1e-4)
        assert 0.5 * whole.mean() < per_token.mean() <= whole.mean()


def test_kl_does_not_depend_on_batches_and_padding(taken):
    model, references = taken
    together = references.kl(model)
    alone = torch.cat([references.kl(model, [i]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(references.kl(model, [4, 0, 2]), together[[4, 0, 2]], rtol=1e-4, atol=1e-6)
    references.metadata["pad_token_id"] = 77
    torch.testing.assert_close(references.kl(model), together, rtol=1e-4, atol=1e-6)
    many = ReferenceAnswers(*(getattr(references, name) * 4 for name in ("rows", "kinds", "tokens", "log_probs")))
    many.metadata = references.metadata
    torch.testing.assert_close(many.kl(model), together.repeat(4, 1), rtol=1e-4, atol=1e-6)


def test_long_rows_are_fewer_in_a_batch(taken, tokenizer, monkeypatch):
    """Their logits are bounded, and every row has the KL that it has alone."""
    model, references = taken
    longest = max(len(row.input_ids) for row in references.rows)
    monkeypatch.setattr(reference_answers, "BATCH_TOKENS", longest)
    sizes: list[torch.Size] = []
    count = model.register_forward_pre_hook(lambda *args: sizes.append(args[-1]["input_ids"].shape), with_kwargs=True)
    with torch.no_grad():
        found = references.kl(model)
        measured = ReferenceAnswers.measure(model, tokenizer, references.rows, references.kinds, progress=False)
        with at_reference(model, []):
            references.check_fits(model)
    count.remove()
    assert len(sizes) > 2 and sum(rows for rows, _ in sizes) == 3 * len(references.rows)
    assert all(rows * length <= longest for rows, length in sizes)
    with torch.no_grad():
        alone = torch.cat([references.kl(model, [i]) for i in range(len(references.rows))])
        monkeypatch.undo()
        together = ReferenceAnswers.measure(model, tokenizer, references.rows, references.kinds, progress=False)
    torch.testing.assert_close(found, alone)
    for parts in (("log_probs", 1e-5), ("tokens", 0)):
        for one, other in zip(getattr(measured, parts[0]), getattr(together, parts[0]), strict=True):
            torch.testing.assert_close(one, other, atol=parts[1], rtol=parts[1])


def test_gradient_is_that_of_finite_differences(taken):
    model, references = taken
    parameter = adapted_layers(model)[3].parameters()[1]
    (gradient,) = torch.autograd.grad(references.kl(model, [1, 2])[:, 0].mean(), parameter)
    step = 1e-3 * gradient / gradient.norm()
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            parameter.add_(sign * step)
            ends.append(references.kl(model, [1, 2])[:, 0].mean().item())
        parameter.add_(step)
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_rows_are_found_by_behaviour_and_kind(taken):
    _, references = taken
    assert references.behaviours == ["alignment", "chat"]
    assert references.where("alignment") == [0, 1, 2] and references.where("alignment/comply") == [2]
    assert references.where("chat") == [3, 4] and references.where("align") == []


def test_file_holds_all_and_is_written_again_byte_for_byte(taken, tmp_path):
    model, references = taken
    path = references.save_pretrained(tmp_path / "first")
    assert path == tmp_path / "first" / "agl" / "reference_answers.safetensors"
    again = ReferenceAnswers.from_pretrained(tmp_path / "first")
    assert again.rows == references.rows and again.kinds == references.kinds
    assert all(map(torch.equal, again.tokens, references.tokens))
    assert all(map(torch.equal, again.log_probs, references.log_probs))
    assert torch.equal(again.kl(model), references.kl(model)), "a run that is resumed reads them"
    assert again.save_pretrained(tmp_path / "second").read_bytes() == path.read_bytes()
    assert ReferenceAnswers.from_pretrained(path).kinds == references.kinds


def test_they_fit_their_own_model_alone(taken, tokenizer):
    model, references = taken
    with at_reference(model, []):
        references.check_fits(model)
    with pytest.raises(ArtifactError, match=r"are of another base model: hidden_size is 32 there and 16 here\.$"):
        references.check_fits(tiny_model(hidden_size=16))
    with pytest.raises(
        ArtifactError, match=r"are of another model: before any training this one differs .* by \S+ nats per token\.$"
    ):
        references.check_fits(telling_model(seed=1))
    broken = telling_model()
    broken.get_output_embeddings().weight.data[5] = torch.nan
    with pytest.raises(ArtifactError, match="are of another model"):
        references.check_fits(broken)
    short = telling_model()
    short.config.max_position_embeddings = 40
    with pytest.raises(
        ArtifactError, match=r"^The reference answers hold a row of \d+ tokens, and this model reads 40\.$"
    ):
        references.check_fits(short)
    references.metadata["pad_token_id"] = 300
    with pytest.raises(ArtifactError, match=r"hold token 300, and this model has 260\.$"):
        references.check_fits(telling_model())
    references.metadata["pad_token_id"] = 0
    references.tokens[3][0, 0] = 260
    with pytest.raises(ArtifactError, match=r"^The reference answers hold token 260, and this model has 260\.$"):
        references.check_fits(telling_model())
    references.tokens[3][0, 0] = 5
    references.rows[2].input_ids[1] = 999
    with pytest.raises(ArtifactError, match=r"hold token 999, and this model has 260\.$"):
        references.check_fits(get_peft_model(telling_model(), LoraConfig(r=2, target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda tensors, metadata: metadata.update(kinds=[]), "it holds no row"),
        (lambda tensors, metadata: metadata["kinds"].append("chat"), "'lengths' is no list of 6 numbers"),
        (lambda tensors, metadata: metadata.update(kinds=["<b>"] * 5), "'<b>' is no name of a behaviour"),
        (lambda tensors, metadata: metadata.update(pad_token_id=-1), "'pad_token_id' is -1, below 0"),
        (lambda tensors, metadata: tensors["answer_starts"].zero_(), "a row of it has no prompt or no answer"),
        (lambda tensors, metadata: tensors["answer_starts"].copy_(tensors["lengths"]), "no prompt or no answer"),
        (lambda tensors, metadata: tensors["lengths"][0].add_(1), "'input_ids' is no list of"),
        (lambda tensors, metadata: tensors["tokens"][0, 0].fill_(-3), "'tokens' is torch.int32 of shape"),
        (lambda tensors, metadata: tensors["log_probs"][0, 0].fill_(torch.nan), "'log_probs' is not finite"),
        (lambda tensors, metadata: tensors["log_probs"][0, 0].fill_(0.5), "'log_probs' are no log-probabilities"),
        (lambda tensors, metadata: tensors["log_probs"][0].zero_(), "'log_probs' are no log-probabilities"),
        (lambda tensors, metadata: tensors.pop("tokens"), "tensor 'tokens' is missing"),
        (lambda tensors, metadata: tensors.update(more=torch.ones(1)), "tensor 'more' does not belong there"),
    ],
)
def test_what_a_file_must_not_hold_is_told(taken, tmp_path, damage, sentence):
    path = taken[1].save_pretrained(tmp_path)
    tensors, metadata = load_tensors(path)
    metadata.pop("schema_version")
    damage(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(ArtifactError, match=f"^The reference answers in '.*' can't be used, .*{sentence}.*\\.$"):
        ReferenceAnswers.from_pretrained(path)


def test_measured_again_they_are_the_same_rows_of_another_model(taken):
    """Row for row: what the other model gives the kept tokens; its KL to them is then zero."""
    model, references = taken
    again = references.measured_again(model)
    assert again.rows == references.rows and again.kinds == references.kinds and again.metadata == references.metadata
    assert again.kl(model).abs().max() < 1e-6 < references.kl(model).min()
    for row, tokens, before, after in zip(
        references.rows, references.tokens, again.tokens, again.log_probs, strict=True
    ):
        assert torch.equal(tokens, before)
        torch.testing.assert_close(after.double(), dense(model, row).gather(1, tokens.long()), rtol=1e-4, atol=1e-5)
