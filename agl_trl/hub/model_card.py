"""Model cards: what an adapter is, how far it moved, and what was asked of it; and what Fisher statistics are of."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..artifacts.files import FISHER_FILE, FOLDER, PICTURE_FILE, REFERENCE_ANSWERS_FILE
from ..artifacts.location import hub_id
from ..drift.report import DriftReport
from ..fisher.calibration import drifts_at, is_calibrated
from ..fisher.protected_rows import DEFAULT_KL_BUDGET
from ..fisher.reference_answers import ReferenceAnswers
from ..fisher.statistics import FisherStatistics
from .card_metadata import (
    PACKAGED,
    Readme,
    adapter_metadata,
    attached_metadata,
    statistics_metadata,
    without_folder,
)
from .card_text import render, render_adapter, render_evidence


BEGIN, END = "<!-- agl_trl: begin -->", "<!-- agl_trl: end -->"  # around what we say in the card of someone else
# TRL's card from here on (run links, versions, citations) is kept; what it says before, our templates say.
KEPT_FROM = re.compile(r"^## Training procedure *$", re.MULTILINE)
CITED = "Cite AlignGuard-LoRA as:"
STUB_TITLE = "# Model Card for Model ID"
# What PEFT adds to the template that it starts from: versions, and the settings of bitsandbytes.
STUB_LINE = re.compile(
    r"## Training procedure|### Framework versions|- PEFT \S+|The following `bitsandbytes` quantization config was .*"
    r"|- (quant_method|_?load_in_\w+|llm_int8_\w+|bnb_\w+): .*"
)


def _base_of(report: DriftReport) -> str | None:
    return hub_id((report.metadata.get("base_model") or {}).get("name"))


def _check_repo_id(repo_id: str | None) -> None:
    if repo_id is not None and hub_id(repo_id) is None:
        raise ValueError(f"'{repo_id}' is not the id of a repo on the Hub.")


def declared_license(path: Path) -> str | None:
    """Licence that somebody wrote into a card; TRL's placeholder (`licence: license`) is none."""
    found = Readme.read(path).metadata.get("license")
    return found if isinstance(found, str) and found not in ("", "license") else None


def write_card(
    path: Path,
    name: str,
    report: DriftReport,
    *,
    repo_id: str | None = None,
    statistics_published: bool = True,
    references_published: bool = True,
    license: str | None = None,
) -> None:
    """
    Turn the card that TRL wrote into the adapter's card: our description and evidence, TRL's training section, and the
    metadata an adapter needs (`library_name: peft`, sorted tags, what was measured, no placeholder licence).

    Args:
        path (`Path`):
            README.md of the adapter, of TRL or of an earlier call.
        name (`str`):
            Title of the card.
        report ([`DriftReport`]):
            What to report; made by a trainer, so that it says what was trained.
        repo_id (`str`, *optional*):
            Id of the adapter's repo on the Hub, for the code in the card.
        statistics_published (`bool`, *optional*, defaults to `True`):
            Whether the Fisher statistics lie beside the adapter.
        references_published (`bool`, *optional*, defaults to `True`):
            Whether the reference answers of a run that had some lie there too.
        license (`str`, *optional*):
            Licence that its owner declared, in place of the one in the card; none is ever made up.

    Raises:
        `ValueError`: If `repo_id` is no id, or the metadata of the card can't be read.
    """
    _check_repo_id(repo_id)
    readme, base_model = Readme.read(path), _base_of(report)
    training = KEPT_FROM.search(readme.text)
    metadata = readme.metadata if license is None else {**readme.metadata, "license": license}
    kept = readme.text[training.start() :].split(CITED)[0] if training else "## Citation"
    kept = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", kept, flags=re.MULTILINE)).strip()
    evidence = render_evidence(
        report,
        repo_id,
        statistics_published=statistics_published,
        references_published=references_published,
        picture=find_spec("matplotlib") is not None,  # a trainer may draw it after this
    )
    parts = [
        render_adapter(name, report, base_model, repo_id),
        f"{BEGIN}\n{evidence}\n{END}",
        kept,
        render("citation.md.jinja"),
    ]
    readme.write(
        path,
        adapter_metadata(metadata, name, report, base_model, tags=["trl"]),
        "\n\n".join(["", *parts])[1:] + "\n",
    )


def attach_card(
    path: Path,
    name: str,
    report: DriftReport,
    *,
    base_model: str | None = None,
    repo_id: str | None = None,
    statistics_published: bool = True,
    references_published: bool = True,
) -> None:
    """
    Say in the card of an adapter, whoever trained it, what was measured: in a section between two markers, replaced by
    the next call, all else as it was. Where there is no card, or the one that PEFT makes, a full one. It names the evidence that
    lies beside it.

    Args:
        path (`Path`):
            README.md of the adapter, with its evidence in the same folder; it need not be there.
        name (`str`):
            Title of the card, where it has none.
        report ([`DriftReport`]):
            What to report.
        base_model (`str`, *optional*):
            Base model; one that has no id on the Hub, as a folder, is not named. By default the one in the report.
        repo_id (`str`, *optional*):
            Id of the adapter's repo on the Hub, for the code in the card.
        statistics_published (`bool`, *optional*, defaults to `True`):
            Whether Fisher statistics that lie beside it are for others, too.
        references_published (`bool`, *optional*, defaults to `True`):
            Whether reference answers that lie there are.

    Raises:
        `ValueError`: If `repo_id` is no id, the metadata of the card can't be read, or one of the markers is missing.
    """
    _check_repo_id(repo_id)
    readme = Readme.read(path)
    if base_model in PACKAGED or Path(base_model or "").exists():
        base_model = None
    base_model = hub_id(base_model) or _base_of(report)
    before, section, after = _sections(readme.text, path)
    folder = path.parent / FOLDER
    statistics_saved = (folder / FISHER_FILE).is_file()
    measured = render_evidence(
        report,
        repo_id,
        statistics_published=statistics_published and statistics_saved,
        references_published=references_published and (folder / REFERENCE_ANSWERS_FILE).is_file(),
        statistics_saved=statistics_saved,
        picture=(folder / PICTURE_FILE).is_file(),
    )
    evidence = f"{measured}\n\n## Citation\n\n{render('citation.md.jinja')}"
    if _is_stub(before + after) or (section or "").startswith("# "):
        before, after = ("", "\n") if _is_stub(before + after) else (before, after)
        evidence = f"{render_adapter(name, report, base_model, repo_id)}\n\n{evidence}"
        metadata = adapter_metadata(readme.metadata, name, report, base_model, tags=[])
    else:
        metadata = attached_metadata(readme.metadata, name, report, base_model)
        if section is None:
            before, after = before.rstrip("\n") + "\n\n", "\n"
        elif KEPT_FROM.search(after) and CITED in after:  # a card of `write_card`, which has its own citation
            evidence = measured
    readme.write(path, metadata, f"{before}{BEGIN}\n{evidence}\n{END}{after}")


def _sections(text: str, path: Path) -> tuple[str, str | None, str]:
    """What stands before, between and after the markers; nothing between if there are none."""
    if BEGIN not in text and END not in text:
        return text, None, ""
    before, _, rest = text.partition(BEGIN)
    section, _, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END in before:
        raise ValueError(f"The card '{path}' needs the markers '{BEGIN}' and '{END}' once each, in this order.")
    return before, section.strip(), after


def is_to_be_written(card: str) -> bool:
    """Whether a card (with its metadata) is for us to write: it has a section of ours, or says nothing yet. Any other is its author's."""
    return BEGIN in card or _is_stub(REGEX_YAML_BLOCK.sub("", card))


def _is_stub(text: str) -> bool:
    """Whether a card says nothing yet: it is empty, or the template that PEFT saves, with no field filled in."""
    if not text.strip():
        return True
    template = ModelCard.from_template(ModelCardData()).text
    known = {line.strip() for line in _without_comments(template).splitlines()}
    found = [line.strip() for line in _without_comments(text).splitlines()]
    return STUB_TITLE in found and all(
        line in known
        or line.startswith("#")
        or STUB_LINE.fullmatch(line)
        or line.endswith("[More Information Needed]")
        for line in found
    )


def _without_comments(text: str) -> str:
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def write_statistics_card(
    path: Path,
    name: str,
    statistics: FisherStatistics,
    references: ReferenceAnswers | None = None,
    *,
    repo_id: str | None = None,
) -> None:
    """
    Write the card of a repo that holds Fisher statistics and no adapter.

    Args:
        path (`Path`):
            README.md to write; of one that is there, the metadata that are not ours are kept.
        name (`str`):
            Title of the card.
        statistics ([`FisherStatistics`]):
            What the repo holds.
        references ([`ReferenceAnswers`], *optional*):
            What it holds beside them.
        repo_id (`str`, *optional*):
            Id of the repo on the Hub, for the code in the card.

    Raises:
        `ValueError`: If `repo_id` is no id, or the metadata of the card can't be read.
    """
    _check_repo_id(repo_id)
    readme = Readme.read(path)
    facts: dict[str, Any] = {"fisher_type": None, "max_length": None, "dataset": None, "skipped_layers": []}
    facts |= {"versions": {}, **statistics.metadata}
    text = render(
        "statistics.md.jinja",
        name=name,
        statistics=statistics,
        references=references,
        kl_budget=DEFAULT_KL_BUDGET,
        drifts=drifts_at(statistics, DEFAULT_KL_BUDGET) if is_calibrated(statistics) else None,
        facts=facts,
        base_model=hub_id(facts["base_model"]["name"]),
        dataset=without_folder(facts["dataset"]) if isinstance(facts["dataset"], str) else None,
        versions=", ".join(f"{package} {number}" for package, number in sorted(facts["versions"].items())),
        repo_id=repo_id,
        citation=render("citation.md.jinja"),
    )
    readme.write(path, statistics_metadata(readme.metadata, statistics), f"\n{text}\n")
