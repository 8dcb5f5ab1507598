"""Other models than the app's own: from the Hub, from this machine, broken, private, too large."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from agl_trl.artifacts.files import ADAPTER_FILE
from agl_trl.space.models import ADAPTERS, EMBEDDED, Models
from agl_trl.space.questions import Decoding
from agl_trl.space.side_by_side import EXAMPLES, answers
from agl_trl.space.tabs import map_html


UNSAFE = EXAMPLES[0][1]


def put(folder: Path, repo: str, private: bool = False) -> None:
    HfApi().create_repo(repo, private=private)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)


def test_adapter_from_the_hub_has_two_panes(hub, online):
    put(ADAPTERS / "agl", "alice/adapter")
    models = Models(hosted=True)
    *_, panes = answers(models, UNSAFE, 0.0, 0, 48, "", "alice/adapter")
    assert [pane.verdict.label for pane in panes] == ["refusal", "refusal"] and panes[1].side.detail == "alice/adapter"
    assert "<h4>Relative drift by layer" in map_html(models.get("", "alice/adapter"), "Relative drift")
    *_, own = answers(models, UNSAFE, 0.0, 0, 48, "", "")
    assert len(own) == 3
    assert Models(EMBEDDED, "alice/adapter").own.sides[1].detail == "alice/adapter"


def test_visitors_do_not_read_what_only_the_owner_may(hub, online):
    put(ADAPTERS / "agl", "alice/secret", private=True)
    with pytest.raises(ValueError, match="Can't read 'alice/secret'"):
        Models(hosted=True).get(EMBEDDED, "alice/secret")
    assert (
        Models(EMBEDDED, "alice/secret", hosted=True).own.sides[1].detail == "alice/secret"
    )  # the owner's own choice


def test_broken_adapters_get_a_sentence(hub, online, tmp_path):
    shutil.copytree(ADAPTERS / "agl", tmp_path / "cut")
    file = tmp_path / "cut" / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:1000])
    put(tmp_path / "cut", "alice/cut")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    put(tmp_path / "empty", "alice/empty")
    for repo in ("alice/cut", "alice/empty"):
        with pytest.raises(ValueError) as error:
            Models(hosted=True).get(EMBEDDED, repo)
        assert repo in str(error.value) and str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_giants_are_refused_before_they_are_loaded(hub, online, monkeypatch):
    put(ADAPTERS / "agl", "alice/adapter")
    monkeypatch.setattr("agl_trl.space.models.LARGEST_ADAPTER", 1e5)
    with pytest.raises(ValueError, match="more than this Space loads"):
        Models(hosted=True).get(EMBEDDED, "alice/adapter")


def test_local_folder_with_the_name_of_a_repo_is_not_read(models, tmp_path, monkeypatch):
    shutil.copytree(ADAPTERS / "agl", tmp_path / "alice" / "adapter")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not name a repo"):
        models.get(EMBEDDED, "alice/adapter")
    own = Models()
    named = own.get(EMBEDDED, "alice/adapter")  # on a machine of one's own it is
    assert len(named.sides) == 2 and own.get(EMBEDDED, " alice/adapter") is named  # and stays loaded
    shutil.copytree(ADAPTERS / "plain", tmp_path / "alice" / "other")
    with pytest.raises(ValueError):
        own.get(EMBEDDED, "alice/none/such")
    assert own.get(EMBEDDED, "alice/adapter") is named
    own.get(EMBEDDED, "alice/other")
    assert own.get(EMBEDDED, "alice/adapter") is not named  # until the next one is
    assert own.get() is own.own


def test_a_batch_and_a_stream_say_the_same(models):
    model, prompt = models.own, [{"role": "user", "content": UNSAFE}]
    for side in (*model.sides, *reversed(model.sides)):  # each after each other
        *_, (text, _) = model.stream(side, UNSAFE, Decoding(length=24))
        assert model.answer_all(side, [prompt], 24) == [text.strip()]
