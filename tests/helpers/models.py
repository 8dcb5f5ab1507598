"""Tiny random models of real architectures, and a byte tokenizer with a chat template."""

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from agl_trl.modeling.lora import adapted_layers


TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
# Per architecture: config values, and the modules LoRA adapts.
ARCHITECTURES = {
    "llama": (SMALL, "all-linear"),
    "mistral": (SMALL, "all-linear"),
    "qwen3": (SMALL | dict(head_dim=8), "all-linear"),
    "gemma3_text": (SMALL | dict(head_dim=8), "all-linear"),  # tied embeddings
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=128), ["c_attn", "c_proj", "c_fc"]),  # Conv1D
    "gpt_neox": (SMALL, "all-linear"),  # fused query_key_value
    "opt": (  # its embeddings and logits are of another size than its layers, as OPT-350m's
        dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16),
        "all-linear",
    ),
}
# Models with layers that a text does not reach, or reaches in part: for statistics of a plain model, not for training.
MIXTURES = {
    "mixtral": SMALL | dict(num_local_experts=4),
    "qwen3_moe": SMALL | dict(num_experts=4, moe_intermediate_size=16, head_dim=8, num_experts_per_tok=2),
}
STATE_SPACE = {
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "jamba": SMALL
    | dict(num_experts=2, mamba_d_state=4, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<user>", "<assistant>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    values = ({name: values for name, (values, _) in ARCHITECTURES.items()} | MIXTURES | STATE_SPACE)[architecture]
    config = AutoConfig.for_model(
        architecture, **(values | dict(vocab_size=260, pad_token_id=0, eos_token_id=1, bos_token_id=None) | changes)
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_vision_model() -> PreTrainedModel:
    """A Llama that sees pictures, if it is shown any."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        text_config=SMALL
        | dict(model_type="llama", vocab_size=260, pad_token_id=0, eos_token_id=1, bos_token_id=None),
        vision_config=vision | dict(model_type="clip_vision_model", image_size=16, patch_size=8),
        image_token_index=255,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


def chat_rows(count: int, question: str, answer: str) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{question} {i * i}" + "!" * (i % 4)}],
            "completion": [{"role": "assistant", "content": answer.format(i)}],
        }
        for i in range(count)
    ]


def preference_rows(count: int, question: str, chosen: str, rejected: str) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"{question} {i * i}"}],
            "chosen": [{"role": "assistant", "content": chosen.format(i)}],
            "rejected": [{"role": "assistant", "content": rejected.format(i)}],
        }
        for i in range(count)
    ]


def probe_prompts() -> Dataset:
    """Seven prompts of two categories, four of them unsafe."""
    rows = chat_rows(7, "tell me", "answer {}")
    return Dataset.from_list([row | {"category": "ab"[i % 2], "unsafe": i < 4} for i, row in enumerate(rows)])


def tiny_vision_language_model(seed: int = 0) -> PreTrainedModel:
    """Llava with two layers of Llama; transformers 4.52 renamed its modules."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=32)
    config = AutoConfig.for_model(
        "llava",
        text_config=SMALL | dict(model_type="llama", vocab_size=260, pad_token_id=0),
        vision_config=vision | dict(model_type="clip_vision_model", image_size=16, patch_size=8),
        image_token_index=259,
    )
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config)


def moved_adapter(model: PreTrainedModel, scale: float = 0.05, **config) -> PeftModel:
    """A model with an adapter (by default LoRA of rank 2 on the query projections) of which everything that it trains has moved."""
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return moved_by(model, LoraConfig(**options | config), scale)


def moved_by(model: PreTrainedModel, config: PeftConfig, scale: float = 0.05) -> PeftModel:
    """A model with an adapter of any method, of which everything that it trains has moved."""
    torch.manual_seed(1)  # of what the method itself draws
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned.eval()


def adapted(scale: float) -> PeftModel:
    """A tiny model whose adapter has moved by normal factors of that scale."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.parameters()[1], std=scale)
    return model.eval()


def thinking_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose template opens reasoning in the prompt, with marks among its special tokens and words of one token each."""
    tokenizer = byte_tokenizer()
    marks = ["<user>", "<assistant>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.chat_template = TEMPLATE.replace("%}<assistant>{% endif %}", "%}<assistant><think>{% endif %}")
    return tokenizer


def scripted_model(tokenizer: PreTrainedTokenizerFast, *words: str) -> PreTrainedModel:
    """A Llama in which every token alone decides on the next: of these words each is followed by the one after it."""
    size = len(tokenizer)
    model = tiny_model(hidden_size=size, num_attention_heads=1, num_key_value_heads=1, vocab_size=size, head_dim=4)
    for name, parameter in model.named_parameters():
        if ".self_attn." in name or ".mlp." in name:
            parameter.data.zero_()
    model.get_input_embeddings().weight.data.copy_(torch.eye(size))
    head, ids = torch.zeros(size, size), tokenizer.convert_tokens_to_ids([*words, tokenizer.eos_token])
    head[ids[1:], ids[:-1]] = 1.0
    model.get_output_embeddings().weight.data.copy_(head)
    return model.eval()
