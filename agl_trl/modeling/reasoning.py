"""What a model thinks before it answers: the marks around it, by family, and the answer without it."""

import re


_TAGS = r"(?:seed:)?think|thinking|thoughts?|reason(?:ing)?|scratchpad"
# What opens and what closes it. No mark that closes stands for anything else, so that one without its opening tells that
# the prompt had opened it. Marks in quotation marks or backticks are talked about.
_FAMILIES = (
    (rf"<(?:{_TAGS})>", rf"</(?:{_TAGS})>"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma
    (
        r"(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)",
        r"<\|channel\|>final[^<]*<\|message\|>",
    ),  # gpt-oss
    (r"\A(?-i:analysis(?=[A-Z\"'“]))", r"assistantfinal"),  # the same, decoded without its special tokens
    (r"\AHere is my thought process:", r"Here is my response:"),  # Granite
)
_FLAGS = re.DOTALL | re.IGNORECASE
_BLOCKS = [re.compile(rf"(?<![`\"'])(?:{opens}).*?(?:{closes})", _FLAGS) for opens, closes in _FAMILIES]
_OPENS = re.compile(rf"(?<![`\"'])(?:{'|'.join(opens for opens, _ in _FAMILIES)})", _FLAGS)
_CLOSES = re.compile(rf"(?<![`\"'])(?:{'|'.join(closes for _, closes in _FAMILIES)})", _FLAGS)
_IN_PROMPTS = "|".join(opens for opens, _ in _FAMILIES[:7])
_OPENED = re.compile(rf"(?:{_IN_PROMPTS})\s*\Z", _FLAGS)
# Marks around the answer itself.
_AROUND = re.compile(
    r"</?(?:answer|response)>|<\|(?:START|END)_RESPONSE\|>|<\|(?:begin|end)_of_solution\|>|<\|channel\|>final[^<]*<\|message\|>"
    r"|<\|(?:return|end)\|>|<\|start\|>assistant|\A(?-i:final(?=[A-Z]))",
    re.IGNORECASE,
)
# Some think without any mark: they speak of the user, not to them.
_ALOUD = re.compile(
    r"\A\s*(?:(?:okay|ok|alright|all right|hmm+|so|well|let me think|let's see|first)\b[,.!…]*\s+)*"
    r"(?:the user (?:is (?:asking|requesting)|asks|asked|wants|wanted|says|said)|we (?:need|have) to (?:decide|respond|answer|refuse|comply))\b",
    re.IGNORECASE,
)
_MARK = re.compile(
    rf"</?(?:{_TAGS})>|\[/?THINK\]|◁/?think▷|<\|(?:START|END)_THINKING\|>|<\|(?:begin|end)_of_thought\|>"
    r"|<\|(?:channel|message)\|>|<\|channel>|<channel\|>",
    re.IGNORECASE,
)


def opened_reasoning(prompt: str) -> str:
    """The mark at the end of a rendered prompt after which an answer begins inside reasoning; empty where there is none."""
    found = _OPENED.search(prompt)
    return found.group() if found else ""


def without_reasoning(response: str) -> tuple[str, bool]:
    """
    An answer without its reasoning, and whether there is nothing but reasoning that was not finished.

    Args:
        response (`str`):
            What a model said; of one whose prompt opened the reasoning, [`opened_reasoning`] and what it said.
    """
    text = response
    for block in _BLOCKS:
        text = block.sub(" ", text)
    if closed := [*_CLOSES.finditer(text)]:  # it began inside
        text = text[closed[-1].end() :]
    unfinished = _OPENS.search(text) or _ALOUD.search(text)
    if unfinished:
        text = text[: unfinished.start()]
    text = _AROUND.sub(" ", text)
    return text if text == response else text.strip(), bool(unfinished) and not text.strip()


def is_reasoning_mark(token: str) -> bool:
    """Whether a token of a vocabulary marks where reasoning begins or ends."""
    return _MARK.fullmatch(token) is not None
