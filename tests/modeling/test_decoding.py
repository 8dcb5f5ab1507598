"""Greedy is greedy: whatever generation config a model brings, and whatever special tokens its tokenizer lacks."""

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast

from agl_trl import estimate_fisher
from agl_trl.evaluation.behaviour import measure_behaviour
from agl_trl.evaluation.probes import probe
from agl_trl.modeling.base_and_tuned import BaseAndTuned
from agl_trl.modeling.generation import end_tokens, generate_answers, prompt_ids
from tests.helpers.models import adapted, byte_tokenizer, moved_adapter, probe_prompts, tiny_model


LENGTH = 8
GENERATION_CONFIGS = {
    "penalty": dict(repetition_penalty=5.0),
    "beams": dict(num_beams=4, length_penalty=3.0),
    "sampling": dict(do_sample=True, temperature=5.0, top_k=0),
    "n-grams": dict(no_repeat_ngram_size=1),
    "forced": dict(forced_bos_token_id=70, forced_eos_token_id=70),
    "bad words": dict(bad_words_ids=[[token] for token in range(4, 200)]),
    "suppressed": dict(suppress_tokens=list(range(4, 200)), begin_suppress_tokens=[200, 201]),
    "bias": dict(sequence_bias=[[[70], 100.0]]),
    "guidance": dict(guidance_scale=3.0),
    "short": dict(max_length=3, max_time=1e-9, min_length=3),
    "stop": dict(stop_strings=["a", "e", "o"]),
    "cache": dict(cache_implementation="static", prefill_chunk_size=4),
}


def by_hand(model, tokenizer, prompt, ends=(1,), length=LENGTH) -> str:
    """The most likely token, one by one."""
    ids, written = prompt_ids(tokenizer, prompt), []
    with torch.no_grad():
        for _ in range(length):
            token = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
            if token in ends:
                break
            written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", GENERATION_CONFIGS)
def test_generation_config_changes_no_answer(name, tokenizer):
    prompts, tuned = probe_prompts(), tiny_model().eval()
    tuned.generation_config = own = GenerationConfig(eos_token_id=1, **GENERATION_CONFIGS[name])
    found = measure_behaviour(
        tuned, tokenizer, prompts, base=tiny_model().eval(), max_new_tokens=LENGTH, batch_size=3, progress=False
    )
    expected = [by_hand(tuned, tokenizer, prompt) for prompt in prompts["prompt"]]
    for side in ("base", "tuned"):
        assert [entry[f"response_{side}"] for entry in found.answers] == expected
    assert tuned.generation_config is own
    for option, value in GENERATION_CONFIGS[name].items():
        assert getattr(own, option) == value


def test_two_checkpoints_end_at_the_same_tokens(tokenizer):
    """Also where they name different ones."""
    prompts, base, tuned = probe_prompts(), tiny_model().eval(), tiny_model().eval()
    first = prompt_ids(tokenizer, prompts[0]["prompt"])
    with torch.no_grad():
        said = base.generate(torch.tensor([first]), max_new_tokens=4, do_sample=False)[0, len(first) :].tolist()
    tuned.generation_config.eos_token_id = [1, said[2]]
    found = measure_behaviour(tuned, tokenizer, prompts, base=base, max_new_tokens=LENGTH, progress=False)
    expected = [by_hand(base, tokenizer, prompt, (1, said[2])) for prompt in prompts["prompt"]]
    assert [entry["response_base"] for entry in found.answers] == expected
    assert [entry["response_tuned"] for entry in found.answers] == expected
    assert found.metadata["decoding"].endswith(
        f"at most {LENGTH} tokens (2048 with the prompt), until token 1 or {said[2]}"
    )


def test_an_adapter_leaves_the_config_of_its_base_as_it_was(tokenizer):
    model, prompts = adapted(0.3), list(probe_prompts()["prompt"])
    model.get_base_model().generation_config.repetition_penalty = 5.0
    own = model.get_base_model().generation_config
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=LENGTH, progress=False)
    assert answers == [by_hand(model, tokenizer, prompt) for prompt in prompts]
    assert model.generation_config is own is model.get_base_model().generation_config


def without(tokenizer: PreTrainedTokenizerFast, *names: str) -> PreTrainedTokenizerFast:
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


@pytest.mark.parametrize("missing", [("pad_token",), ("pad_token", "eos_token")])
def test_a_tokenizer_without_padding_gives_the_same(missing, tokenizer):
    """As every Llama's; with neither token a model is asked all the same, and answers up to its length."""
    bare, prompts = without(byte_tokenizer(), *missing), probe_prompts()
    model = adapted(0.3)
    found = measure_behaviour(model, bare, prompts, max_new_tokens=LENGTH, batch_size=3, progress=False)
    expected = [by_hand(model, tokenizer, prompt) for prompt in prompts["prompt"]]
    assert [entry["response_tuned"] for entry in found.answers] == expected
    assert torch.isfinite(found.kl_first_tokens).all()
    rows = [{"prompt": prompt} for prompt in prompts["prompt"]]
    assert estimate_fisher(tiny_model(), rows, bare, progress=False).metadata["num_rows"] == len(rows)


def test_padding_behind_an_end_is_no_answer(tokenizer):
    """Token 0, which pads where nothing else does, may be a word."""
    model, bare = tiny_model().eval(), without(byte_tokenizer(), "pad_token", "eos_token")
    prompts = list(probe_prompts()["prompt"])
    said = {by_hand(model, tokenizer, prompt, ()) for prompt in prompts}
    ids = {token for text in said for token in tokenizer(text)["input_ids"]}
    model.generation_config.eos_token_id = [*sorted(ids)[: len(ids) // 2]]
    ends = end_tokens(bare, model)
    answers = generate_answers(model, bare, prompts, max_new_tokens=LENGTH, progress=False)
    assert answers == [by_hand(model, bare, prompt, ends) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 1


def test_answers_end_where_the_model_reads_no_more(tokenizer):
    """The positions of this GPT-2 end at 128: a batch has no room for them all, and none takes room from another."""
    lengths = (120, 127, 30, 100, 126)
    asked = ["".join(chr(97 + i * i % 26) for i in range(length)) for length in lengths]
    model = tiny_model("gpt2").eval()
    expected = [by_hand(model, tokenizer, p, length=min(40, 128 - n)) for p, n in zip(asked, lengths, strict=True)]
    found = generate_answers(model, tokenizer, asked, max_new_tokens=40, batch_size=5, progress=False)
    assert found == expected and len({len(answer) for answer in found}) > 2
    with pytest.raises(ValueError, match="Row 1 has a prompt of 128 tokens, and the model reads 128: shorten it"):
        generate_answers(model, tokenizer, ["x", "x" * 128], progress=False)
    tuned = moved_adapter(tiny_model("gpt2"), target_modules=["c_attn"])
    measured = measure_behaviour(tuned, tokenizer, Dataset.from_dict({"prompt": asked}), progress=False)
    assert measured.kl_first_tokens.isfinite().all() and measured.kl_first_tokens.max() > 0
    assert "at most 64 tokens (128 with the prompt)" in measured.metadata["decoding"]
    # Read again, a character that was cut has more tokens than were written.
    probes = probe(BaseAndTuned(tuned), tokenizer, [asked[1]], ["\ufffd"], torch.tensor([True]))
    assert probes.kl_first_tokens.isfinite().all()
