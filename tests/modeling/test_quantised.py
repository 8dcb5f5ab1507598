"""QLoRA: a base in 4 or 8 bit (bitsandbytes on the CPU), guarded as its dequantised weights."""

import pytest
import torch
from peft import IA3Config, OFTConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from agl_trl import AGLSFTConfig, AGLSFTTrainer, DriftReport, FisherStatistics, estimate_fisher
from agl_trl.modeling.forward import evaluating
from agl_trl.modeling.loading import load_model
from agl_trl.modeling.lora import adapted_layers, base_weight, linear_layers
from agl_trl.modeling.tuned_layers import is_quantised, layer_change, tuned_layers
from tests.helpers.models import moved_by, tiny_model
from tests.helpers.training import COMMON, lora


pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
QUANTISATIONS = {
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer_of(path, folder, train_rows, alignment_rows, quantisation, **config):
    return AGLSFTTrainer(
        str(folder),
        AGLSFTConfig(str(path), **COMMON | dict(max_steps=3) | config),
        train_dataset=train_rows,
        quantization_config=QUANTISATIONS[quantisation],
        peft_config=lora(),
        alignment_dataset=alignment_rows,
    )


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_quantised_base_trains_under_budget(quantisation, folder, tmp_path, train_rows, alignment_rows):
    trainer = trainer_of(
        tmp_path,
        folder,
        train_rows,
        alignment_rows,
        quantisation,
        drift_budget=1e-3,
        collision_coef=0.1,
        collision_rows=8,
    )
    layers = adapted_layers(trainer.model)
    assert {type(layer.module).__name__ for layer in layers} <= {"Linear4bit", "Linear8bitLt"} and len(layers) == 14
    assert {layer.parameters()[0].dtype for layer in layers} == {torch.bfloat16}, "TRL's cast"
    trainer.train()
    trainer.save_model()
    report = DriftReport.from_pretrained(tmp_path)
    assert 0 < report.mean_relative_drift <= 1e-3
    entry = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert entry["agl/riemannian"] > 0 and entry["agl/relative_drift"] > 0


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_statistics_of_the_whole_model_fit_its_quantised_form(
    quantisation, folder, tmp_path, train_rows, alignment_rows, tokenizer
):
    """The owner publishes statistics of the bf16 model; who trains in 4 bit uses them: ‖W‖ agrees within 5 %."""
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora())
    statistics = estimate_fisher(whole, alignment_rows, tokenizer, progress=False)
    statistics.save_pretrained(tmp_path / "published")
    trainer = trainer_of(
        tmp_path / "run", folder, train_rows, None, quantisation, fisher_path=str(tmp_path / "published")
    )
    for layer, other in zip(adapted_layers(trainer.model), adapted_layers(whole), strict=True):
        error = (base_weight(layer.module) - base_weight(other.module)).norm() / base_weight(other.module).norm()
        assert error < 0.15
    trainer.train()
    assert FisherStatistics.from_pretrained(tmp_path / "published").num_tokens == trainer.statistics.num_tokens


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
def test_passes_in_eval_mode_leave_weights_readable_and_gradients_flowing(quantisation, tmp_path, tokenizer):
    """On CPUs with AVX512-BF16, bitsandbytes rearranges 4-bit weights for good, unless it is kept from it."""
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTISATIONS[quantisation])
    exact = {name: base_weight(module) for name, module in linear_layers(load_model(str(tmp_path))[0]).items()}
    layers, ids = linear_layers(model), torch.ones(1, 4, dtype=torch.long)
    for passes in ("ours", "of others"):
        with torch.no_grad():
            if passes == "ours":
                with evaluating(model):
                    model(ids)
            else:
                model.eval()(ids)
        for name, module in layers.items():
            assert (base_weight(module) - exact[name]).norm() < 0.15 * exact[name].norm()
        if passes == "ours":
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded).logits.sum().backward()
            assert embedded.grad is not None and embedded.grad.norm() > 0


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_change_the_dequantised_weights(config, quantisation, folder):
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISATIONS[quantisation])
    tuned = dict(tuned_layers(moved_by(quantised, config), "default"))
    twin = moved_by(tiny_model(hidden_size=64, intermediate_size=64), config)
    for name, module in tuned_layers(twin, "default"):
        weight = base_weight(tuned[name])
        module.get_base_layer().weight.data = weight.clone()
        expected, found = layer_change(module).delta, layer_change(tuned[name], weight).delta
        assert is_quantised(tuned[name]) and not is_quantised(module) and expected.norm() > 0.01 * weight.norm()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
