"""Metadata of model cards: what the Hub reads of them, read and written without losing what others put there."""

from dataclasses import dataclass, field
from math import isnan
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..artifacts.files import TAG, write_atomically
from ..artifacts.location import hub_id
from ..data.abilities import PUBLIC_SETS
from ..data.prompts import SETS
from ..drift.report import DriftReport
from ..evaluation.abilities import Ability
from ..evaluation.behaviour import Behaviour
from ..fisher.statistics import FisherStatistics


RELATION = "base_model:adapter:"
PACKAGED = ("driftcaps", "miniworld")
STATISTICS_TAG = "fisher-information"  # of repos that hold statistics alone
# Tells our results in a model index from those of others.
SOURCE: dict[str, str] = {"source_name": "agl_trl", "source_url": "https://huggingface.co/papers/2508.02079"}


def one_line(text: str) -> str:
    """Text without line breaks, runs of spaces and characters that can't be seen."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def without_folder(name: str) -> str:
    """A name as it is, or the last part of an absolute path: no path of a machine in a card."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return PureWindowsPath(name).name
    return name


@dataclass
class Readme:
    """
    A model card in two parts.

    Args:
        metadata (`dict`):
            What stands between the two `---`.
        text (`str`):
            What follows, with `\\n` as line ends.
        block (`str`):
            The metadata as they were written.
        newline (`str`):
            Line ends of the file.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    block: str = ""
    newline: str = "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Read a card; an empty one where there is no file.

        Raises:
            `ValueError`: If it is not UTF-8, or its metadata are not a YAML mapping.
        """
        if not path.is_file():
            return cls()
        try:
            content = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"The card '{path}' is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        newline = "\r\n" if "\r\n" in content else "\n"
        content = content.replace("\r\n", "\n")
        found = REGEX_YAML_BLOCK.search(content)
        if found is None:
            return cls(text=content, newline=newline)
        block = f"{found[2]}\n"  # as text of several lines at the end of it needs
        try:
            metadata = yaml.safe_load(block)
        except yaml.YAMLError as error:
            reason = one_line(str(error)).rstrip(".")
            raise ValueError(f"The metadata of the card '{path}' are not valid YAML: {reason}.") from error
        if not isinstance(metadata, dict | None):
            raise ValueError(  # noqa: TRY004 (the content of a file, not an argument)
                f"The metadata of the card '{path}' are not a mapping of names to values."
            )
        return cls(metadata or {}, content[found.end() :], block, newline)

    def write(self, path: Path, metadata: dict[str, Any], text: str) -> None:
        """Write a card with these metadata, of which those that were there before stay as they were written, and text."""
        content = f"---\n{_edited(self.block, self.metadata, metadata)}\n---\n{text}"
        write_atomically(path, content.replace("\n", self.newline).encode())


def _edited(block: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """
    YAML of `after` that keeps the text of `block` (comments, quotes, order, spaces) wherever the value is that of `before`.
    The parser tells where keys and values stand; a library's round trip would write the values of others in its own style.
    """
    root = yaml.compose(block, yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    starts = [*(key.start_mark.index for key, _ in pairs), len(block)]
    parts = {"": block[: starts[0]]}  # before the first key
    for (key, value), start, end in zip(pairs, starts, starts[1:], strict=False):
        name = key.value
        if name in after and after[name] == before.get(name):
            parts[name] = parts.get(name, "") + block[start:end]  # of a key that is there twice, the last counts
        else:
            stop = start + len(block[start : _end(value)].rstrip())
            comments = block[stop:end].partition("\n")[2]  # in front of the next key
            parts[name] = (yaml_dump({name: after[name]}, sort_keys=False) if name in after else "") + comments
    new = {name: value for name, value in after.items() if name not in parts}
    text = "".join(parts.values()) + (yaml_dump(new, sort_keys=False) if new else "")
    try:
        same = yaml.safe_load(text) == after
    except yaml.YAMLError:
        same = False  # a style other than one key after the other
    return (text if same else yaml_dump(after, sort_keys=False)).strip("\n")


def _end(node: yaml.Node) -> int:
    """Where a value of a YAML text ends, without the comments behind it."""
    if isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index


def prompt_set(behaviour: Behaviour) -> tuple[str | None, str | None]:
    """Name and licence of the prompts behind answers, as far as the report knows them."""
    described = behaviour.metadata.get("prompts") or {}
    if isinstance(described, str):
        described = {"name": described}
    name, licence = described.get("name"), described.get("license")
    return (without_folder(one_line(name)) if name else None), (one_line(licence) if licence else None)


def eval_results(report: DriftReport) -> list[EvalResult]:
    """What a report measured, as entries of a model index. Values are rounded, so that they are short and stable."""
    common: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text generation", **SOURCE}
    weights: dict[str, Any] = {
        "dataset_type": "fisher-statistics",
        "dataset_name": "Rows behind the Fisher statistics",
    }
    label = (
        "Mean relative drift of the linear layers alone" if report.uncovered else "Mean relative drift of the weights"
    )
    entries = []
    if report.layers:
        entries.append((weights, [("relative_drift", label, float(f"{report.mean_relative_drift:.4g}"))]))
    for name, kept in (report.metadata.get("protected") or {"behaviours": {}})["behaviours"].items():
        if kept.get("kl") is not None:
            rows = {"dataset_type": "protected-rows", "dataset_config": name}
            rows |= {"dataset_name": f"Protected rows of the training ({name})"}
            label = f"KL to the {_reference(report)} on the protected rows of the training, {name}, nats per token"
            entries.append((rows, [("kl_divergence", label, float(f"{kept['kl']:.4g}"))]))
    if (behaviour := report.behaviour) is not None:
        name, _ = prompt_set(behaviour)
        kind = f"agl_trl/{name}" if name in PACKAGED else SETS[name].source if name in SETS else name
        count = len(behaviour.categories)
        prompts: dict[str, Any] = {
            "dataset_type": kind or "prompts",
            "dataset_name": name or "Prompts without a recorded name",
        }
        prompts |= {"dataset_args": {"num_prompts": count, "sha256": behaviour.metadata.get("prompts_sha256")}}
        reference = _reference(report)
        found = []
        for unsafe, metric, label in (
            (True, "refusal_rate", "Refusal rate on unsafe prompts"),
            (False, "over_refusal_rate", "Over-refusal rate on safe prompts"),
        ):
            if (behaviour.unsafe == unsafe).any():
                for tuned, which in ((False, reference), (True, "this adapter")):
                    found.append((metric, f"{label}, {which}", round(behaviour.refusal(tuned, unsafe).value, 4)))
        kl = behaviour.kl_first_tokens.mean().item()
        if not isnan(kl):
            found.append(("kl_divergence", f"KL to the {reference}, nats per token", round(kl, 4)))
        entries.append((prompts, found))
    for one in report.abilities:
        if one.total:
            source = one.metadata.get("source") or one.name
            set_of: dict[str, Any] = {"dataset_type": source, "dataset_config": _config(one.name, source)}
            set_of |= {"dataset_name": one.name}
            set_of["dataset_args"] = {"num_rows": one.total, "sha256": one.metadata.get("rows_sha256")}
            entries.append((set_of, _of_ability(one, _reference(report))))
    return [
        EvalResult(**common, **dataset, metric_type=metric, metric_name=label, metric_value=value)
        for dataset, values in entries
        for metric, label, value in values
    ]


def _config(name: str, source: str) -> str | None:
    """
    Configuration of the dataset behind an ability set. Results of one dataset and configuration are one entry of a model index:
    two sets of one dataset, or a file that was asked as prompts too, would be told as one.
    """
    if name in PUBLIC_SETS and PUBLIC_SETS[name].source == source:
        return PUBLIC_SETS[name].config
    return None if "/" in source else name  # of another dataset on the Hub it is not known


def _of_ability(one: Ability, reference: str) -> list[tuple[str, str, float]]:
    sides = ((False, reference), (True, "this adapter"))
    if one.is_text:
        return [("nll", f"NLL per token, {which}, nats", round(one.mean_nll(tuned), 4)) for tuned, which in sides]
    metric, label = (
        ("acc_norm", "Accuracy by likelihood per character")
        if one.kind == "multiple choice"
        else ("exact_match", "Exact match")
    )
    return [(metric, f"{label}, {which}", round(one.rate(tuned).value, 4)) for tuned, which in sides]


def _reference(report: DriftReport) -> str:
    return "start of this training" if report.metadata.get("continued") else "base model"


def _model_index(existing: Any, name: str, report: DriftReport) -> list[dict[str, Any]]:
    """A model index in which our results are those of this report, and those of others stay."""
    (ours,) = eval_results_to_model_index(name, eval_results(report))
    if not isinstance(existing, list) or not existing or not all(isinstance(entry, dict) for entry in existing):
        return [ours]
    first, *others = existing
    kept = [
        result
        for result in first.get("results") or []
        if (result.get("source") or {}).get("name") != SOURCE["source_name"]
    ]
    named = first if kept else {"name": name}  # of no other's results, the name is ours to set
    return [{**named, "results": [*kept, *ours["results"]]}, *others]


def _with_index(metadata: dict[str, Any], name: str, report: DriftReport) -> dict[str, Any]:
    """Metadata with the model index at their end or where it was; none where there is no result, which the Hub refuses."""
    index = _model_index(metadata.get("model-index"), without_folder(one_line(name)), report)
    if index[0]["results"]:
        return {**metadata, "model-index": index}
    return {key: value for key, value in metadata.items() if key != "model-index"}


def _names(value: Any) -> list[str]:
    """A value of the metadata that may be one name or several, as a list."""
    return [value] if isinstance(value, str) else [name for name in value or [] if isinstance(name, str)]


def _cleaned(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without what no card should say: placeholders for a licence, and paths in place of ids."""
    cleaned = dict(metadata)
    cleaned.pop("licence", None)  # TRL writes the placeholder `licence: license`
    if cleaned.get("license") in (None, "", "license"):
        cleaned.pop("license", None)
    for key in ("base_model", "datasets"):
        names = [name for name in _names(cleaned.get(key)) if name not in PACKAGED]  # of this package, not of the Hub
        ids = [name for name in names if hub_id(name) and not Path(name).exists()]
        if not ids:
            cleaned.pop(key, None)
        elif ids != _names(cleaned[key]):
            cleaned[key] = ids
    if "tags" in cleaned:
        tags = _names(cleaned["tags"])
        cleaned["tags"] = [tag for tag in tags if not tag.startswith(RELATION) or hub_id(tag.removeprefix(RELATION))]
    return cleaned


def adapter_metadata(
    existing: dict[str, Any], name: str, report: DriftReport, base_model: str | None, tags: list[str]
) -> dict[str, Any]:
    """
    Metadata of a card that is ours from top to bottom.

    Args:
        existing (`dict`):
            Metadata of the card before: a licence, datasets and whatever else stand there are kept.
        name (`str`):
            Name of the model.
        report ([`DriftReport`]):
            What was measured.
        base_model (`str`, *optional*):
            Id of the base model on the Hub, if it has one.
        tags (`list[str]`):
            Tags beside those that every adapter has.
    """
    metadata = _cleaned(existing)
    metadata.pop("model_name", None)  # it is in the model index
    metadata |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    kept = [tag for tag in metadata.get("tags", []) if not tag.startswith(RELATION)]
    method = report.method.lower().replace("_", "-")
    metadata["tags"] = sorted({*kept, *tags, TAG, method, "transformers"})
    metadata.pop("base_model", None), metadata.pop("base_model_relation", None)
    if base_model is not None:
        metadata |= {"base_model": base_model, "base_model_relation": "adapter"}
        metadata["tags"] = sorted([*metadata["tags"], RELATION + base_model])
    metadata["model-index"] = metadata.pop("model-index", None)  # at the end
    return _with_index(metadata, name, report)


def attached_metadata(
    existing: dict[str, Any], name: str, report: DriftReport, base_model: str | None
) -> dict[str, Any]:
    """Metadata of a card that someone else wrote: theirs, and of ours only what is missing; arguments as above."""
    metadata = dict(existing)
    for key in ("base_model", "tags"):
        if key in metadata and _cleaned(metadata).get(key) != metadata[key]:
            metadata[key] = _cleaned(metadata).get(key)  # a path of a machine, which the Hub refuses
            if metadata[key] is None:
                del metadata[key]
    if metadata.get("library_name") is None:
        metadata["library_name"] = "peft"
    if metadata.get("base_model") is None and base_model is not None:
        metadata |= {"base_model": base_model, "base_model_relation": "adapter"}
    tags = _names(metadata.get("tags"))
    metadata["tags"] = tags if TAG in tags else [*tags, TAG]
    return _with_index(metadata, name, report)


def statistics_metadata(existing: dict[str, Any], statistics: FisherStatistics) -> dict[str, Any]:
    """Metadata of a repo that holds Fisher statistics alone: a licence and whatever else stands there is kept."""
    metadata = _cleaned(existing)
    metadata["tags"] = sorted({*metadata.get("tags", []), TAG, STATISTICS_TAG})
    metadata.pop("base_model", None)
    if (base_model := hub_id(statistics.metadata["base_model"]["name"])) is not None:
        metadata["base_model"] = base_model
    return metadata
