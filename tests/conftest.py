"""Environment and fixtures shared by all tests. No network: what is not made here is shipped in the package."""

import os
from pathlib import Path


os.environ["CI"] = "1"  # no telemetry
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost models as small as these more than they bring
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast

from .hub_fixtures import hub, hub_thread, naps, online  # noqa: F401 - fixtures of every test
from .models import byte_tokenizer, chat_rows


disable_progress_bars()


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
    """A demo of few steps: enough to move the model, not to judge by."""
    from agl_trl.demo import run_demo

    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, seeds=1, steps=25)
    return folder
