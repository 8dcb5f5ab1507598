"""The models behind the app: one `PeftModel` per base, its adapters switched under a lock."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..artifacts.files import ADAPTER_FILE, FOLDER, TOKENIZER_FILES, ArtifactError
from ..artifacts.location import adapter_folder, from_hub, hub_id
from ..data.rows import prompt_ids, prompt_text
from ..evaluation.refusal import Verdict, judge_answer
from ..modeling.forward import context_length, input_device, last_logits
from ..modeling.generation import answer_decoder, end_tokens, generate_answers, opened_by_template
from ..modeling.loading import load_adapter, load_model
from ..modeling.own_tokenizer import GREETING, difference, own_tokenizer
from .questions import Decoding


ADAPTERS = Path(__file__).parent / "adapters"
EMBEDDED = "miniworld"
LARGEST_BASE, LARGEST_ADAPTER = 8e9, 2e9  # bytes, of a model that a visitor of a Space names
_BASE_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]  # no pickles and no code
_ADAPTER_FILES = ["adapter_config.json", ADAPTER_FILE, f"{FOLDER}/*.safetensors", *TOKENIZER_FILES]


@dataclass(frozen=True)
class Side:
    """
    One of the models that are compared.

    Args:
        key (`str`): `"base"`, `"plain"` or `"agl"`; it picks the colour.
        title (`str`): What it is.
        detail (`str`): Which one it is.
        folder (`Path`, *optional*): Folder of its adapter; the base has none.
    """

    key: str
    title: str
    detail: str
    folder: Path | None = None


class Model:
    """
    A base model and the adapters on it.

    Nothing that a visitor does outlives one forward pass: the lock is taken for a token or a batch, the side is set
    inside it, and random numbers come from a generator of the request. So answers never mix, whoever asks or leaves.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, sides: list[Side], embedded: bool):
        self.tokenizer, self.sides, self.embedded = tokenizer, sides, embedded
        self._model, self._lock = model.eval(), threading.Lock()
        self._current: Side | None = None
        self._adapters_off = ExitStack()  # holds PEFT's context while the base is the current side
        # `load_adapter` calls its adapter "default"; further ones have the names of their sides.
        self._names = {side.key: side.key if side.key in model.peft_config else "default" for side in sides[1:]}
        config = model.active_peft_config
        # PEFT puts a learned prompt before every input: no cache, all tokens anew.
        self._learned_prompt = config.is_prompt_learning
        self.context = context_length(model)
        if self.context is not None and self._learned_prompt:
            self.context -= config.num_virtual_tokens
        self._last_logits = last_logits(model)
        self._ends, self._decode = end_tokens(tokenizer, model), answer_decoder(tokenizer)

    def stream(self, side: Side, prompt: str, decoding: Decoding) -> Iterator[tuple[str, int]]:
        """
        The answer as it grows, and its tokens so far.

        Args:
            side ([`Side`]): Who answers.
            prompt (`str`): The question.
            decoding ([`Decoding`]): How.

        Raises:
            `ValueError`: If the prompt leaves no room for an answer.
        """
        ids = prompt_ids(self.tokenizer, self._asked([{"role": "user", "content": prompt}]))
        room = decoding.length if self.context is None else min(decoding.length, self.context - len(ids))
        if room < 1:
            raise ValueError(f"The prompt has {len(ids)} tokens and this model reads {self.context}: shorten it.")
        device = input_device(self._model)
        generator = torch.Generator(device).manual_seed(decoding.seed)
        inputs, cache, written = torch.tensor([ids], device=device), None, list[int]()
        while len(written) < room:
            with self._as(side):
                output = self._model(
                    input_ids=inputs, past_key_values=cache, use_cache=not self._learned_prompt, **self._last_logits
                )
            token = _choose(output.logits[0, -1].float(), decoding.temperature, generator)
            if token in self._ends:
                break
            written.append(token)
            following = torch.tensor([[token]], device=device)
            inputs = torch.cat([inputs, following], 1) if self._learned_prompt else following
            cache = None if self._learned_prompt else output.past_key_values
            # A character of several tokens is not shown before it is whole.
            yield self._decode([written])[0].rstrip("\ufffd").lstrip(), len(written)

    def answer_all(self, side: Side, prompts: list[list[dict[str, str]]], length: int) -> list[str]:
        """
        Greedy answers to a batch.

        Args:
            side ([`Side`]): Who answers.
            prompts (`list[list[dict[str, str]]]`): Conversations.
            length (`int`): Longest answer in tokens.
        """
        asked = [self._asked(prompt) for prompt in prompts]
        with self._as(side):
            return generate_answers(
                self._model, self.tokenizer, asked, max_new_tokens=length, batch_size=len(asked), progress=False
            )

    def verdict(self, prompt: list[dict[str, str]], answer: str) -> Verdict:
        """
        What the judge says of an answer, read as `agl-trl drift` reads it: one whose reasoning the chat template has opened begins
        inside it.

        Args:
            prompt (`list[dict[str, str]]`): Conversation.
            answer (`str`): What a side has said.
        """
        return judge_answer(prompt_text(prompt), opened_by_template(self.tokenizer, self._asked(prompt)) + answer)

    def warm_up(self) -> None:
        """One token of every side, so that no visitor pays for first uses."""
        for side in self.sides:
            for _ in self.stream(side, "Hello", Decoding(length=1)):
                pass

    def _asked(self, conversation: list[dict[str, str]]) -> Any:
        """A conversation, or the words of its last turn where there is no chat template to write it with."""
        return conversation[-1]["content"] if self.tokenizer.chat_template is None else conversation

    @contextmanager
    def _as(self, side: Side) -> Iterator[None]:
        """The model as this side, for nobody else meanwhile. PEFT walks all layers to switch: only where it has to."""
        with self._lock, torch.inference_mode():
            if side != self._current:
                self._adapters_off.close()
                if side.folder is None:
                    self._adapters_off.enter_context(self._model.disable_adapter())
                else:
                    self._model.set_adapter(self._names[side.key], inference_mode=True)
                self._current = side
            yield


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


class Models:
    """
    What the app has loaded, by base and adapter.

    Args:
        base, adapter (`str`, *optional*):
            The app's own, whose owner is trusted; by default the embedded model with the demo's two adapters.
        hosted (`bool`):
            Whether strangers may name models: no folders of this machine, no token of its owner, no giants.
    """

    def __init__(self, base: str | None = None, adapter: str | None = None, hosted: bool = False):
        if base and not adapter:
            raise ValueError(f"Name an adapter too: '{base}' alone is nothing to compare.")
        self.hosted = hosted
        self.own = _embedded() if not adapter else _load(base or "", adapter, _Access())
        self._visited: dict[tuple[str, str], Model] = {}  # the last that a visitor named stays loaded
        self._loading = threading.Lock()

    def get(self, base: str = "", adapter: str = "") -> Model:
        """
        The model of a request; the app's own where nothing is named.

        Args:
            base, adapter (`str`): Names, as they were sent; of the base by default what the adapter names.

        Raises:
            `ValueError`: One sentence where it can't be had; the models that are loaded stay as they are.
        """
        key = (base or "").strip(), (adapter or "").strip()
        if not key[1]:
            if key[0]:
                raise ValueError("Name an adapter too: a base model alone is nothing to compare.")
            return self.own
        for what, name in zip(("base model", "adapter"), key, strict=True):
            _check_name(name, what, self.hosted)
        found = self._visited.get(key)
        if found is not None:
            return found
        with self._loading:
            if key not in self._visited:
                self._visited = {key: _load(*key, _Access.of_visitor() if self.hosted else _Access())}
            return self._visited[key]


@dataclass(frozen=True)
class _Access:
    """How repos are read: with the token of this machine or with none, and how large they may be."""

    token: bool | None = None
    largest_base: float = float("inf")
    largest_adapter: float = float("inf")

    @classmethod
    def of_visitor(cls) -> "_Access":
        return cls(False, LARGEST_BASE, LARGEST_ADAPTER)

    def folder(self, name: str, files: list[str], largest: float) -> Path:
        if Path(name).is_dir():
            return Path(name)
        if largest < float("inf"):
            info = from_hub(HfApi().model_info, name, files_metadata=True, token=self.token)
            size = sum(file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors"))
            if size > largest:
                raise ValueError(
                    f"'{name}' has {size / 1e9:.0f} GB, more than this Space loads ({largest / 1e9:.0f} GB)."
                )
        return Path(from_hub(snapshot_download, name, allow_patterns=files, token=self.token))


def _check_name(name: str, what: str, hosted: bool) -> None:
    is_repo = hub_id(name, with_owner=True) is not None
    local = os.path.isdir(name) if "\0" not in name else False
    if name in ("", EMBEDDED) or (not hosted and local) or (is_repo and not (hosted and local)):
        return
    shown = "".join(c if c.isprintable() else "?" for c in name[:60]) + ("…" if len(name) > 60 else "")
    raise ValueError(f"'{shown}' does not name a repo on the Hub; the {what} is written as user/name.")


def _embedded() -> Model:
    model, tokenizer = load_model(EMBEDDED)
    adapted = load_adapter(model, ADAPTERS / "plain")
    adapted.load_adapter(ADAPTERS / "agl", adapter_name="agl")
    sides = [
        Side("base", "Base model", "aligned, no adapter"),
        Side("plain", "Plain LoRA", "fine-tuned without protection", ADAPTERS / "plain"),
        Side("agl", "LoRA with AGL", "the same fine-tuning, protected", ADAPTERS / "agl"),
    ]
    return Model(adapted, tokenizer, sides, embedded=True)


def _load(base: str, adapter: str, access: _Access) -> Model:
    folder = access.folder(adapter, _ADAPTER_FILES, access.largest_adapter)
    paths = {str(folder): adapter}
    try:
        adapter_folder(folder)
        base = base or _base_of(folder, adapter)
        _check_name(base, "base model", hosted=access.token is False)
        source = base if base == EMBEDDED else str(access.folder(base, _BASE_FILES, access.largest_base))
        paths[source] = base
        model, tokenizer = load_model(source)
        adapted, own = load_adapter(model, folder), own_tokenizer(folder, tokenizer)
    except ValueError as error:
        text = str(error)
        for path, name in paths.items():  # visitors named repos, and need no path of this machine
            text = text.replace(path, name)
        raise ValueError(text) from error
    asked = ", asked with the base model's tokenizer" if own and difference(own, tokenizer, [GREETING]) else ""
    sides = [Side("base", "Base model", base), Side("agl", "Fine-tuned", adapter + asked, folder)]
    return Model(adapted, tokenizer, sides, embedded=base == EMBEDDED)


def _base_of(folder: Path, adapter: str) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ArtifactError(f"The adapter '{adapter}' does not say which base model it is for: name it.") from error
    if not isinstance(base, str) or not (base == EMBEDDED or hub_id(base, with_owner=True) or Path(base).is_dir()):
        raise ArtifactError(f"The adapter '{adapter}' names no base model on the Hub: name it beside the adapter.")
    return base
