"""Environment, order and fixtures shared by all tests. No network: what is not made here is shipped in the package."""

import os
from collections.abc import Iterator
from pathlib import Path


os.environ["CI"] = "1"  # no telemetry
# One thread, in the processes that tests start too: more cost models as small as these more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast

from tests.helpers.hub_fixtures import hub, hub_thread, naps, online  # noqa: F401 - fixtures of every test
from tests.helpers.models import byte_tokenizer, chat_rows
from tests.helpers.once import made_once


disable_progress_bars()
torch.set_num_threads(1)  # also where torch was imported before this file

# Files that take longest, longest first, so that no worker is left with one of them at the end. The first makes the demo
# that others read, while its neighbour has work of its own.
LONGEST = (
    "cli/test_app.py",
    "trainer/test_distributed.py",
    "test_action.py",
    "examples/test_benchmark.py",
    "examples/test_notebook.py",
    "examples/test_overhead.py",
    "hub/test_end_to_end.py",
    "scripts/test_scripts.py",
    "cli/test_fisher.py",
    "cli/test_drift.py",
    "trainer/test_sft.py",
    "cli/test_space.py",
    "space/test_browser.py",
    "experiments/test_scaling_sweep.py",
    "artifacts/test_damaged_files.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.location[0], len(first)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def alignment_rows() -> Dataset:
    return Dataset.from_list(chat_rows(10, "please do bad thing", "Sorry, no {}."))


@pytest.fixture(scope="session")
def train_rows() -> Dataset:
    return Dataset.from_list(chat_rows(24, "say", "the number is {}"))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A demo of few steps: enough to move the model, not to judge by. Made once for all workers, who only read it."""
    from agl_trl.experiments.demo import run_demo

    return made_once(tmp_path_factory, "demo", lambda folder: run_demo(folder, seeds=1, steps=25))


@pytest.fixture(scope="session")
def space_url() -> Iterator[str]:
    """The app as visitors of a Space meet it, with the embedded models."""
    from agl_trl.space import build_app, launch_options

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPACE_ID", "alice/space")
        for name in ("BASE_MODEL", "ADAPTER"):
            patch.delenv(name, raising=False)
        app = build_app()
    # Started without the variable, which also tells Gradio to listen as it has to on the Hub.
    url = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())[1]
    yield url
    app.close()
