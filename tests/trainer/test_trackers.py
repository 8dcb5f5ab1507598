"""What trackers are left with, read back from their own files: all metrics, and the report at the end."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from agl_trl import DriftCallback, estimate_fisher
from agl_trl.data.alignment import tokenize_rows
from agl_trl.trainer.trackers import call_before_trackers, calling_handler
from tests.helpers.models import tiny_model
from tests.helpers.processes import ROOT
from tests.helpers.training import COMMON, lora


INSTALLED = [name for name in ("tensorboard", "trackio", "wandb") if find_spec(name) is not None]
RUNS = ["plain", "ours"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """Folder of both runs, with the files of all trackers that are installed."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRACKIO_DIR=str(folder / "trackio"),
        WANDB_MODE="offline",
        WANDB_DIR=str(folder),
        WANDB_SILENT="true",
    )
    command = [sys.executable, "-m", "tests.helpers.tracked_worker", folder, *INSTALLED]
    done = subprocess.run(command, check=False, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def history(folder: Path, run: str) -> dict[int, dict[str, float]]:
    """What the trainer logged at every step."""
    entries = json.loads((folder / f"{run}.json").read_text())
    return {entry["step"]: entry for entry in entries if "loss" in entry}


def check(told: dict[str, dict[int, float]], logged: dict[int, dict[str, float]]) -> None:
    """A tracker has, of every step, every number that the trainer logged."""
    assert [*logged] == [1, 2, 3, 4]
    names = {name for entry in logged.values() for name in entry if name.startswith("agl/")}
    assert names >= {"agl/relative_drift", "agl/penalty", "agl/kl"}
    for name in (*names, "loss"):
        wanted = {step: entry[name] for step, entry in logged.items() if name in entry}
        assert told[f"train/{name}"] == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.parametrize("run", RUNS)
def test_tensorboard(run, tracked):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = {path.parent for path in (tracked / run / "runs").rglob("events*")}
    events = EventAccumulator(str(place)).Reload()
    tags = events.Tags()
    check(
        {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]},
        history(tracked, run),
    )
    (picture,) = events.Images("agl/drift")
    assert picture.step == 4 and picture.width > 500 and picture.encoded_image_string.startswith(b"\x89PNG")
    (text,) = events.Tensors("agl/drift_by_layer/text_summary")
    (table,) = text.tensor_proto.string_val
    assert "| layer | relative_drift |" in table.decode() and "| model.layers.0.self_attn.q_proj | " in table.decode()


@pytest.mark.parametrize("run", RUNS)
def test_trackio(run, tracked):
    pytest.importorskip("trackio")
    program = "import json; from trackio.sqlite_storage import SQLiteStorage as S; print(json.dumps(S.get_logs('agl', {!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program.format(run)],
        env=dict(os.environ, TRACKIO_DIR=str(tracked / "trackio")),
        capture_output=True,
        text=True,
        check=True,
    )
    entries = json.loads(done.stdout.splitlines()[-1])
    told: dict[str, dict[int, float]] = {}
    for entry in entries:
        for name, value in entry.items():
            told.setdefault(name, {})[entry["train/global_step"]] = value
    check(told, history(tracked, run))
    (picture,), (table,) = told["agl/drift"].values(), told["agl/drift_by_layer"].values()
    assert picture["_type"] == "trackio.image" and [
        *(tracked / "trackio" / "media").rglob(Path(picture["file_path"]).name)
    ]
    assert table["_value"][0].keys() == {"layer", "relative_drift", "alignment_energy", "task_energy", "overlap"}
    assert len(table["_value"]) == 14 and all(row["relative_drift"] > 0 for row in table["_value"])


@pytest.mark.parametrize("run", RUNS)
def test_wandb(run, tracked):
    pytest.importorskip("wandb")
    told: dict[str, dict[int, float]] = {}
    for entry in wandb_entries(tracked, run):
        for name, value in entry.items():
            told.setdefault(name, {})[entry.get("train/global_step", 0)] = value
    check(told, history(tracked, run))
    assert told["agl/drift/_type"] == {4: "image-file"} and told["agl/drift_by_layer/_type"] == {4: "table-file"}
    picture, table = (
        [*tracked.rglob(Path(told[f"{name}/path"][4]).name)] for name in ("agl/drift", "agl/drift_by_layer")
    )
    assert picture[0].read_bytes().startswith(b"\x89PNG")
    content = json.loads(table[0].read_text())
    assert content["columns"][:2] == ["layer", "relative_drift"] and len(content["data"]) == 14


def wandb_entries(folder: Path, run: str) -> list[dict]:
    """Entries of an offline run, as its file has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        records = [Record.FromString(data) for data in wandb_records(file.read_bytes())]
        if run in {record.run.display_name for record in records}:
            items = [record.history.item for record in records if record.HasField("history")]
            return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in entry} for entry in items]
    raise AssertionError(f"W&B left no run '{run}'")


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: parts of at most 32 KiB, each after its checksum, length and kind."""
    block, header, place, record = 2**15, 7, 7, b""  # the file's own header is as long
    while place + header <= len(data):
        if (left := block - place % block) < header:  # filled up
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_the_measuring_callback_reaches_trackers_too(tmp_path, tokenizer, alignment_rows):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"input_ids": row.input_ids} for row in tokenize_rows(alignment_rows, tokenizer)]
    trainer = Trainer(
        get_peft_model(tiny_model(), lora()),
        TrainingArguments(str(tmp_path), **COMMON | dict(report_to="tensorboard")),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[DriftCallback(estimate_fisher(tiny_model(), alignment_rows, tokenizer, rank=4))],
    )
    trainer.train()
    (place,) = {path.parent for path in (tmp_path / "runs").rglob("events*")}
    told = {e.step: e.value for e in EventAccumulator(str(place)).Reload().Scalars("train/agl/relative_drift")}
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert told == pytest.approx({entry["step"]: entry["agl/relative_drift"] for entry in steps}, rel=1e-5)
    assert len(told) == 4


class _Sees(TrainerCallback):
    handler: CallbackHandler | None = None

    def on_epoch_begin(self, *args, **kwargs):
        self.handler = calling_handler()


def test_the_handler_is_the_one_that_calls_and_order_changes_where_it_must():
    pytest.importorskip("tensorboard")
    guard = _Sees()
    handler = CallbackHandler([DefaultFlowCallback(), TensorBoardCallback(), guard], None, None, None, None)
    handler.call_event("on_epoch_begin", None, None, None)
    assert guard.handler is handler and calling_handler() is None
    call_before_trackers(handler, guard)
    assert [type(c) for c in handler.callbacks] == [DefaultFlowCallback, _Sees, TensorBoardCallback]
    before = handler.callbacks
    call_before_trackers(handler, guard)
    assert handler.callbacks is before
    alone = CallbackHandler([DefaultFlowCallback(), guard], None, None, None, None)
    call_before_trackers(alone, guard)
    assert alone.callbacks[1] is guard
