"""Answers kept while they are made, so that an interrupted report goes on where it stopped."""

import hashlib
import json
from pathlib import Path


class AnswerCache:
    """
    Answers in a JSONL file, one line each, written as soon as they are there.

    Args:
        path (`Path`):
            File; its folder is made.
        settings (`str`):
            What else the answers depend on: models, decoding. Answers of other settings are not found.
    """

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings
        self.answers: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the last line of an interrupted run
                    continue
                self.answers[entry["key"]] = entry["text"]

    def key(self, side: str, prompt: str) -> str:
        """Key of one side's answer to a prompt."""
        return hashlib.sha256(json.dumps([self.settings, side, prompt]).encode()).hexdigest()[:32]

    def add(self, keys: list[str], texts: list[str]) -> None:
        """Keep answers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, text in zip(keys, texts, strict=True):
                file.write(json.dumps({"key": key, "text": text}) + "\n")
                self.answers[key] = text
