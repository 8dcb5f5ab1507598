"""Names of modules, whatever the engine has put around them."""

from collections.abc import Iterator

from torch import nn


CHECKPOINTED = (
    "_checkpoint_wrapped_module."  # FSDP's activation checkpointing wraps every layer of a model when training begins
)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model by the names that they have before and after training."""
    for name, module in model.named_modules():
        yield name.replace(CHECKPOINTED, ""), module
