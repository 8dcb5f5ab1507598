"""`agl-trl scaling`: files of runs as people have them, both surfaces written, and a sentence for a bad file."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from agl_trl.cli.app import app
from agl_trl.cli.scaling import COLUMNS, load_runs
from agl_trl.experiments.scaling_law import Law


LAWS = {"lora": Law(A=40.0, alpha=0.45, beta=0.3, E=0.02), "agl": Law(A=4.0, alpha=0.45, beta=0.3, E=0.02)}
HEAD = ",".join(COLUMNS)


def rows() -> list[tuple]:
    noise = np.random.default_rng(0)
    found = []
    for method, law in LAWS.items():
        for n, d in [(n, d) for n in (2e5, 1e6, 5e6) for d in (1e4, 4e4, 1.6e5, 6.4e5)] * 2:
            increase = law.increase(np.array(n), np.array(d)) * (1 + 0.02 * noise.standard_normal())
            found.append((method, n, d, 1.5, 1.5 + float(increase)))
    return found


def table(separator: str) -> str:
    return "\n".join(separator.join(map(str, row)) for row in [COLUMNS, *rows()])


LINES = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows())


@pytest.mark.parametrize(("name", "content"), [("runs.csv", table(",")), ("runs.jsonl", LINES)])
def test_command_reads_runs_and_writes_both_surfaces(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    arguments = ["scaling", "--runs", str(tmp_path / name), "--output-dir", str(tmp_path / "out"), "--resamples", "20"]
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0 and "lora" in outcome.output and "agl" in outcome.output
    told = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert told["agl"]["law"]["beta"] == pytest.approx(0.3, abs=0.1)
    assert (tmp_path / "out" / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    CliRunner().invoke(app, arguments)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_files_as_other_programs_write_them_hold_the_same_runs(tmp_path):
    files = {
        "plain.csv": table(",").encode(),
        "excel.csv": table(",").replace("\n", "\r\n").encode("utf-8-sig"),
        "LOUD.CSV": table(",").encode(),
        "tabs.tsv": table("\t").encode(),
        "lines.JSONL": LINES.encode("utf-8-sig"),
        "lines.json": LINES.encode(),
    }
    seen = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        seen.append({method: [list(column) for column in runs] for method, runs in load_runs(tmp_path / name).items()})
    assert seen[0].keys() == LAWS.keys() and len(seen[0]["agl"][0]) == 24
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("method,n_params\nlora,1\n", "Run 1 of .* lacks one of the columns"),
        (f"{HEAD}\nlora,1,1,1,1\nlora,1,x,1,1\n", "Run 2 of .* has a value that is no number"),
        (f"{HEAD}\nlora,1,1,1,nan\n", "Run 1 of .* has a value that is not finite"),
        (f"{HEAD}\n", "There is no run in"),
    ],
)
def test_bad_files_are_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_runs(path)
    with pytest.raises(ValueError, match="There is no file"):
        load_runs(tmp_path / "none.csv")
    (tmp_path / "runs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"Can't read runs from '.*runs\.jsonl'"):
        load_runs(tmp_path / "runs.jsonl")
