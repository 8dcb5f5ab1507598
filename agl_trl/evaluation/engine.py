"""A model behind an OpenAI-compatible server (vLLM, llama.cpp, TGI): a request a prompt, and a sentence for every way to fail."""

import email.utils
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

from ..artifacts.files import first_line
from ..artifacts.http_client import httpx
from ..data.rows import Messages, Row, content_text, row_name, template_options


API_KEY = "AGL_TRL_API_KEY"  # its own name: a key of somebody else is never sent to a server that happens to be named
TIMEOUT = 300.0  # seconds for one answer, with the time that it waits for its turn
LOOK = 30.0  # seconds for the list of models
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 120.0  # waits double; a server that asks for a longer one is not waited for
NAMED = 20  # of a server's models, in a sentence
PASSING = {429, 500, 502, 503, 504}
# Some engines decode by the generation config of the model where a request does not say otherwise, at any temperature.
NEUTRAL: dict[str, dict[str, Any]] = {name: {"repetition_penalty": 1.0} for name in ("sglang", "vllm")}


class EngineError(OSError):
    """A server that does not answer as it should; the message is one sentence without credentials."""


class ServedAnswer(NamedTuple):
    """
    What a server said.

    Args:
        text (`str`):
            Answer, after its reasoning in `<think>` marks where the server tells the two apart.
        at_length (`bool`):
            Whether it ended because it was as long as allowed.
    """

    text: str
    at_length: bool


class ServedModel:
    """
    One model of a server, found at once; safe to ask from several threads.

    Args:
        url (`str`):
            Address such as `http://localhost:8000`; where it has no path, `/v1` is added. The key is that of `AGL_TRL_API_KEY`.
        model_id (`str`, *optional*):
            Name of the model there; by default the only one.
        side (`"base"` or `"tuned"`):
            Which model it is, for sentences.
        timeout (`float`, *optional*, defaults to `300`):
            Seconds for one answer.

    Raises:
        `ValueError`: If the address or the key is none.
        [`EngineError`]: If nobody answers there, or there is no such model.
    """

    def __init__(
        self, url: str, model_id: str | None = None, *, side: Literal["base", "tuned"], timeout: float = TIMEOUT
    ):
        address, login = _address(url, f"--{side}-url")
        self.url, self.key, self.timeout = str(address), _api_key(), timeout
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        self.stopped = threading.Event()
        self.client = httpx.Client(headers=headers, auth=login)
        try:
            listed = self._models()
            self.model_id = _chosen(listed, model_id, self.url, side)
        except BaseException:
            self.client.close()
            raise
        self.neutral = NEUTRAL.get(listed.get(self.model_id, ""), {})

    @property
    def name(self) -> str:
        """Name of the model as a report may tell it: of a path on the server without its folders."""
        path = PureWindowsPath(self.model_id)
        rooted = PurePosixPath(self.model_id).is_absolute() or path.is_absolute()
        return _printable(path.name if rooted else self.model_id)

    def stop(self) -> None:
        """Wait no longer between tries: they end with an error."""
        self.stopped.set()

    def close(self) -> None:
        """Give back the connections."""
        self.client.close()

    def answer(self, prompt: Messages, max_new_tokens: int) -> ServedAnswer:
        """
        Greedy answer to a conversation, through the chat template of the server, or to a plain text as it is.

        Args:
            prompt (`str`, `list[dict]` or `Mapping`):
                Text, a conversation, or a row with the column `prompt`.
            max_new_tokens (`int`):
                Longest answer.

        Raises:
            [`EngineError`]: If the server gives none.
        """
        options = {"model": self.model_id, "temperature": 0, "max_tokens": max_new_tokens, **self.neutral}
        path, body = request_of(prompt)
        answered = self._send("POST", path, json=body | options)
        try:
            return _read_answer(answered["choices"][0])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self._told(path)} answered without a text: is it an OpenAI-compatible server?"
            ) from error

    def _models(self) -> dict[str, str]:
        """Who owns the models that the server has, by their ids."""
        answered = self._send("GET", "models")
        try:
            return {str(model["id"]): str(model.get("owned_by")) for model in answered["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self._told('models')} does not list its models: is it an OpenAI-compatible server?"
            ) from error

    def _told(self, path: str) -> str:
        return f"The server at {self.url}/{path}"

    def _send(self, method: str, path: str, **options: Any) -> Any:
        """What the server answers as JSON. What may pass is tried again, a server that was never there is not."""
        wait, place = FIRST_WAIT, self._told(path)
        seconds = self.timeout if method == "POST" else min(self.timeout, LOOK)
        for left in reversed(range(TRIES)):
            asked_to_wait = None
            try:
                response = self.client.request(
                    method, f"{self.url}/{path}", timeout=httpx.Timeout(seconds, connect=10.0), **options
                )
                if response.status_code not in PASSING:
                    return self._read(response, place)
                reason = f"answered with status {response.status_code}{self._message(response)}"
                asked_to_wait = _retry_after(response.headers.get("Retry-After", ""))
            except httpx.ReadTimeout as error:
                advice = "is it busy?" if method == "GET" else "ask fewer at once, with a smaller `--batch-size`."
                raise EngineError(f"{place} did not answer within {seconds:g} seconds: {advice}") from error
            except httpx.RequestError as error:
                reason = f"can't be reached or dropped the connection ({type(error).__name__})"
                if method == "GET" and isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    raise EngineError(f"{place} can't be reached ({type(error).__name__}): is it running?") from error
            if asked_to_wait is not None and asked_to_wait > LONGEST_WAIT:
                raise EngineError(f"{place} asks to wait {asked_to_wait:.0f} seconds: {reason}.")
            if left == 0 or self.stopped.wait(wait if asked_to_wait is None else asked_to_wait):
                break
            wait *= 2
        raise EngineError(f"{place} {reason}, {TRIES} times." if left == 0 else f"{place} {reason}.")

    def _read(self, response: httpx.Response, place: str) -> Any:
        status = response.status_code
        if status in (401, 403):
            known = "did not accept the key" if self.key else "asks for a key"
            raise EngineError(f"{place} {known} (status {status}): set the environment variable {API_KEY}.")
        if not response.is_success:
            raise EngineError(f"{place} answered with status {status}{self._message(response)}.")
        try:
            return response.json()
        except ValueError as error:
            kind = "a web page" if "html" in response.headers.get("Content-Type", "") else "something else"
            raise EngineError(
                f"{place} answered with {kind} where JSON was due: is it an OpenAI-compatible server?"
            ) from error

    def _message(self, response: httpx.Response) -> str:
        """What the server says of an error, on one short line, and never with the key."""
        try:
            said = response.json()
        except ValueError:
            return ""
        said = said.get("error", said) if isinstance(said, dict) else None
        said = said.get("message") if isinstance(said, dict) else said
        if not isinstance(said, str) or not said.strip():
            return ""
        line = _printable(" ".join(said.split()))
        return f" ({(line if self.key is None else line.replace(self.key, '…'))[:200].rstrip('. ')})"


def request_of(prompt: Messages) -> tuple[str, dict[str, Any]]:
    """
    Where a prompt goes, and what is sent: conversations with their tools and template options, and texts.

    Args:
        prompt (`str`, `list[dict]` or `Mapping`):
            Text, a conversation, or a row with the column `prompt`.

    Raises:
        [`RowError`]: If its options can't be read.
    """
    row = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    if isinstance(row["prompt"], str):
        return "completions", {"prompt": row["prompt"]}
    options = template_options(row, row_name(row) if isinstance(row, Row) else "A prompt")
    tools, body = options.pop("tools"), {"messages": [_message_of(message) for message in row["prompt"]]}
    return "chat/completions", {
        **body,
        **({"tools": tools} if tools else {}),
        **({"chat_template_kwargs": options} if options else {}),
    }


def _message_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the gaps that a dataset fills; its parts of text are one."""
    told = {name: value for name, value in message.items() if value is not None}
    return told | ({"content": content_text(told["content"])} if "content" in told else {})


def _read_answer(choice: Mapping[str, Any]) -> ServedAnswer:
    at_length = choice.get("finish_reason") == "length"
    if "message" not in choice:
        return ServedAnswer(choice["text"].strip(), at_length)
    message = choice["message"]
    text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""
    if not text and message.get("tool_calls"):
        text = "\n".join(json.dumps(call["function"]) for call in message["tool_calls"])
    if thought:  # in the marks that a judge knows; open where it was cut before an answer
        text = f"<think>{thought}" + ("" if at_length and not text else f"</think>{text}")
    return ServedAnswer(text.strip(), at_length)


def _address(url: str, option: str) -> tuple[httpx.URL, tuple[str, str] | None]:
    """The address of a server, and the login that stood in it."""
    try:
        found = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise ValueError(f"`{option}` is no address: {first_line(error)}.") from error
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"`{option}` is no address of a server: write it like 'http://localhost:8000/v1'.")
    if found.query or found.fragment:
        raise ValueError(f"`{option}` has more than an address: leave out what follows '?' or '#'.")
    login = (found.username, found.password) if found.userinfo else None
    return found.copy_with(userinfo=b"", path=found.path.rstrip("/") or "/v1"), login


def _api_key() -> str | None:
    key = os.environ.get(API_KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"The environment variable {API_KEY} holds characters that no key has.")
    return key or None


def _chosen(listed: Mapping[str, str], model_id: str | None, url: str, side: str) -> str:
    """
    The id of the model to ask.

    Raises:
        [`EngineError`]: If it is not there, or there are several to choose from.
    """
    names = ", ".join(f"'{_printable(name)}'" for name in sorted(listed)[:NAMED]) or "none"
    names += f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    if model_id is None:
        if len(listed) != 1:
            raise EngineError(f"The server at {url} has the models {names}: name one as `--{side}-model-id`.")
        (model_id,) = listed
    elif model_id not in listed:
        raise EngineError(f"The server at {url} has no model '{model_id}'; it has {names}.")
    return model_id


def _printable(text: str) -> str:
    """What a server says, without what could move the cursor of a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _retry_after(value: str) -> float | None:
    """Seconds to wait as a header tells them, as a number or as a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
