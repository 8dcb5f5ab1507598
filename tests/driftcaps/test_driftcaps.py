"""DriftCaps: rows are what the card says, splits share nothing, and no prompt is a variant of another."""

import json
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.resources import files

import pytest
from datasets import concatenate_datasets, load_dataset
from huggingface_hub import DatasetCard, HfApi

from agl_trl.data.alignment import select_rows
from agl_trl.data.files import load_rows
from agl_trl.driftcaps import COLUMNS, LOOKALIKE_TYPES, UNSAFE_CATEGORIES, alignment_rows, load_driftcaps, push
from agl_trl.evaluation.refusal import judge_answer


FOLDER = files("agl_trl.driftcaps")
SPLITS = ("protect", "test")
SEXUAL = re.compile(
    r"\b(sex\w*|porn\w*|nude\w*|naked|erotic\w*|explicit|undress\w*|grop\w+|orgy|x-rated|smut|raunchy|obscene|brothels?|"
    r"escort|dirty talk|affair|rape)\b"
)
MINOR = re.compile(
    r"\b(child\w*|minors?|teen\w*|kids?|girls?|boys?|school\w*|students?|pupils?|young\w*|daughters?|sons?|nieces?|"
    r"nephews?|grand(son|daughter|child)\w*|underage|infants?|bab(y|ies)|toddlers?|adolescen\w+|juvenile\w*|"
    r"[\w-]+-year-olds?)\b"
)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = [line for split in SPLITS for line in FOLDER.joinpath("data", f"{split}.jsonl").open(encoding="utf-8")]
    return [json.loads(line) for line in lines]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def is_lookalike(row: dict) -> bool:
    return row["category"].startswith("lookalike/")


def test_schema(rows):
    for row in rows:
        assert list(row) == ["id", "prompt", "category", "expected", "pair_id", "family", "split", "response"], row
        texts = [value for column, value in row.items() if column != "pair_id"]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), row
        assert row["pair_id"] is None or re.fullmatch(r"pair-\d{3}", row["pair_id"]), row
        assert re.fullmatch(r"dc-\d{4}", row["id"]) and row["split"] in SPLITS, row
        assert (row["expected"] == "refuse") == (row["category"] in UNSAFE_CATEGORIES), row
        assert row["expected"] in ("refuse", "comply"), row
    for column in ("id", "prompt", "response"):
        assert len({row[column].lower() for row in rows}) == len(rows), column


def test_counts(rows):
    unsafe = Counter(row["category"] for row in rows if row["expected"] == "refuse")
    lookalikes = Counter(row["category"].removeprefix("lookalike/") for row in rows if is_lookalike(row))
    everyday = Counter(row["category"] for row in rows if row["category"].startswith("everyday/"))
    assert unsafe.total() >= 500 and set(unsafe) == set(UNSAFE_CATEGORIES)
    assert min(unsafe[c] for c in set(unsafe) - {"sex_related_crimes", "sexual_content"}) >= 40
    assert max(unsafe["sex_related_crimes"], unsafe["sexual_content"]) < 20  # kept few
    assert lookalikes.total() >= 200 and set(lookalikes) == set(LOOKALIKE_TYPES) and min(lookalikes.values()) >= 20
    assert everyday.total() >= 190 and len(everyday) >= 12
    assert len(rows) == unsafe.total() + lookalikes.total() + everyday.total()


def test_splits_share_categories_and_no_family(rows):
    splits_of, families = defaultdict(set), defaultdict(set)
    for row in rows:
        splits_of[row["category"]].add(row["split"])
        families[row["family"]].add(row["split"])
    assert all(splits == set(SPLITS) for splits in splits_of.values())
    assert all(len(splits) == 1 for splits in families.values())
    for expected in ("refuse", "comply"):
        protect, test = ([r for r in rows if r["split"] == s and r["expected"] == expected] for s in SPLITS)
        assert 0.9 <= len(protect) / len(test) <= 1.1


def test_a_pair_is_an_unsafe_request_and_its_lookalike(rows):
    pairs = defaultdict(list)
    for row in rows:
        if row["pair_id"]:
            pairs[row["pair_id"]].append(row)
    assert len(pairs) >= 100
    for pair in pairs.values():
        unsafe, safe = sorted(pair, key=is_lookalike)
        assert unsafe["expected"] == "refuse" and is_lookalike(safe)
        assert (unsafe["split"], unsafe["family"]) == (safe["split"], safe["family"])
        # They look alike by what they share in words, not only in little ones.
        shared = set(words(unsafe["prompt"])) & set(words(safe["prompt"]))
        assert len(shared) >= 3 and max(map(len, shared)) >= 4, pair


def test_no_prompt_is_a_near_duplicate_of_another(rows):
    grams = []
    for row in rows:
        tokens = words(row["prompt"])
        grams.append({tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)})
    holders = defaultdict(list)  # only prompts with a trigram in common are compared
    for index, trigrams in enumerate(grams):
        for trigram in trigrams:
            holders[trigram].append(index)
    candidates = {(i, j) for held in holders.values() for n, j in enumerate(held) for i in held[:n]}
    assert len(candidates) > 100
    for i, j in candidates:
        similarity = len(grams[i] & grams[j]) / len(grams[i] | grams[j])
        limit = 0.5 if rows[i]["split"] == rows[j]["split"] else 0.35
        assert similarity <= limit, (similarity, rows[i]["prompt"], rows[j]["prompt"])


def test_prompts_vary_in_length_and_opening(rows):
    for expected in ("refuse", "comply"):
        prompts = [words(row["prompt"]) for row in rows if row["expected"] == expected]
        lengths = [len(row["prompt"].split()) for row in rows if row["expected"] == expected]
        assert min(lengths) >= 5 and max(lengths) <= 60
        assert sum(n <= 8 for n in lengths) >= 0.08 * len(lengths)
        assert sum(n >= 25 for n in lengths) >= 0.05 * len(lengths)
        assert Counter(tuple(p[:2]) for p in prompts).most_common(1)[0][1] <= 0.04 * len(prompts)


def test_refusals_are_judged_refusals_and_vary(rows):
    refusals = [row for row in rows if row["expected"] == "refuse"]
    judged = [judge_answer(row["prompt"], row["response"]).label == "refusal" for row in refusals]
    assert all(judged)
    openings = Counter(tuple(words(row["response"])[:4]) for row in refusals)
    assert openings.most_common(1)[0][1] <= 0.05 * len(refusals)
    for row in refusals:
        assert re.search(r"\b(not|no|cannot|decline|refuse|pass|unable|\w+n't)\b", row["response"]), row
        assert len(words(row["response"])) >= 8, row


def test_safe_answers_are_not_judged_refusals(rows):
    for row in rows:
        if row["expected"] == "comply":
            assert judge_answer(row["prompt"], row["response"]).label == "compliance", row


def test_nothing_sexual_about_minors(rows):
    sexual = [
        row
        for row in rows
        if row["category"] in ("sex_related_crimes", "sexual_content") or SEXUAL.search(row["prompt"].lower())
    ]
    pairs = {row["pair_id"] for row in sexual} - {None}
    partners = [row for row in rows if row["pair_id"] in pairs]
    assert len(sexual) >= 30
    for row in sexual + partners:
        text = f"{row['prompt']} {row['response']}".lower()
        assert not MINOR.search(text), row


def test_words_alone_do_not_tell_pairs_apart(rows):
    """Naive Bayes on the words of one split must fail on the pairs of the other, or they wouldn't look alike."""
    protect, test = ([row for row in rows if row["split"] == split] for split in SPLITS)
    totals = Counter(row["expected"] for row in protect)
    seen = {
        label: Counter(w for row in protect if row["expected"] == label for w in set(words(row["prompt"])))
        for label in totals
    }

    def score(label: str, prompt: str) -> float:
        smoothed = [(seen[label][w] + 1) / (totals[label] + 2) for w in set(words(prompt))]
        return math.log(totals[label]) + sum(map(math.log, smoothed))

    right = {
        row["id"]: max(totals, key=lambda label, row=row: score(label, row["prompt"])) == row["expected"]
        for row in test
    }
    pairs = defaultdict(list)
    for row in test:
        pairs[row["pair_id"]].append(right[row["id"]])
    del pairs[None]
    assert sum(all(pair) for pair in pairs.values()) / len(pairs) < 0.4  # 28 % as shipped, where a coin gets 25 %
    unsafe = [right[row["id"]] for row in test if row["expected"] == "refuse"]
    assert 0.5 < sum(unsafe) / len(unsafe) < 0.9  # 76 %: it did learn something


def test_load_driftcaps(rows):
    protect, test, everything = (load_driftcaps(split) for split in ("protect", "test", "all"))
    assert everything.column_names == list(COLUMNS)
    assert everything.to_list() == protect.to_list() + test.to_list()
    assert everything.to_list() == [{column: row[column] for column in COLUMNS} for row in rows]
    assert set(protect["split"]) == {"protect"} and set(test["split"]) == {"test"}


def test_categories_filter():
    chosen = load_driftcaps("test", ["privacy", "lookalike/homonyms"])
    assert set(chosen["category"]) == {"privacy", "lookalike/homonyms"} and set(chosen["split"]) == {"test"}
    privacy, everyday = load_driftcaps("test", "privacy"), load_driftcaps("test", "everyday/cooking")
    assert 0 < len(privacy) < len(chosen)
    # Rows without pairs keep the type of the column.
    assert set(everyday["pair_id"]) == {None}
    assert len(concatenate_datasets([privacy, everyday])) == len(privacy) + len(everyday)
    assert load_driftcaps("test", []).column_names == list(COLUMNS)


def test_bad_arguments_are_said():
    with pytest.raises(ValueError, match="Unknown split 'train': choose 'protect', 'test' or 'all'"):
        load_driftcaps("train")
    with pytest.raises(ValueError, match="Unknown split 'train'"):
        alignment_rows("train")
    with pytest.raises(ValueError, match="Unknown category 'arson': choose among violent_crimes, .*everyday/cooking"):
        load_driftcaps("all", ["privacy", "arson"])


def test_alignment_rows():
    source, aligned = load_driftcaps("protect"), alignment_rows()
    assert aligned.column_names == ["prompt", "completion", "unsafe"]
    for row, line in zip(aligned, source, strict=True):
        assert row["prompt"] == [{"role": "user", "content": line["prompt"]}]
        assert row["completion"] == [{"role": "assistant", "content": line["response"]}]
        assert row["unsafe"] == (line["expected"] == "refuse")
    assert load_rows("driftcaps").to_list() == aligned.to_list()
    assert len(select_rows(load_rows("driftcaps"), None, 0)) == sum(aligned["unsafe"]) >= 250
    assert len(alignment_rows("all")) == len(aligned) + len(alignment_rows("test"))


def test_importing_imports_nothing_heavy():
    code = "import sys, agl_trl.driftcaps; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_card_says_what_the_data_is(rows, tmp_path):
    card = DatasetCard.load(FOLDER / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"]
    table = re.findall(r"^\| `([a-z_/]+)` \| (\d+) \| (\d+) \|$", card.text, re.MULTILINE)
    counts = Counter((row["category"], row["split"]) for row in rows)
    assert {(c, s): int(n) for c, *sizes in table for s, n in zip(SPLITS, sizes, strict=True)} == counts
    # The front matter is what `datasets` reads on the Hub: a split of that name, the row as in the file.
    for split in SPLITS:
        loaded = load_dataset(str(FOLDER), split=split, cache_dir=str(tmp_path))
        assert loaded.to_list() == [row for row in rows if row["split"] == split]


def test_push_is_one_commit_of_card_and_data(monkeypatch):
    calls = []

    class Repo:
        repo_id = "someone/driftcaps"

    class Commit:
        commit_url = "https://hub/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: calls.append((args, kwargs)) or Repo)
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **kwargs: calls.append((self.token, kwargs)) or Commit)
    assert push("driftcaps", token="hf_x", private=True) == Commit.commit_url
    (created, how), (token, commit) = calls
    assert created == ("driftcaps",) and how == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert token == "hf_x" and commit["repo_id"] == "someone/driftcaps" and commit["repo_type"] == "dataset"
    uploaded = {operation.path_in_repo: operation.path_or_fileobj for operation in commit["operations"]}
    assert set(uploaded) == {"README.md", "data/protect.jsonl", "data/test.jsonl"}
    for name, path in uploaded.items():
        with open(path, "rb") as file:
            assert file.read() == FOLDER.joinpath(*name.split("/")).read_bytes()
