"""Forward passes: no logits but those that are read, and the model stays as it was."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from peft import LoraConfig

from agl_trl.data.alignment import batches, pad_token_id, tokenize_row
from agl_trl.data.rows import prompt_ids
from agl_trl.evaluation.probes import probe
from agl_trl.modeling import forward
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.forward import answer_logits, evaluating, last_logits, recomputing, takes_logits_to_keep
from agl_trl.modeling.generation import end_tokens, generate_answers, greedy_decoding, padded_left
from agl_trl.modeling.likelihood import answer_nll
from tests.helpers.models import ARCHITECTURES, adapted, moved_by, probe_prompts, tiny_model


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    return probe_prompts()


def test_logits_are_those_of_the_answers_and_no_others_are_made(tokenizer, prompts):
    model = adapted(0.5).eval()
    rows = [tokenize_row(prompts[i], tokenizer, None) for i in (0, 2, 5)]
    (batch,) = batches(rows, 3, pad_token_id(tokenizer), torch.device("cpu"))
    made = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape[1]))
    with handle, torch.no_grad():
        logits, mask = answer_logits(model, batch)
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(logits[mask], full[batch.answer_mask])
    assert mask.sum() == batch.answer_mask.sum() and made == [mask.shape[1], batch.input_ids.shape[1]]
    assert made[0] < made[1]


def test_a_model_on_several_devices_is_asked_for_a_number_of_logits(tokenizer, prompts):
    """An index would have to lie where the head is, which nobody tells. A layer that is offloaded stands for another device."""
    model = tiny_model().eval()
    (batch,) = batches([tokenize_row(prompts[i], tokenizer, None) for i in (0, 2, 5)], 3, 0, torch.device("cpu"))
    asked = []
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs["logits_to_keep"]), with_kwargs=True)
    with torch.no_grad():
        whole, mask = answer_logits(model, batch)
        cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
        spread, again = answer_logits(model, batch)
    assert torch.is_tensor(asked[0]) and type(asked[1]) is int and asked[1] < batch.input_ids.shape[1]
    torch.testing.assert_close(spread, whole)
    assert torch.equal(mask, again)


def test_a_model_that_makes_all_logits_gives_those_of_the_answers_too(tokenizer, prompts):
    """As models of remote code may: their `forward` knows no `logits_to_keep`."""
    model = tiny_model().eval()
    (batch,) = batches([tokenize_row(prompts[i], tokenizer) for i in (1, 4)], 2, 0, torch.device("cpu"))
    with torch.no_grad():
        fewer, mask = answer_logits(model, batch)
        forward = model.forward
        model.forward = lambda input_ids, attention_mask, use_cache: forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )
        assert not takes_logits_to_keep(model)
        all_of_them, same = answer_logits(model, batch)
    assert torch.equal(mask, same)
    torch.testing.assert_close(all_of_them, fewer)


def test_every_module_goes_back_to_its_own_mode_also_after_a_failure():
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert True in modes.values() and False in modes.values()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_eval_mode_keeps_inputs_alone_and_changes_no_gradient(architecture, reentrant):
    """Also where the model trains again when the gradient is taken, and its layers, as OPT's, drop out by themselves."""
    base = tiny_model(architecture, **(dict(attention_dropout=0.5) if architecture == "llama" else {}))
    modules = ARCHITECTURES[architecture][1]
    model = moved_by(base, LoraConfig(r=4, target_modules=modules, lora_dropout=0.5), 0.3).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))

    def gradient(inside: Callable) -> tuple[list[torch.Tensor], int]:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            with evaluating(model), inside(model):
                loss = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 5].mean()
            held = sum(t.numel() for t in kept)
            return list(torch.autograd.grad(loss, parameters)), held

    expected, all_of_it = gradient(lambda model: nullcontext())
    without, same = gradient(recomputing)
    assert same == all_of_it, "it is not on"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    found, held = gradient(recomputing)
    assert held < 0.6 * all_of_it
    for exact, *others in zip(expected, without, found, strict=True):
        assert all(torch.equal(exact, other) for other in others) and exact.abs().max() > 0
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


def test_only_logits_that_are_read_are_made(tokenizer, prompts):
    """Likelihood, KL and probes equal the full computation, from a fraction of its columns."""
    model, count, made = adapted(0.5).eval(), len(prompts), []
    questions, unsafe = list(prompts["prompt"]), torch.tensor(prompts["unsafe"])
    rows = [tokenize_row(row, tokenizer, None) for row in prompts]
    (batch,) = batches(rows, count, pad_token_id(tokenizer), torch.device("cpu"))
    with torch.no_grad():
        full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    expected = torch.zeros(count)
    for line, index in enumerate(batch.indices):
        positions = batch.answer_mask[line].nonzero().squeeze(1)
        expected[index] = -full[line, positions, batch.input_ids[line, positions + 1]].mean()
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape[:2].numel()))
    with hook:
        torch.testing.assert_close(answer_nll(model, tokenizer, prompts), expected, rtol=1e-5, atol=1e-5)
        answers = made.pop()
        assert answers == count * int(batch.answer_mask.any(0).sum()) < 0.8 * batch.input_ids.numel()
        probe(BaseAndTuned(model), tokenizer, questions, ["yes, that is it"] * count, unsafe)
        lengths = {len(prompt_ids(tokenizer, question)) for question in questions}
        window = {length - 1 + i for length in lengths for i in range(8)}
        assert made == [count * len(window)] * 2, "one pass of either model"


@pytest.mark.parametrize("on", [True, False])
def test_a_frozen_head_reads_states_of_their_own(on, tokenizer, prompts):
    """A view of the last states costs a copy of the whole head for every row; answers are those that a view gives."""
    model, seen = adapted(0.5).eval(), []
    head = model.get_output_embeddings()
    assert not head.weight.requires_grad, "as under every adapter"
    with nullcontext() if on else model.disable_adapter():
        with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            found = generate_answers(model, tokenizer, list(prompts["prompt"]), max_new_tokens=6, progress=False)
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts["prompt"]]
        padded = padded_left(ids, pad_token_id(tokenizer), torch.device("cpu"))
        config = greedy_decoding(6, end_tokens(tokenizer, model), pad_token_id(tokenizer))
        by_view = model.generate(**padded, generation_config=config, logits_to_keep=1)[
            :, padded["input_ids"].shape[1] :
        ]
    assert len(seen) == 6 and all(states.shape[:2] == (len(prompts), 1) for states in seen)
    assert all(states.stride() == torch.empty(states.shape).stride() for states in seen)
    assert found == [text.strip() for text in tokenizer.batch_decode(by_view, skip_special_tokens=True)]


def test_beside_the_cpu_no_index_lies_on_one_device(monkeypatch):
    """The last states of a model that is spread lie on another device than its inputs: an index of the inputs' device fails."""
    model = tiny_model()
    assert last_logits(model)["logits_to_keep"].tolist() == [-1]
    monkeypatch.setattr(forward, "input_device", lambda model: torch.device("cuda", 0))
    assert last_logits(model) == {"logits_to_keep": 1}


def test_a_model_that_makes_all_logits_gives_the_same(tokenizer, prompts):
    """Of architectures that can't be asked for a few columns, those that are read are taken from all."""

    class AllLogits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted(0.5).eval()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = AllLogits()
    torch.testing.assert_close(
        answer_nll(model, tokenizer, prompts), answer_nll(model.inner, tokenizer, prompts), rtol=1e-5, atol=1e-5
    )
