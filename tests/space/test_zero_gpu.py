"""Functions stay as they are where no GPU is lent."""

from pathlib import Path

from agl_trl.space.zero_gpu import on_gpu


def test_our_folder_spaces_is_not_zero_gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])

    def answer() -> str:
        return "as it is"

    assert on_gpu(answer) is answer
