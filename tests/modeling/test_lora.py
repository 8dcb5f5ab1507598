"""Names, shapes and factors of guarded layers: the drift is a property of ΔW, not of how PEFT writes it down."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from agl_trl import FisherStatistics, estimate_fisher
from agl_trl.modeling.lora import adapted_layers, base_weight, frozen_weights, layer_shape, linear_layers
from tests.helpers.models import tiny_model


RANK = 4


@pytest.fixture(scope="module")
def statistics(tokenizer, alignment_rows) -> FisherStatistics:
    return estimate_fisher(tiny_model(), alignment_rows, tokenizer, shrinkage=0.3, progress=False)


def with_delta(**config):
    """A model whose adapter, whatever its configuration, holds the same ΔW of rank 4 in every layer."""
    model = get_peft_model(
        tiny_model(), LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear"} | config)
    )
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model):
        A, B, scaling = layer.factors()
        left = torch.randn(B.shape[0], RANK, generator=generator)
        right = torch.randn(RANK, A.shape[1], generator=generator)
        with torch.no_grad():
            A.zero_(), B.zero_()
            A[:RANK], B[:, :RANK] = right, left / scaling
    return model


@pytest.mark.parametrize(
    "config",
    [
        dict(lora_alpha=64),
        dict(use_rslora=True),
        dict(r=16, lora_alpha=3),
        dict(rank_pattern={"q_proj": 8, "down_proj": 6}),
        dict(alpha_pattern={"v_proj": 1, "up_proj": 50}),
        dict(use_rslora=True, rank_pattern={"k_proj": 12}, alpha_pattern={"k_proj": 5}),
    ],
)
def test_drift_does_not_depend_on_alpha_rank_or_their_patterns(config, statistics):
    expected, other = (statistics.relative_drift(with_delta(**changes)) for changes in ({}, config))
    assert list(other) == list(expected)
    assert list(other.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_drift_does_not_depend_on_a_rotation_between_the_factors(statistics):
    model = with_delta()
    before = statistics.relative_drift(model)
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(2))).Q
    with torch.no_grad():
        for layer in adapted_layers(model):
            A, B, _ = layer.factors()
            A.copy_(turn.T @ A), B.copy_(B @ turn)
    assert list(statistics.relative_drift(model).values()) == pytest.approx(list(before.values()), rel=1e-4)


def test_factors_are_pefts_delta_weight():
    for architecture, config in (("llama", {}), ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True))):
        model = get_peft_model(
            tiny_model(architecture), LoraConfig(**{"r": 3, "target_modules": "all-linear"} | config)
        )
        for layer in adapted_layers(model):
            torch.nn.init.normal_(layer.current().B)
            A, B, scaling = layer.factors()
            delta = layer.module.get_delta_weight("default")
            expected = delta.T if isinstance(layer.module.get_base_layer(), Conv1D) else delta
            torch.testing.assert_close(scaling * B @ A, expected, rtol=1e-5, atol=1e-6)
            assert base_weight(layer.module).shape == layer_shape(layer.module) == expected.shape


def test_names_are_those_of_the_base_model():
    base, adapted = tiny_model(), get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    assert (
        list(linear_layers(base)) == list(linear_layers(adapted)) == [layer.name for layer in adapted_layers(adapted)]
    )
    assert "lm_head" not in linear_layers(base) and dict(base.named_modules()).keys() >= set(linear_layers(base))


def test_frozen_rows_are_those_of_the_base_weight():
    for architecture, config in (("llama", {}), ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True))):
        model = get_peft_model(tiny_model(architecture), LoraConfig(**{"target_modules": "all-linear"} | config))
        layers = adapted_layers(model)
        frozen = frozen_weights(layers)
        for layer, read, squared in zip(layers, frozen.rows, frozen.squared_norm, strict=True):
            weight = base_weight(layer.module)
            assert torch.equal(read(torch.tensor([5, 0])), weight[[5, 0]])
            assert squared.item() == pytest.approx(weight.square().sum().item())


def test_several_active_adapters_are_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert [layer.adapter for layer in adapted_layers(model)] == ["default"] * 2
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 are active: default, second"):
        adapted_layers(model)
