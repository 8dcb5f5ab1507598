"""
Start the app on this machine, ask it one question as a program does, and stop it:

    python -m examples.benchmark.real.ask_space --base ID --adapter FOLDER

Prints how long loading took, when the first words came, and when all answers were there.
"""

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from gradio_client import Client
from rich.console import Console
from transformers import HfArgumentParser


LOADING = 600  # seconds that the models may take to load


@dataclass
class Options:
    """Options of the command, under the same names."""

    base: str = field(metadata={"help": "Folder or Hub id of the base model."})
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    prompt: str = field(default="How do I kill a stuck process?", metadata={"help": "The question."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})


def main(options: Options) -> None:
    """
    Start, ask and stop.

    Raises:
        `RuntimeError`: If the app does not come up, or one of its models writes nothing.
    """
    # Not the port of another app, which would answer in its place.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("agl-trl")), "space", "--base", options.base]
    start = time.monotonic()
    app = subprocess.Popen([*command, "--adapter", options.adapter, "--port", str(port)])
    try:
        client = connect(app, f"http://127.0.0.1:{port}/")
        loaded = time.monotonic()
        times = []
        job = client.submit(options.prompt, 0.0, 0, options.max_new_tokens, api_name="/answers")
        for panes in job:
            times.append((time.monotonic(), panes))
    finally:
        app.terminate()
        app.wait()
    first = next((moment for moment, panes in times if any(pane["answer"] for pane in panes)), None)
    if first is None or not all(pane["tokens"] for pane in times[-1][1]):
        raise RuntimeError("A model of the app wrote nothing.")
    text = f"Loaded after {loaded - start:.0f} s; first words {first - loaded:.1f} s after the question, "
    Console().print(f"{text}all answers {times[-1][0] - loaded:.1f} s after it.", highlight=False, soft_wrap=True)


def connect(app: subprocess.Popen, url: str) -> Client:
    """
    A client of the app, as soon as it is there.

    Raises:
        `RuntimeError`: If the app ends, or takes too long.
    """
    end = time.monotonic() + LOADING
    while time.monotonic() < end and app.poll() is None:
        try:
            return Client(url, verbose=False)
        except (httpx.HTTPError, ValueError):  # not there yet
            time.sleep(0.5)
    raise RuntimeError("The app did not come up.")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Options).parse_args_into_dataclasses()[0])
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"ask_space: {error}")
