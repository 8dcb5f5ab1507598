"""Statistics against brute force, and invariances: whatever must not change them does not."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from agl_trl import estimate_fisher
from agl_trl.data.alignment import tokenize_row
from agl_trl.fisher.estimate import _objective
from agl_trl.modeling.generation import answered_by
from agl_trl.modeling.lora import linear_layers
from tests.helpers.models import chat_rows, tiny_model
from tests.helpers.reference import dense, quadratic_form, shrunk


FULL = dict(rank=4096, dtype=torch.float32, progress=False)


def brute_force(model, rows, tokenizer, objective, seed=0):
    """X and G of every linear layer in float64, one row at a time, without hooks on anything but the layers."""
    model = model.double().eval()
    layers = linear_layers(model)
    X = dict.fromkeys(layers, 0)
    G = dict.fromkeys(layers, 0)
    count = 0
    for index, row in enumerate(rows):
        tokens = tokenize_row(row, tokenizer)
        seen = {}

        def keep(module, args, output, name, seen=seen):
            seen[name] = (args[0], output)

        handles = [module.register_forward_hook(partial(keep, name=name)) for name, module in layers.items()]
        ids = torch.tensor([tokens.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        positions = torch.arange(tokens.answer_start - 1, len(tokens.input_ids) - 1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        if objective == "projection":
            signs = torch.randint(0, 2, logits[positions].shape, generator=generator).double() * 2 - 1
            value = (signs * logits[positions]).sum()
        else:
            value = logits[positions].log_softmax(-1)[range(len(positions)), ids[0, positions + 1]].sum()
        gradients = torch.autograd.grad(value, [out for _, out in seen.values()])
        for (name, (x, _)), g in zip(seen.items(), gradients, strict=True):
            x, g = x[0, 1:], g[0, 1:]  # without the first token
            X[name] = X[name] + (x.T @ x).detach()
            G[name] = G[name] + g.T @ g
        count += len(tokens.input_ids) - 1
    model.float()
    return {n: v / count for n, v in X.items()}, {n: v / count for n, v in G.items()}, count


@pytest.mark.parametrize("fisher_type", ["projection", "empirical"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_statistics_equal_float64_brute_force(architecture, fisher_type, tokenizer, alignment_rows):
    model = tiny_model(architecture)
    statistics = estimate_fisher(
        model, alignment_rows, tokenizer, fisher_type=fisher_type, shrinkage=0.2, batch_size=3, **FULL
    )
    X, G, count = brute_force(model, alignment_rows, tokenizer, fisher_type)
    assert statistics.num_tokens == count
    for name, module in linear_layers(model).items():
        metric = statistics.metric(name)
        torch.testing.assert_close(dense(metric.input), X[name], rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(dense(metric.output), shrunk(G[name], 0.2), rtol=2e-4, atol=2e-4)
        weight = module.weight.double().detach()
        weight = weight.T if architecture == "gpt2" else weight
        expected = quadratic_form(weight, X[name], shrunk(G[name], 0.2)).sqrt()
        assert statistics.weight_norm[name].item() == pytest.approx(expected.item(), rel=1e-4)


def assert_same(one, other, rtol=1e-4):
    assert one.input_of == other.input_of and one.num_tokens == other.num_tokens
    for name in one.input_of:
        a, b = one.metric(name), other.metric(name)
        torch.testing.assert_close(dense(a.input), dense(b.input), rtol=rtol, atol=1e-6)
        torch.testing.assert_close(a.weight_norm, b.weight_norm, rtol=rtol, atol=0)
        if one.outputs:
            torch.testing.assert_close(dense(a.output), dense(b.output), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("fisher_type", ["projection", "empirical", "mc"])
def test_batch_size_and_padding_change_nothing_beyond_rounding(fisher_type, tokenizer, alignment_rows):
    kwargs = dict(fisher_type=fisher_type, shrinkage=0.1, **FULL)
    one = estimate_fisher(tiny_model(), alignment_rows, tokenizer, batch_size=1, **kwargs)
    assert_same(one, estimate_fisher(tiny_model(), alignment_rows, tokenizer, batch_size=10, **kwargs))


def test_order_of_rows_changes_nothing(tokenizer, alignment_rows):
    reversed_rows = alignment_rows.select(range(len(alignment_rows) - 1, -1, -1))
    one, other = (estimate_fisher(tiny_model(), rows, tokenizer, **FULL) for rows in (alignment_rows, reversed_rows))
    assert_same(one, other)


def test_checkpointing_dropout_and_train_mode_change_nothing(tokenizer, alignment_rows):
    def with_adapter(train: bool):
        model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
        if train:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model.train(train)

    kwargs = dict(shrinkage=0.1, **FULL)
    one, other = with_adapter(False), with_adapter(True)
    first, second = (estimate_fisher(model, alignment_rows, tokenizer, **kwargs) for model in (one, other))
    assert_same(first, second, rtol=1e-6)
    assert all(module.training for module in other.modules()) and not any(module.training for module in one.modules())
    assert all(p.grad is None for p in other.parameters())
    assert not any(module._forward_hooks for name, module in other.named_modules() if name.endswith("q_proj"))


def test_plain_model_and_fresh_adapter_have_the_same_statistics(tokenizer, alignment_rows):
    plain = estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.1, **FULL)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    assert_same(plain, estimate_fisher(adapted, alignment_rows, tokenizer, shrinkage=0.1, **FULL))


def test_global_random_state_is_untouched(tokenizer, alignment_rows):
    model = tiny_model()
    before = torch.get_rng_state()
    for fisher_type in ("projection", "mc"):
        estimate_fisher(
            model, alignment_rows, tokenizer, fisher_type=fisher_type, shrinkage=0.5, num_samples=4, **FULL
        )
    assert torch.equal(before, torch.get_rng_state())


def test_only_unsafe_rows_carry_the_statistics(tokenizer, alignment_rows):
    mixed = alignment_rows.add_column("unsafe", [i < 4 for i in range(len(alignment_rows))])
    assert_same(
        estimate_fisher(tiny_model(), mixed, tokenizer, **FULL),
        estimate_fisher(tiny_model(), alignment_rows.select(range(4)), tokenizer, **FULL),
    )


def test_prompt_only_rows_are_answered_by_the_model(tokenizer):
    rows = [{"prompt": row["prompt"]} for row in chat_rows(3, "q", "")]
    statistics = estimate_fisher(tiny_model(), rows, tokenizer, **FULL)
    prompts = sum(len(tokenizer.apply_chat_template(r["prompt"], return_dict=True)["input_ids"]) - 1 for r in rows)
    assert statistics.num_tokens > prompts


def test_sampled_labels_follow_the_model(tokenizer):
    """The Monte-Carlo objective draws each token with the model's own probability."""
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).repeat(4000, 1).requires_grad_()
    value = _objective(logits, torch.zeros(4000, dtype=torch.long), "mc", torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value, logits)
    drawn = (gradient > 0).float().mean(0)  # d log p(y) / d logits is positive only at y
    torch.testing.assert_close(drawn, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "Row 0 has the columns answer, question, which make no known format"),
        ([], "no row to protect"),
        ([{"prompt": "a", "completion": "b", "unsafe": False}], "no row to protect"),
    ],
)
def test_bad_rows_get_one_sentence(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        estimate_fisher(tiny_model(), rows, tokenizer, progress=False)


def test_iterable_dataset_gives_its_first_rows(tokenizer, alignment_rows):
    assert_same(
        estimate_fisher(tiny_model(), alignment_rows.to_iterable_dataset(), tokenizer, num_samples=5, **FULL),
        estimate_fisher(tiny_model(), Dataset.from_list(list(alignment_rows)[:5]), tokenizer, **FULL),
    )


def test_estimating_twice_gives_the_same_bytes(tokenizer, alignment_rows, tmp_path):
    one, other = (
        estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.5, progress=False).save_pretrained(
            tmp_path / name
        )
        for name in ("one", "other")
    )
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("row", [{"text": "x" * 200}, {"prompt": "x" * 200}, {"prompt": "x", "completion": "x" * 200}])
def test_a_row_longer_than_the_model_reads_is_named(tokenizer, row):
    with pytest.raises(ValueError, match=r"^Row 1 has .*20\d tokens, and the model reads 128: shorten"):
        estimate_fisher(tiny_model("gpt2"), [{"text": "a word"}, row], tokenizer, progress=False)


def test_rows_with_and_without_answers_go_together(tokenizer):
    model, given = tiny_model(), {"prompt": "Bread", "completion": "is baked."}
    statistics = estimate_fisher(model, [given, {"prompt": "And flour"}], tokenizer, **FULL)
    (answered,) = answered_by(model, tokenizer, [{"prompt": "And flour"}], progress=False)
    assert_same(statistics, estimate_fisher(model, [given, answered], tokenizer, **FULL))
