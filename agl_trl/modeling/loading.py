"""Models and adapters by name, with a sentence where they don't load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
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
from .trained_tensors import same_but_for_rounding


BY_TASK = ("POLY", "MULTITASK_PROMPT_TUNING")


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
        [`ArtifactError`]: If it is missing, broken, does not fit the model, or would change it: with the adapter off, the model
            is the base model.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():  # PEFT would unpickle an `adapter_model.bin`
        raise ArtifactError(f"There is no adapter in '{folder}': '{ADAPTER_FILE}' is missing.")
    try:
        _check_numbers(path)
        before = _samples(model)
        with _base_kept(model, path):
            adapted = PeftModel.from_pretrained(model, folder)
        if adapted.active_peft_config.peft_type in BY_TASK:
            raise ArtifactError(
                f"The adapter in '{folder}' is of type {adapted.active_peft_config.peft_type.value}, which needs the number of a task "
                "with every prompt: no prompts have one."
            )
        if any(not torch.equal(_sample(tensor), sample) for tensor, sample in before):
            raise ArtifactError(
                f"The adapter in '{folder}' changes the base model as it loads, as the inits of PiSSA and its kin do: with the adapter "
                "off, this is not the base model. Merge the adapter and name the merged model with `--tuned`."
            )
        return adapted
    except ArtifactError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, LookupError, TypeError) as error:
        reason = f"it has no {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
        raise ArtifactError(f"The adapter in '{folder}' does not load into this base model: {reason}.") from error


def _sample(tensor: Tensor) -> Tensor:
    """A few numbers from all over a tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 64)].clone()


def _samples(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters of a model, each with a sample of its numbers, by which a change is seen."""
    return [(tensor, _sample(tensor)) for tensor in model.parameters() if not tensor.is_meta]


def _check_numbers(path: Path) -> None:
    """Check that an adapter's tensors are all finite numbers; some methods keep indices, as whole numbers."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            whole_numbers = tensor.dtype in (
                torch.uint8,
                torch.int8,
                torch.int16,
                torch.int32,
                torch.int64,
                torch.bool,
            )
            if not whole_numbers and (tensor.dtype not in WIDE_FLOATS or not torch.isfinite(tensor.float()).all()):
                raise ArtifactError(
                    f"The adapter '{path}' is broken: {short_repr(name)} does not hold finite numbers."
                )


@contextmanager
def _base_kept(model: PreTrainedModel, path: Path) -> Iterator[None]:
    """
    While an adapter loads: no tensor of the base model is written over, none of the file is left out, and none of the adapter
    stays as it was drawn. Hooks of torch see what PEFT makes of the names in the file, before anything is written.

    Raises:
        [`ArtifactError`]: Naming the first tensor that is otherwise.
    """
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with safe_open(
        path, framework="pt"
    ) as file:  # what all layers share, such as a vector bank, PEFT keeps beside the model
        shared = tuple(n.removeprefix("base_model") for n in file.keys() if not n.startswith("base_model.model."))  # noqa: SIM118

    def before(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
        current = {
            prefix + n: t for n, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
        }
        for name in sorted({*tensors} & {*current}):
            there, here = tensors[name], current[name]
            if here.is_floating_point() and not there.is_floating_point():
                raise ArtifactError(
                    f"The adapter '{path}' is broken: '{name}' holds whole numbers, where weights were expected."
                )
            if there.shape != here.shape and here.is_floating_point():  # not codes of a quantised one
                raise ArtifactError(
                    f"The adapter '{path}' does not load into this base model: '{name}' has shape {[*there.shape]} there and "
                    f"{[*here.shape]} here (another base model, a resized vocabulary, or another rank in its config)."
                )
            if id(here) in base and not same_but_for_rounding(there, here):
                raise ArtifactError(
                    f"The adapter '{path}' also holds a tensor of the base model, '{name}', with other values: loaded, it would "
                    "change the base model that the adapter is compared with. Merge the adapter and name the merged model with "
                    "`--tuned`."
                )
            if id(here) in base:
                del tensors[
                    name
                ]  # the very tensor that is there: PEFT adds the embeddings where an adapter touches them

    def after(module: nn.Module, result: Any) -> None:
        names = {name for name, parameter in module.named_parameters() if id(parameter) not in base}
        own = {f"base_model.model.{name}" for name in names if ".ranknum." not in name}  # of AdaLoRA, which saves none
        missing = {name for name in own & {*result.missing_keys} if not name.replace(".default", "").endswith(shared)}
        if missing:
            raise ArtifactError(f"The adapter '{path}' does not fit this base model: it has no '{min(missing)}'.")
        # Beside a tensor that it has loaded, PEFT may find a second copy under the name without the adapter's.
        copies = {name.replace(".default", "") for name, _ in module.named_parameters(remove_duplicate=False)}
        # What prompt tuning has learned is no part of the base model, and PEFT loads it on its own.
        known = {
            "prompt_embeddings",
            "prefix_task_cols",
            "prefix_task_rows",
            *(f"base_model.model.{name}" for name in copies),
        }
        if unknown := {*result.unexpected_keys} - known:
            raise ArtifactError(
                f"The adapter '{path}' does not fit this base model, which has no place for "
                f"{short_repr(min(unknown).removeprefix('base_model.model.'))}: it is of a model with more layers, or of another "
                "architecture."
            )

    handles = [model.register_load_state_dict_pre_hook(before), model.register_load_state_dict_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
