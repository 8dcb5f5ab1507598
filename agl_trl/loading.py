"""Models and adapters by name, with a sentence where they don't load."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


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
    if name == "miniworld":
        from . import miniworld

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
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"Can't load the model '{name}': {str(error).strip().splitlines()[0].rstrip('.')}."
        ) from error


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """
    A model with the adapter of a local folder.

    Raises:
        `ValueError`: If it does not fit the model.
    """
    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".:")
        raise ValueError(f"The adapter in '{folder}' does not load into this base model: {reason}.") from error
