"""
Ideas that were tried on the way to the shipped defaults, kept so that anyone can repeat them: layer importance, a decoupled
proximal step, pseudo-replay without data, and SafeGrad's surgery inside AGL.
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from agl_trl import AGLSFTConfig, AGLSFTTrainer, FisherStatistics, estimate_fisher
from agl_trl.experiments.demo import LORA
from agl_trl.miniworld import alignment_dataset, load_model
from agl_trl.modeling.generation import answered_by
from agl_trl.modeling.lora import adapted_layers

from .baselines import kl_budget
from .safegrad import Surgery
from .setting import Setting, build, common, published_statistics, reference_answers


def layer_importance(coef: float) -> Callable[[Setting], SFTTrainer]:
    """
    Layers weighted by how much the answers depend on them: the drift of layer ℓ times `tr G_ℓ / d_out`, the mean squared gradient
    at its output (random projections of the logits), relative to the mean over layers.
    """

    def make(setting: Setting) -> SFTTrainer:
        path = published_statistics(setting.folder)
        statistics = FisherStatistics.from_pretrained(path)
        model = get_peft_model(load_model(), LoraConfig(**LORA))
        both = estimate_fisher(model, alignment_dataset(), setting.tokenizer, shrinkage=0.5, progress=False)
        importance = {name: G.trace() / G.dim for name, G in both.outputs.items()}
        mean = torch.stack(list(importance.values())).mean()
        # The trainer checks the norms against the model within 5 %, so that importance goes into X: a scale for every layer.
        for name in list(statistics.input_of):
            X = statistics.inputs[statistics.input_of[name]]
            statistics.inputs[f"{name}#"] = X._replace(
                eigenvalues=X.eigenvalues * importance[name] / mean, remainder=X.remainder * importance[name] / mean
            )
        statistics.input_of = {name: f"{name}#" for name in statistics.input_of}
        norms = statistics.weight_norm
        trainer = build(
            AGLSFTTrainer, AGLSFTConfig(**common(setting, fisher_path=str(path), alignment_coef=coef)), setting
        )
        statistics.weight_norm = norms  # of the unscaled metric: the scale stays in the drift
        trainer.align_guard.statistics = statistics
        return trainer

    return make


class ProximalTrainer(SFTTrainer):
    """
    Decoupled proximal step after Adam, as AdamW does for weight decay, per eigen-direction of X:
    `A ← A (I + η κ X/λ̄)⁻¹` with η the learning rate and λ̄ the mean eigenvalue of X.
    """

    coef = 1.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        layers = adapted_layers(self.model)
        metrics = [self.statistics.metric(layer.name).input for layer in layers]

        def shrink(optimizer, *_):
            rate = self.coef * optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                for layer, X in zip(layers, metrics, strict=True):
                    A, mean = layer.current().A, X.trace() / X.dim
                    rest = 1 / (1 + rate * X.remainder / mean)
                    inside = 1 / (1 + rate * X.eigenvalues / mean)
                    A.copy_(rest * A + ((A @ X.eigenvectors) * (inside - rest)) @ X.eigenvectors.mT)

        optimizer.register_step_post_hook(shrink)
        return optimizer


def proximal(coef: float) -> Callable[[Setting], SFTTrainer]:
    def make(setting: Setting) -> SFTTrainer:
        trainer = build(ProximalTrainer, SFTConfig(**common(setting)), setting)
        trainer.statistics = FisherStatistics.from_pretrained(published_statistics(setting.folder))
        trainer.coef = coef
        return trainer

    return make


@torch.no_grad()
def own_conversations(setting: Setting, count: int = 256) -> Dataset:
    """Prompts sampled from the aligned model itself after a bare user turn, with its own greedy answers: no data at all."""
    model, tokenizer = load_model(), setting.tokenizer
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}], return_dict=True)["input_ids"][:-1]
    torch.manual_seed(setting.seed)
    ids = model.generate(
        torch.tensor([empty] * count), do_sample=True, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(ids[:, len(empty) :], skip_special_tokens=True)
    rows = [{"prompt": [{"role": "user", "content": text.strip()}]} for text in texts if text.strip()]
    return Dataset.from_list(answered_by(model, tokenizer, rows, progress=False))


def pseudo_replay(**options) -> Callable[[Setting], SFTTrainer]:
    """The anchor on the model's own conversations, with statistics from them too."""

    def make(setting: Setting) -> SFTTrainer:
        args = AGLSFTConfig(**common(setting, **options))
        return build(AGLSFTTrainer, args, setting, alignment_dataset=own_conversations(setting))

    return make


def agl_surgery(rows: int = 4) -> Callable[[Setting], SFTTrainer]:
    """
    AGL as it is by default, with SafeGrad's surgery of the task's gradient before its own terms join it; both see this many protected
    rows a step.
    """

    def make(setting: Setting) -> SFTTrainer:
        trainer = kl_budget(anchor_batch_size=rows)(setting)
        references = reference_answers(trainer.model, setting.tokenizer, setting.seed)
        # First of all callbacks: AGL adds its gradient in one of them.
        trainer.callback_handler.callbacks.insert(0, Surgery(references, 0.0, setting.seed, rows))
        return trainer

    return make
