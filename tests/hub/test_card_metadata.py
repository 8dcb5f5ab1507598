"""Metadata of cards: what others wrote stays as they wrote it, byte for byte, and only what is ours is added."""

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from agl_trl.evaluation.abilities import Ability
from agl_trl.hub.card_metadata import TAG, Readme, adapter_metadata, attached_metadata, eval_results, one_line
from tests.helpers.render_sample_card import made_up_behaviour, made_up_report


# Ways to write metadata that a round trip through a YAML library would write in its own way.
STYLES = {
    "comments": "# by hand\nlicense: mit  # yes\n\n# above the language\nlanguage: en",
    "quotes": "license: 'mit'\nname: \"x\"\nshort: don't",
    "words": "language: no\ngated: yes\ninference: True\nother: ~\nthird: null\nempty:",
    "numbers": "v: 0.50\nw: 1e-5\nx: 0x10\ny: 1_000\nd: 2024-01-01\nt: 12:30",
    "indents": "datasets:\n  - a/b\nlanguage:\n- en\nwidget:\n    - text: hi\n      output:\n         url: x.png",
    "flow": "datasets: [a/b,  c/d]\nwidget: {a: 1,b: 2}",
    "spaces": "license:   mit\nlanguage: \n- en",
    "lines": "description: a long line\n  that goes on\n\n  and on\nmore: >-\n  folded\n  text\nlast: |\n  - no list\n  # no comment",
    "quoted lines": 'description: "from here\n# no comment\nno: key"\nlicense: mit',
    "anchors": "a: &x [1, 2]\nb: *x",
    "twice": "license: mit\nlicense: apache-2.0",
    "signs": "emoji: 🚀\nlanguage: é\nlong: " + "word " * 60 + "end",
}


def read(folder, block: str, text: str = "# Card\n") -> Readme:
    (folder / "README.md").write_bytes(f"---\n{block}\n---\n{text}".encode())
    return Readme.read(folder / "README.md")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("style", STYLES)
def test_what_others_wrote_stays_byte_for_byte(style, newline, tmp_path):
    path = tmp_path / "README.md"
    original = f"---\n{STYLES[style]}\n---\n# Card \n".replace("\n", newline).encode()
    path.write_bytes(original)
    readme = Readme.read(path)
    readme.write(path, dict(readme.metadata), readme.text)
    assert path.read_bytes() == original
    ours = {"tags": [TAG], "base_model": "org/base"}
    readme.write(path, readme.metadata | ours, readme.text)
    added = f"tags:\n- {TAG}\nbase_model: org/base\n---\n# Card".replace("\n", newline).encode()
    assert path.read_bytes() == original.replace(f"---{newline}# Card".encode(), added)
    assert Readme.read(path).metadata == readme.metadata | ours


def test_values_that_change_and_go_leave_the_comments_of_their_neighbours(tmp_path):
    block = """# top
license: mit
# above the tags
tags:
  - b  # first
  - a  # second

# above the base model
base_model: /tmp/base  # here
# above the text
text: |
  # no comment

# the end"""
    readme = read(tmp_path, block)
    changed = {name: value for name, value in readme.metadata.items() if name != "base_model"}
    changed |= {"tags": ["b", "a", TAG], "new": 1}
    readme.write(tmp_path / "README.md", changed, readme.text)
    expected = block.replace("  - b  # first\n  - a  # second\n", f"- b\n- a\n- {TAG}\n")
    expected = expected.replace("base_model: /tmp/base  # here\n", "")
    assert (tmp_path / "README.md").read_text() == f"---\n{expected}\nnew: 1\n---\n# Card\n"


@pytest.mark.parametrize("block", ["{license: mit, tags: [a]}", "  license: mit\n  tags: [a]", "", "# only a comment"])
def test_metadata_in_another_style_are_written_anew_and_whole(block, tmp_path):
    readme = read(tmp_path, block)
    expected = readme.metadata | {"tags": ["a", TAG]}
    readme.write(tmp_path / "README.md", expected, readme.text)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == expected
    assert ("# only a comment" in (tmp_path / "README.md").read_text()) == (block == "# only a comment")


def test_metadata_of_others_keep_all_but_what_is_missing():
    report = made_up_report(made_up_behaviour())
    theirs = {"license": "mit", "library_name": "transformers", "base_model": "org/theirs", "tags": ["b"], "own": [1]}
    metadata = attached_metadata(theirs, "n", report, "org/base-model")
    index = metadata.pop("model-index")
    assert metadata == theirs | {"tags": ["b", TAG]}
    name, results = model_index_to_eval_results(index)
    assert name == "n" and [result.metric_value for result in results] == [
        result.metric_value for result in eval_results(report)
    ]
    bare = attached_metadata({"base_model": "/tmp/base"}, "n", report, "org/base-model")
    assert (bare["base_model"], bare["base_model_relation"], bare["library_name"]) == (
        "org/base-model",
        "adapter",
        "peft",
    )


def test_metadata_of_ours_are_the_same_when_made_again():
    report = made_up_report(made_up_behaviour())
    once = adapter_metadata({"license": "license", "licence": "license"}, "n", report, "org/base-model", ["trl"])
    assert "license" not in once and "licence" not in once and once["tags"] == sorted(once["tags"])
    assert adapter_metadata(yaml.safe_load(yaml.safe_dump(once)), "n", report, "org/base-model", ["trl"]) == once


def test_sets_of_one_dataset_are_told_apart():
    """Also by the Hub's client, which makes one entry of all results of one dataset and configuration."""
    report = made_up_report(made_up_behaviour())
    report.behaviour.metadata["prompts"] = {"name": "own.jsonl", "license": None}
    right = torch.arange(100)
    report.abilities = [
        Ability(name, "exact match", right < before, right < after, metadata={"source": source, "rows_sha256": name})
        for name, source, before, after in (
            ("arc_easy", "allenai/ai2_arc", 80, 79),
            ("arc_challenge", "allenai/ai2_arc", 50, 49),
            ("hellaswag", "Rowan/hellaswag", 40, 39),
            ("arc", "someone/arc", 30, 29),
            ("own", "own.jsonl", 20, 19),
        )
    ]
    _, results = model_index_to_eval_results(adapter_metadata({}, "n", report, None, [])["model-index"])
    told, expected = (
        [(r.dataset_name, r.dataset_args, r.metric_name, r.metric_value) for r in entries]
        for entries in (results, eval_results(report))
    )
    assert told == expected
    assert ("arc_challenge", {"num_rows": 100, "sha256": "arc_challenge"}, "Exact match, this adapter", 0.49) in told
    assert {r.dataset_name: r.dataset_config for r in results if r.metric_type == "exact_match"} == {
        "arc_easy": "ARC-Easy",
        "arc_challenge": "ARC-Challenge",
        "hellaswag": None,
        "arc": None,
        "own": "own",
    }


def test_one_line_holds_nothing_that_is_not_seen():
    assert one_line("a\n b\t\u202ec\x00") == "a b c"


def test_number_that_leaves_something_out_says_so_in_the_model_index():
    report = made_up_report()
    assert eval_results(report)[0].metric_name == "Mean relative drift of the weights"
    report.metadata["uncovered"] = {"lm_head.weight": 0.1}
    assert eval_results(report)[0].metric_name == "Mean relative drift of the linear layers alone"
