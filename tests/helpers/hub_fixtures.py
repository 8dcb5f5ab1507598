"""Fixtures around the local Hub: `hub` (empty, over HTTP) and `online` (this process's client talks to it)."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, HfFileSystem, constants, file_download, hf_api
from huggingface_hub.utils import _http

from tests.helpers.hub_server import LocalHub


# What the suite or the user's shell may have set, and would lead a client past the local Hub or into the real cache.
CLEARED = {
    *("HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
}


def hub_variables(hub: LocalHub, home: Path, token: str | None = None) -> dict[str, str]:
    """The variables that lead a client to the local Hub, as alice unless `token` says otherwise ("": nobody)."""
    token = hub.token if token is None else token
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the Hub speaks LFS only, and the client does not negotiate
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}),
    }


def hub_environment(hub: LocalHub, home: Path, token: str | None = None) -> dict[str, str]:
    """The whole environment of a subprocess whose client talks to the local Hub; `home` is its fresh `HF_HOME`."""
    kept = {key: value for key, value in os.environ.items() if key not in CLEARED}
    return kept | hub_variables(hub, home, token)


@pytest.fixture(scope="session")
def hub_thread() -> Iterator[LocalHub]:
    hub = LocalHub().start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(hub_thread: LocalHub) -> LocalHub:
    hub_thread.reset()
    return hub_thread


@pytest.fixture
def online(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """
    The client of this process talks to the local Hub as alice, with caches of its own; offline again afterwards.

    The libraries read their variables at import, long before a test: these are the places where they keep them. A
    version that moves one fails in monkeypatch or in `test_hub_server.py`, not silently: the rest stays offline.
    """
    home = tmp_path / "hf_home"
    for name in CLEARED:
        monkeypatch.delenv(name, raising=False)
    for name, value in hub_variables(hub, home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(hub.url)})
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew on first use
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    huggingface_hub.close_session()  # the next one reads NO_PROXY
    HfFileSystem.clear_instance_cache()  # its listings are of an earlier test's Hub
    yield HfApi()
    huggingface_hub.close_session()
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's back-off takes no time; the seconds it would have slept."""
    taken: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", _Clock(taken))
    return taken


class _Clock:
    """Stands for the module `time` in the client's HTTP code alone: `time.sleep` is everyone's, the server's too."""

    def __init__(self, taken: list[float]):
        self.sleep = taken.append

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
