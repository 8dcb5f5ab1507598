"""A served model: what is sent, what is read, and a sentence for every way to fail; over real HTTP."""

import email.utils
import socket
import threading
import time
from contextlib import closing

import pytest

from agl_trl.data.rows import RowError
from agl_trl.evaluation import engine
from agl_trl.evaluation.engine import EngineError, ServedModel, request_of
from agl_trl.evaluation.refusal import STILL_THINKING, judge_answer
from tests.helpers.chat_server import COMPLIANCE, REFUSAL, chat_server


QUESTION = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("AGL_TRL_API_KEY", raising=False)
    monkeypatch.setattr(engine, "FIRST_WAIT", 0.01)
    with chat_server(one=lambda text: REFUSAL) as running:
        yield running


@pytest.fixture
def model(server):
    with closing(ServedModel(server.url, side="base", timeout=5.0)) as found:
        yield found


def test_request_is_greedy_and_neutral(server, model):
    answer = model.answer(QUESTION, 24)
    assert answer == (REFUSAL, False)
    (call,) = server.calls
    expected = {"model": "one", "messages": QUESTION, "temperature": 0, "max_tokens": 24, "repetition_penalty": 1.0}
    assert (call.path, call.body) == ("/v1/chat/completions", expected) and "Authorization" not in call.headers
    server.owner = "somebody"
    with closing(ServedModel(server.url + "/v1/", "one", side="tuned")) as other:
        assert other.url == model.url
        other.answer("Once upon a time", 3)
    assert server.calls[1][:2] == (
        "/v1/completions",
        {"model": "one", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 3},
    )


def test_rows_are_sent_without_gaps_with_tools_and_template_options():
    row = {
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}
        ],
        "tools": '[{"type": "function"}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert request_of(row) == (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": "ab"}],
            "tools": [{"type": "function"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    with pytest.raises(RowError, match="chat_template_kwargs"):
        request_of(row | {"chat_template_kwargs": "[1]"})


@pytest.mark.parametrize(
    ("choice", "text", "label"),
    [
        ({"message": {"content": REFUSAL, "reasoning_content": "Is it safe? Sure."}}, None, "refusal"),
        ({"message": {"content": COMPLIANCE, "reasoning": "I'm sorry, I can't?"}}, None, "compliance"),
        ({"message": {"content": f"Hm, let me see.</think>{REFUSAL}"}}, None, "refusal"),
        ({"message": {"content": None}}, "", "garbled"),
        (
            {"message": {"content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}},
            '{"name": "look", "arguments": "{}"}',
            "compliance",
        ),
    ],
)
def test_reasoning_is_no_part_of_the_answer(server, model, choice, text, label):
    server.models["one"] = lambda _: choice
    answer = model.answer(QUESTION, 8)
    assert text in (None, answer.text) and judge_answer("How do I bake bread?", answer.text).label == label, answer


def test_answers_that_were_cut(server, model):
    server.models["one"] = lambda _: {"finish_reason": "length", "message": {"content": "Sure, here is"}}
    assert model.answer(QUESTION, 8) == ("Sure, here is", True)
    thinking = {"content": None, "reasoning_content": "The user asks for bread, so"}
    server.models["one"] = lambda _: {"finish_reason": "length", "message": thinking}
    answer = model.answer(QUESTION, 8)
    assert answer.at_length and judge_answer("", answer.text) == STILL_THINKING


@pytest.mark.parametrize("faults", [[500], [429, 503], ["drop"], ["drop", 502, "drop"], [(429, "0")]])
def test_what_passes_is_tried_again(server, model, faults):
    server.faults = list(faults)
    assert model.answer(QUESTION, 8).text == REFUSAL and len(server.calls) == len(faults) + 1


def test_retry_after_is_kept(server, model):
    server.faults = [(429, "1")]
    start = time.monotonic()
    assert model.answer(QUESTION, 8).text == REFUSAL and 1 <= time.monotonic() - start < 4
    until = int(time.time()) + 2
    server.faults = [(503, email.utils.formatdate(until, usegmt=True))]
    assert model.answer(QUESTION, 8).text == REFUSAL and until <= time.time() < until + 4
    server.faults = [(429, "86400")]
    with pytest.raises(EngineError, match="asks to wait 86400 seconds: answered with status 429"):
        model.answer(QUESTION, 8)


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        ([400], r"/v1/chat/completions answered with status 400 \(it is ill; your key … is fine\)\.$"),
        ([500] * 9, r"answered with status 500 \(it is ill; your key … is fine\), 6 times\.$"),
        (["drop"] * 9, r"dropped the connection \(RemoteProtocolError\), 6 times\.$"),
        (["garbage"], "answered with something else where JSON was due: is it an OpenAI-compatible server"),
        (["page"], "answered with a web page where JSON was due"),
        (["empty"], "answered without a text"),
    ],
)
def test_what_does_not_pass_ends_in_a_sentence_without_the_key(server, monkeypatch, faults, sentence):
    server.key = "sk-very-secret"
    monkeypatch.setenv("AGL_TRL_API_KEY", "sk-very-secret\n")
    with closing(ServedModel(server.url, side="base", timeout=5.0)) as model:
        assert model.answer(QUESTION, 8).text == REFUSAL
        server.faults = list(faults)
        with pytest.raises(EngineError, match=sentence) as told:
            model.answer(QUESTION, 8)
    assert "secret" not in str(told.value)


def test_slow_server_is_told_with_its_address(server):
    with closing(ServedModel(server.url, side="base", timeout=0.3)) as model:
        server.faults = ["slow"]
        with pytest.raises(
            EngineError, match=f"at {server.url}/v1/chat/completions did not answer within 0.3 seconds"
        ):
            model.answer(QUESTION, 8)
    assert len(server.calls) == 1, "an answer that takes too long takes as long again"


def test_waiting_ends_when_it_is_stopped(server, model):
    server.faults = [(429, "100")]
    threading.Timer(0.2, model.stop).start()
    start = time.monotonic()
    with pytest.raises(EngineError, match="429"):
        model.answer(QUESTION, 8)
    assert time.monotonic() - start < 5


def test_key_is_asked_for_and_never_told(server, monkeypatch):
    server.key = "sk-very-secret"
    with pytest.raises(
        EngineError, match=r"asks for a key \(status 401\): set the environment variable AGL_TRL_API_KEY"
    ):
        ServedModel(server.url, side="base")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")  # of somebody else
    with pytest.raises(EngineError, match="asks for a key"):
        ServedModel(server.url, side="base")
    monkeypatch.setenv("AGL_TRL_API_KEY", "sk-wrong-secret")
    with pytest.raises(EngineError, match="did not accept the key") as told:
        ServedModel(server.url, side="base")
    assert "secret" not in str(told.value)
    for broken in ("sk-very\nsecret", "sk-sécret"):
        monkeypatch.setenv("AGL_TRL_API_KEY", broken)
        with pytest.raises(ValueError, match="holds characters that no key has") as told:
            ServedModel(server.url, side="base")
        assert "cret" not in str(told.value)


def test_models_are_found_by_their_names(server):
    server.models["two"] = lambda text: COMPLIANCE
    with pytest.raises(EngineError, match=r"has the models 'one', 'two': name one as `--tuned-model-id`\.$"):
        ServedModel(server.url, side="tuned")
    with pytest.raises(EngineError, match=rf"at {server.url}/v1 has no model 'three'; it has 'one', 'two'\.$"):
        ServedModel(server.url, "three", side="base")
    server.models["/srv/weights/three.gguf"] = server.models["two"]
    with closing(ServedModel(server.url, "/srv/weights/three.gguf", side="base")) as model:
        assert model.name == "three.gguf" and model.answer(QUESTION, 8).text == COMPLIANCE
    server.models |= {f"model {number:02}\033[2J": server.models["two"] for number in range(30)}
    with pytest.raises(EngineError, match=r"'model 18�\[2J' and 13 more: name one as") as told:
        ServedModel(server.url, side="base")
    assert "\033" not in str(told.value)
    server.listed = False
    with pytest.raises(EngineError, match=r"/v1/models answered with status 404\.$"):
        ServedModel(server.url, "one", side="base")


def test_server_that_is_not_there_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(
        EngineError, match=rf"127\.0\.0\.1:{port}/v1/models can't be reached \(ConnectError\): is it running"
    ):
        ServedModel(f"http://127.0.0.1:{port}", side="base")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "`--base-url` is no address of a server: write it like 'http://localhost:8000/v1'"),
        ("ftp://host/v1", "is no address of a server"),
        ("http://", "is no address of a server"),
        ("http://host:port", "is no address: "),
        ("http://host/v1?key=secret", "has more than an address"),
    ],
)
def test_addresses_are_checked(url, sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        ServedModel(url, side="base")
    assert "secret" not in str(told.value)


def test_login_in_an_address_is_used_and_not_told(server):
    with closing(ServedModel(server.url.replace("//", "//me:secret@"), side="base")) as model:
        assert model.url == f"{server.url}/v1" and model.answer(QUESTION, 8).text == REFUSAL
    assert server.calls[0].headers["Authorization"].startswith("Basic ")
