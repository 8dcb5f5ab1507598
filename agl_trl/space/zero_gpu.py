"""ZeroGPU lends a GPU to a function while it runs; everywhere else functions stay as they are."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any


def on_gpu(function: Callable[..., Any], seconds: int = 60) -> Callable[..., Any]:
    """A function that asks ZeroGPU for a GPU, where this is a Space that has them."""
    try:
        # The installed distribution, not `import spaces`: from our repo's root that finds our folder of this name.
        distribution("spaces")
    except PackageNotFoundError:
        return function
    return import_module("spaces").GPU(duration=seconds)(function)
