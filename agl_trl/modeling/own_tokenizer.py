"""The tokenizer that a tuned model brings: whether it writes prompts otherwise than that of its base model."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..artifacts.files import CHAT_TEMPLATE, TOKENIZER_FILES, ArtifactError, first_line
from ..artifacts.schema import short_repr
from ..data.rows import Messages, RowError, prompt_ids


GREETING: Messages = [{"role": "user", "content": "Hello"}]


def own_tokenizer(folder: Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer that lies beside an adapter; where that is a chat template alone, the base model's with this template.

    Args:
        folder (`Path`):
            Folder of the adapter.
        base (`PreTrainedTokenizerBase`):
            Tokenizer of its base model.

    Returns:
        `PreTrainedTokenizerBase`, *optional*: None where the adapter brings nothing of its kind.

    Raises:
        [`ArtifactError`]: If it can't be read.
    """
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not there:
        return None
    try:
        if there != [CHAT_TEMPLATE]:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        own = deepcopy(base)
        own.chat_template = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except Exception as error:  # tokenizers and its many formats raise what they like
        raise ArtifactError(f"The tokenizer beside the adapter can't be read: {first_line(error)}.") from error
    return own


def difference(own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> str | None:
    """
    How a tuned model's own tokenizer and chat template differ from the base model's on what is asked, as a part of a sentence.

    Args:
        own (`PreTrainedTokenizerBase`):
            Tokenizer of the tuned model; without a chat template it has that of the base model.
        base (`PreTrainedTokenizerBase`):
            Tokenizer of the base model.
        prompts (`Sequence`):
            What is asked.

    Returns:
        `str`, *optional*: None where every prompt has the same tokens, and answers end alike.
    """
    if own.chat_template is None:
        own = deepcopy(own)
        own.chat_template = base.chat_template
    parts = []
    if others := sum(_ids(own, prompt) != _ids(base, prompt) for prompt in prompts):
        parts.append(f"writes {others} of {len(prompts)} prompts otherwise")
        shown = [tokenizer.decode(_ids(tokenizer, GREETING) or []) for tokenizer in (own, base)]
        if shown[0] != shown[1]:
            parts[0] += f" (such as 'Hello' as {short_repr(shown[0])}, not {short_repr(shown[1])})"
    if own.eos_token != base.eos_token:
        parts.append(f"ends with {short_repr(own.eos_token)}, not {short_repr(base.eos_token)}")
    return " and ".join(parts) or None


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int] | None:
    """Tokens of a prompt; none where its template refuses it."""
    try:
        return prompt_ids(tokenizer, prompt)
    except RowError:
        return None
