"""
The `alignment-risk` package, another implementation of AlignGuard-LoRA, on the models of this comparison: its Fisher
and its loss. It is no dependency: `pip install --no-deps alignment-risk`.
"""

import importlib.util
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTTrainer

from agl_trl.data.alignment import batches, select_rows, tokenize_row
from agl_trl.miniworld import load_tokenizer
from agl_trl.modeling.lora import linear_layers

from .shapes import Shape, lora_of, model_of


# Which parameters its Fisher is of: those of the adapter, or the weights that ours is about.
PEERS = {"alignment-risk, adapter": False, "alignment-risk, weights": True}


def installed() -> bool:
    return importlib.util.find_spec("alignment_risk") is not None


def peer_parameters(name: str, model: PeftModel) -> list[str]:
    """Names of the parameters that it takes gradients of, which alone require them afterwards."""
    weights = {id(layer.get_base_layer().weight) for layer in linear_layers(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in weights if PEERS[name] else parameter.requires_grad)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def peer_bytes(name: str, shape: Shape, rows: int) -> int:
    """What it holds at least: a gradient of every row, once in a list and once as a matrix."""
    model = get_peft_model(model_of(shape), LoraConfig(**lora_of(shape)))
    names = set(peer_parameters(name, model))
    return 2 * 4 * rows * sum(parameter.numel() for key, parameter in model.named_parameters() if key in names)


def peer_fisher(model: PeftModel, rows: Dataset, length: int, names: list[str]) -> Any:
    """Its Fisher subspace from the rows, one at a time, as it takes them."""
    from alignment_risk import FisherConfig, FisherSubspaceAnalyzer

    tokenizer = load_tokenizer()
    tokenized = [tokenize_row(row, tokenizer, length) for row in select_rows(rows, None, 0)]
    config = FisherConfig(max_samples=len(rows), max_parameters=10**12, device=str(model.device))
    single = [{"input_ids": b.input_ids} for b in batches(tokenized, 1, tokenizer.pad_token_id, model.device)]
    return FisherSubspaceAnalyzer(config).analyze(
        model, single, lambda m, b: m(**b, labels=b["input_ids"]).loss, names
    )


class PeerTrainer(SFTTrainer):
    """TRL's trainer with its loss, as its own documentation puts them together: on the weights of the adapter."""

    regularizer: Any = None

    def prepare(self, rows: Dataset, length: int) -> None:
        from alignment_risk import AlignGuardLoRARegularizer

        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        subspace = peer_fisher(self.model, rows, length, names)
        self.regularizer = AlignGuardLoRARegularizer(self.model, subspace=subspace, parameter_names=names)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.regularizer.regularized_loss(loss).total_loss
