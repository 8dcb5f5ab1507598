"""What a trainer saves and pushes: adapter, evidence and card, always of one and the same step."""

import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from ..artifacts.files import TAG
from ..artifacts.upload import FAILURES, PushError, reason
from ..drift.report import DriftReport
from ..fisher.statistics import FisherStatistics
from ..hub.model_card import declared_license, write_card
from ..hub.push import files_to_push, push_folder, stage
from .callback import AlignGuardCallback
from .evidence import save_evidence


logger = get_logger(__name__)

if TYPE_CHECKING:  # for the type checker the mixin extends the trainer it is mixed into
    from trl import SFTTrainer as _Parent
else:
    _Parent = object


class SavingMixin(_Parent):
    """
    The saving and pushing half of the AGL trainers. While `statistics` is `None` (AGL is off, or training has not started)
    every method is the parent's.
    """

    args: Any  # a trainer's arguments with those of [`AlignGuardConfig`]
    align_guard: AlignGuardCallback | None
    _reference_adapter: ClassVar[str | None] = None  # an adapter that is never saved
    _pushes: list[tuple[Path, Future]]  # pushes in the background with the folders they read

    if TYPE_CHECKING:  # of the training half

        def drift_report(self) -> DriftReport: ...

        @property
        def statistics(self) -> FisherStatistics | None: ...

        @property
        def _step_of_weights(self) -> int: ...

    def _start_pushing(self) -> None:
        self._pushes = []
        self._hub = (
            HfApi()
        )  # runs pushes one after the other in the background: commits arrive in the order of the saves

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.statistics is None:
            super().save_model(output_dir, _internal_call)
            return
        # The adapter first, because the report carries its hash; then the push that the parent would have done.
        super().save_model(output_dir, _internal_call=True)
        report = self.drift_report()  # on every process: FSDP gathers the adapter
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if self._reference_adapter is not None:  # the frozen copy that TRL trains against
                shutil.rmtree(folder / self._reference_adapter, ignore_errors=True)
            assert self.align_guard is not None and self.statistics is not None
            guard = self.align_guard
            save_evidence(folder, self.statistics, guard.references, report, guard.layers)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token = self.args.hub_token
        if self.args.agl_enabled:
            self.args.hub_token = None  # the parent pickles the arguments, and pushes the file
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        if self.statistics is None:
            super().create_model_card(model_name, dataset_name, tags)
            return
        path = Path(self.args.output_dir) / "README.md"
        license = declared_license(path) if self.is_world_process_zero() else None  # the parent writes a new card
        tags = {tags} if isinstance(tags, str) else set(tags or ())
        super().create_model_card(model_name, dataset_name, sorted(tags | {TAG}))
        # A push asks for the card on one process alone, right after the save that left its report.
        report = None if self.align_guard is None else self.align_guard.report
        if report is None or report.global_step != self._step_of_weights:
            report = self.drift_report()
        if self.is_world_process_zero():
            name = model_name or Path(self.args.output_dir).name
            write_card(
                path,
                name,
                report,
                repo_id=self.hub_model_id,
                statistics_published=self.args.push_fisher,
                references_published=self.args.push_fisher and self.args.push_reference_answers,
                license=license,
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if private is not None:
            self.args.hub_private_repo = private  # where every transformers looks; before 5.23 there is no argument
        if not self.args.agl_enabled:
            super().init_hf_repo(token)
            return
        try:
            super().init_hf_repo(token)
        except FAILURES as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).name
            raise PushError(f"Can't create the repo '{name}' to push to: {reason(error)}.") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Push adapter, evidence and card in one commit; arguments as in [`~transformers.Trainer.push_to_hub`].

        Raises:
            [`PushError`]: With the command that repeats the push; all files stay on disk.
        """
        if private is not None:
            self.args.hub_private_repo = private
        if self.statistics is None:
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else tags
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=name, tags=[*tags, *(self.model.model_tags or [])], **kwargs)
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        files = files_to_push(folder, **self._evidence)
        job = self._start_push(folder, files, commit_message, token, revision or self.args.hub_revision)
        if not blocking:
            self._pushes.append((folder, job))
            return job
        try:
            return job.result()
        except FAILURES as error:
            raise PushError(f"{error} {self._retry(folder)}") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.statistics is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        args, checkpoint = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        ahead = [job for _, job in self._pushes if not job.done()]
        if ahead and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output_dir = Path(args.output_dir)
        self.processing_class.save_pretrained(output_dir)
        # The parent uploads the live output folder, which the next save may change underway; this copy stays as it is.
        copy = output_dir / f"_push-{self.state.global_step}"
        shutil.rmtree(copy, ignore_errors=True)
        subfolders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        stage(output_dir, checkpoint, copy, subfolders.get(args.hub_strategy), **self._evidence)
        by_step = args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        files = files_to_push(copy, **self._evidence, checkpoints=True)
        job = self._start_push(copy, files, f"Training in progress, {progress}", args.hub_token, args.hub_revision)
        job.add_done_callback(partial(_remove_copy, copy))
        self._pushes.append((copy, job))
        self.push_in_progress = PushInProgress([*ahead, job])

    @property
    def _evidence(self) -> dict[str, bool]:
        """Which evidence goes up, as in [`files_to_push`]."""
        return dict(push_fisher=self.args.push_fisher, push_reference_answers=self.args.push_reference_answers)

    def _start_push(self, folder: Path, files: list[str], message: str | None, token, revision) -> Future[CommitInfo]:
        return self._hub.run_as_future(
            push_folder,
            folder,
            self.hub_model_id,
            message=message or "Push",
            files=files,
            token=token or self.args.hub_token,
            revision=revision,
        )

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        pending = []
        for folder, job in self._pushes:
            if not job.done():
                pending.append((folder, job))
            elif error := job.exception():
                logger.error(f"{error} {self._retry(folder)}")
        self._pushes = pending

    def _retry(self, folder: Path) -> str:
        options = [] if self.args.push_fisher else ["--no-fisher"]
        if self.args.push_fisher and not self.args.push_reference_answers:
            options.append("--no-reference-answers")
        if folder.name.startswith("_push-"):
            options.append("--checkpoints")
        if self.args.hub_revision:
            options.append(f"--revision {self.args.hub_revision}")
        command = " ".join(["agl-trl push", str(folder), str(self.hub_model_id), *options])
        return f"Nothing on disk was lost; to repeat it: `{command}`"


def _remove_copy(folder: Path, job: Future) -> None:
    if job.exception() is None:  # what did not arrive is kept, for the command that repeats it
        shutil.rmtree(folder, ignore_errors=True)
