"""Models and adapters by name, with a sentence where they don't load."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import miniworld
from ..artifacts.files import ADAPTER_FILE, ArtifactError, first_line
from ..artifacts.schema import WIDE_FLOATS, short_repr


def load_model(
    name: str, *, dtype: str | None = None, device_map: str | None = None, bits: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Model and tokenizer of a folder or Hub id, or `"miniworld"`: the embedded aligned ones. Nothing that a repo brings is
    unpickled or executed.

    Args:
        name (`str`):
            Folder or Hub id.
        dtype (`str`, *optional*):
            Type of the weights, such as `"bfloat16"`; by default the checkpoint's.
        device_map (`str`, *optional*):
            As in transformers, such as `"auto"`, for a model that does not fit one device.
        bits (`int`, *optional*):
            4 or 8: quantise with bitsandbytes.

    Raises:
        `ValueError`: If they don't load.
    """
    if dtype is not None and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"There is no type '{dtype}': name one such as 'bfloat16', 'float16' or 'float32'.")
    if name == miniworld.MINIWORLD:
        if (dtype, device_map, bits) != (None, None, None):
            raise ValueError("The embedded model is loaded as it is: type, device map and bits are of other models.")
        return miniworld.load_model(), miniworld.load_tokenizer()
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
    if bits is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
        )
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        if bits is None and device_map is None:
            model = model.to(PartialState().device)
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # Torch tells by an AssertionError that it was built without the device.
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        raise ValueError(f"Can't load the model '{name}': {first_line(error)}.") from error


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """
    A model with the adapter of a local folder, from safetensors alone.

    Raises:
        [`ArtifactError`]: If it is missing, broken, or does not fit the model.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():  # PEFT would unpickle an `adapter_model.bin`
        raise ArtifactError(f"There is no adapter in '{folder}': '{ADAPTER_FILE}' is missing.")
    try:
        names = _checked_names(path)
        adapted = PeftModel.from_pretrained(model, folder)
    except ArtifactError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, LookupError, TypeError) as error:
        raise ArtifactError(
            f"The adapter in '{folder}' does not load into this base model: {first_line(error)}."
        ) from error
    # PEFT only warns where it finds nothing for a layer, and leaves that layer's adapter as it was drawn.
    if missing := {*get_peft_model_state_dict(adapted, save_embedding_layers=False)} - names:
        raise ArtifactError(f"The adapter '{path}' does not fit this base model: it has no '{min(missing)}'.")
    return adapted


def _checked_names(path: Path) -> set[str]:
    """Names of an adapter's tensors, which are all finite numbers."""
    with safe_open(path, framework="pt") as file:
        names = {*file.keys()}
        for name in sorted(names):
            tensor = file.get_tensor(name)
            if tensor.dtype not in WIDE_FLOATS or not torch.isfinite(tensor.float()).all():
                raise ArtifactError(
                    f"The adapter '{path}' is broken: {short_repr(name)} does not hold finite numbers."
                )
    return names
