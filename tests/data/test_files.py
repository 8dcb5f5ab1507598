"""Files of rows: by any of their endings, with the marks that Excel and Windows put first, or refused in one sentence."""

import pytest
from datasets import Dataset

from agl_trl.data.alignment import select_rows
from agl_trl.data.files import is_file, load_rows
from agl_trl.data.prompts import load_prompts
from agl_trl.data.rows import is_prompt_only


TABLE = {"prompt": ["Crème brûlée?", 'Say "a, b"\tand c'], "unsafe": [True, False]}
JSON = '{"prompt": "Crème brûlée?", "unsafe": true}\n{"prompt": "Say \\"a, b\\"\\tand c", "unsafe": false}\n'
CSV = 'prompt,unsafe\nCrème brûlée?,true\n"Say ""a, b""\tand c",false\n'
CONTENT = {
    "jsonl": JSON,
    "json": f"[{JSON.strip().replace(chr(10), ',')}]",
    "csv": CSV,
    "tsv": 'prompt\tunsafe\nCrème brûlée?\ttrue\n"Say ""a, b""\tand c"\tfalse\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [*CONTENT, *map(str.upper, CONTENT)])
def test_text_files(tmp_path, suffix, encoding):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(CONTENT[suffix.lower()].encode(encoding))
    assert load_rows(str(path)).to_dict() == TABLE
    assert load_prompts(str(path))["unsafe"] == [True, False]


@pytest.mark.parametrize("suffix", ["parquet", "PARQUET"])
def test_parquet(tmp_path, suffix):
    Dataset.from_dict(TABLE).to_parquet(tmp_path / f"rows.{suffix}")
    assert load_rows(str(tmp_path / f"rows.{suffix}")).to_dict() == TABLE


@pytest.mark.parametrize("name", ["rows.txt", "ROWS.TXT"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_prompt_a_line(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("Bake bread?\r\n\r\n  \r\nCrème brûlée?".encode(encoding))
    rows = load_rows(str(tmp_path / name))
    assert rows.to_dict() == {"prompt": ["Bake bread?", "Crème brûlée?"]}
    assert all(is_prompt_only(row) for row in select_rows(rows, None, 0))
    prompts = load_prompts(str(tmp_path / name))
    assert [messages[0]["content"] for messages in prompts["prompt"]] == ["Bake bread?", "Crème brûlée?"]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("rows.xlsx", b"PK", "the name of the file must end in .jsonl, .json, .csv, .tsv, .txt or .parquet"),
        ("rows", b"{}", "the name of the file must end in "),
        ("rows.csv", "prompt\nbrûlée".encode("latin-1"), "'utf-8' codec can't decode byte "),
        ("rows.jsonl", '{"prompt": "brûlée"}'.encode("latin-1"), "'utf-8' codec can't decode byte "),
        ("rows.TSV", None, "there is no such file"),
        ("rows.txt", b"", "it holds no rows"),
        ("rows.txt", b"\n \n", "it holds no rows"),
        ("rows.tsv", b"prompt\tunsafe\n", "it holds no rows"),
        ("rows.csv", b"prompt, prompt\na,b\n", "New column names must all be different"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "JSON parse error"),
        ("rows.parquet", b"PAR1", ""),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert is_file(str(path))
    for load in (load_rows, load_prompts):
        with pytest.raises(ValueError) as raised:
            load(str(path))
        message = str(raised.value)
        assert message.startswith(f"Can't read rows from '{path}': {reason}") and message.endswith(".")
        assert "\n" not in message


def test_names_of_the_hub_are_no_files():
    assert not is_file("someone/prompts") and not is_file("miniworld")
