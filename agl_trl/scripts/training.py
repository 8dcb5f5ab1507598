"""What the training scripts share: arguments, loading of model and rows, training, saving, pushing."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from huggingface_hub import constants
from packaging.version import Version
from peft import PeftConfig
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..data.files import is_file, load_rows
from ..trainer.config import AlignGuardConfig


MINIWORLD = "miniworld"
Split = Literal["train", "test"]


@dataclass
class AGLScriptArguments(ScriptArguments):
    """
    Arguments of TRL's scripts, and where the alignment rows come from.

    Args:
        alignment_dataset_name (`str`, *optional*):
            Rows whose behaviour must not change: dataset on the Hub, a local `.jsonl`, `.json`, `.csv`, `.tsv`, `.txt` or `.parquet` file, or
            `miniworld`. Not needed with `fisher_path`.
        alignment_dataset_config (`str`, *optional*):
            Configuration of the dataset on the Hub.
        alignment_dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of it.
        protect (`dict[str, str]`, *optional*):
            Rows of other behaviours to keep, by name: files or datasets on the Hub; on the command line as JSON.

    Raises:
        `ValueError`: If `protect` is no mapping of names to files or ids.
    """

    alignment_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows whose behaviour must not change: dataset on the Hub, a local .jsonl, .json, .csv, .tsv, .txt or .parquet file, or "
            "`miniworld`. Not needed with `fisher_path`."
        },
    )
    alignment_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the alignment dataset on the Hub."}
    )
    alignment_dataset_split: str = field(default="train", metadata={"help": "Split of the alignment dataset."})
    protect: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Rows of other behaviours to keep, by name: a mapping to files or datasets on the Hub, as JSON such as "
            '\'{"text": "notes.txt"}\'.'
        },
    )

    def __post_init__(self):
        given = self.protect
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                pass  # told below
        if given is not None and not (isinstance(given, dict) and all(isinstance(v, str) for v in given.values())):
            raise ValueError(f"`protect` must map names to files or datasets on the Hub, got {self.protect!r}.")
        self.protect = given


Arguments = tuple[AGLScriptArguments, AlignGuardConfig, ModelConfig, DatasetMixtureConfig]


def make_parser(
    config_class: type[AlignGuardConfig],
    prog: str | None = None,
    script_arguments: type[AGLScriptArguments] = AGLScriptArguments,
) -> TrlParser:
    """Parser of flags and of a YAML file given by `--config`; flags win."""
    return TrlParser((script_arguments, config_class, ModelConfig, DatasetMixtureConfig), prog=prog)


def parse(parser: TrlParser) -> Arguments:
    """
    Arguments from the command line. Unlike TRL's scripts, which pass over what they don't know, a key that nobody
    reads ends the program: a misspelt weight must not train an unprotected model.
    """
    try:
        return parser.parse_args_and_config()
    except ValueError as error:
        parser.error(str(error))
        raise  # never reached: `error` exits


def run(
    trainer_class: type,
    script_args: AGLScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    *,
    embedded_rows: Callable[[str, Split], Dataset],
    **trainer_options: Any,
) -> None:
    """
    Train, save and push; a failure is one sentence on standard error and exit code 1.

    Args:
        trainer_class (`type`):
            One of the AGL trainers.
        script_args, training_args, model_args, dataset_args:
            What the parser gives.
        embedded_rows (`Callable`):
            Training rows of the embedded world for this trainer, by task and split.
        trainer_options (`Any`):
            Further arguments of the trainer.
    """
    try:
        _run(trainer_class, script_args, training_args, model_args, dataset_args, embedded_rows, trainer_options)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _run(
    trainer_class: type,
    script_args: AGLScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    embedded_rows: Callable[[str, Split], Dataset],
    trainer_options: dict[str, Any],
) -> None:
    dataset = load_training_rows(script_args, dataset_args, embedded_rows)
    train_rows, eval_rows = splits_of(dataset, script_args, evaluates=training_args.eval_strategy != "no")
    alignment = None
    if script_args.alignment_dataset_name is not None:
        alignment = load_rows(
            script_args.alignment_dataset_name,
            script_args.alignment_dataset_split,
            script_args.alignment_dataset_config,
        )
    protect = script_args.protect if isinstance(script_args.protect, dict) else {}
    trainer = trainer_class(
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        alignment_dataset=alignment,
        protect={name: load_rows(place) for name, place in protect.items()},
        **model_arguments(training_args, model_args),
        **trainer_options,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if trainer.statistics is not None:
        report = trainer.drift_report()
        trainer.accelerator.print(report.summary())
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in {constants.ENDPOINT}/{trainer.hub_model_id}.")
    if Version(transformers.__version__) >= Version("5.18.0"):  # before there is no `end`; TRL's scripts ask alike
        trainer.end()


def load_training_rows(
    script_args: AGLScriptArguments,
    dataset_args: DatasetMixtureConfig,
    embedded_rows: Callable[[str, Split], Dataset],
) -> DatasetDict | IterableDatasetDict:
    """
    Training rows by split: a mixture, a dataset on the Hub, a local file (which has the one split `train`), or a task of
    the embedded world, named by `dataset_config`.

    Raises:
        `ValueError`: If nothing is named, or it can't be read.
    """
    name = script_args.dataset_name
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if name is None:
        raise ValueError("No training rows: set `dataset_name`, or `datasets` in the YAML file.")
    if name == MINIWORLD:
        task = script_args.dataset_config or "extract"
        return DatasetDict(train=embedded_rows(task, "train"), test=embedded_rows(task, "test"))
    if is_file(name):
        return DatasetDict(train=load_rows(name))
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def splits_of(
    dataset: DatasetDict | IterableDatasetDict, script_args: AGLScriptArguments, *, evaluates: bool
) -> tuple[Any, Any]:
    """
    Rows to train on, and those to evaluate on where the run does.

    Raises:
        `ValueError`: If a split that is named is not there.
    """
    named = {"dataset_train_split": script_args.dataset_train_split}
    if evaluates:
        named["dataset_test_split"] = script_args.dataset_test_split
    for option, split in named.items():
        if split not in dataset:
            raise ValueError(
                f"The training rows have no split '{split}': set `{option}` to one of {', '.join(map(str, dataset))}"
                + (", or `eval_strategy` to 'no'." if option == "dataset_test_split" else ".")
            )
    return dataset[script_args.dataset_train_split], dataset[script_args.dataset_test_split] if evaluates else None


def model_arguments(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """Model, adapter and quantisation as the trainers take them."""
    if not model_args.model_name_or_path:
        raise ValueError("No model: set `model_name_or_path`.")
    peft: dict[str, PeftConfig | None] = dict(peft_config=get_peft_config(model_args))
    if model_args.model_name_or_path == MINIWORLD:
        from ..miniworld import load_model, load_tokenizer

        return dict(model=load_model(), processing_class=load_tokenizer(), **peft)
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    ) | (training_args.model_init_kwargs or {})
    return dict(model=model_args.model_name_or_path, quantization_config=get_quantization_config(model_args), **peft)
