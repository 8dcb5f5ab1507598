"""Writing to the Hub: an artifact in one commit, as `push_to_hub` of transformers does, and a sentence for every way to fail."""

import tempfile
from abc import ABC, abstractmethod
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from .files import FOLDER, first_line, sha256
from .http_client import httpx


_REASONS = {
    401: "the Hub does not accept the token: log in with `hf auth login`",
    402: "the Hub asks for a paid plan for this",
    403: "this account may not write there",
    404: "there is no such repo or revision, or this account can't see it",
    409: "another commit to the repo was in progress",
    412: "another commit arrived in between",
    429: "the Hub limits the rate of requests: wait some minutes",
}


class PushError(OSError):
    """
    A push that did not happen; the message says why. Local files are as they were.

    Args:
        message (`str`):
            One sentence.
        status (`int`, *optional*):
            HTTP status with which the Hub refused, where it answered at all.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status

    @classmethod
    def because(cls, what: str, error: Exception) -> Self:
        """The sentence for what could not be done, and the error of the Hub's client that says why."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        return cls(f"{what}: {reason(error)}.", status)


def reason(error: Exception) -> str:
    """Why the Hub's client failed, in words that never quote a request (it could hold a token)."""
    if isinstance(error, RepositoryNotFoundError):
        return _REASONS[401 if error.response.status_code == 401 else 404]
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _REASONS.get(status, f"the Hub answered with status {status}")
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, httpx.HTTPError | ConnectionError):
        return f"the Hub could not be reached or dropped the connection ({type(error).__name__})"
    return first_line(error)


FAILURES = (HfHubHTTPError, HFValidationError, httpx.HTTPError, ValueError, OSError)


def create_repo(repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **space: object) -> str:
    """
    Make sure that a repo is there. Returns its full id.

    Raises:
        [`PushError`]: If it can't be created.
    """
    try:
        return HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True, **space).repo_id  # type: ignore[arg-type]
    except FAILURES as error:
        raise PushError.because(f"Can't create '{repo_id}'", error) from error


class PushToHubMixin(ABC):
    """`push_to_hub` for what has `save_pretrained`, with the arguments that it has in transformers."""

    # Files in `agl/` that tell of the file which a push replaces, and leave with it.
    _told_by: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def save_pretrained(self, save_directory: str | PathLike) -> Path:
        """Write the file into a folder. Returns its path."""

    def _check_repo(self, sha256_there: dict[str, str]) -> None:  # noqa: B027 (most belong beside anything)
        """Raise a [`PushError`] if this does not belong beside the files of a repo, of which the large ones have hashes."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """
        Upload what `save_pretrained` writes to a repo on the Hub, in one commit, as in
        [`~transformers.utils.PushToHubMixin.push_to_hub`]. What an earlier push left in the repo about the replaced file is removed
        in the same commit. The card of the repo stays as it is.

        Args:
            repo_id (`str`):
                Repo, which is made where it is missing; without an owner, one of the account that is logged in.
            commit_message (`str`, *optional*):
                Title of the commit; by default `"Upload"` and the name of the class.
            commit_description (`str`, *optional*):
                Its description.
            private (`bool`, *optional*):
                Whether a repo that has to be made is private.
            token (`str` or `bool`, *optional*):
                Token; by default that of `HF_TOKEN`, or the one that is logged in.
            revision (`str`, *optional*):
                Branch, which is made where it is missing.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request.

        Returns:
            `CommitInfo`: The commit, with its `commit_url` and, of a pull request, `pr_url`.

        Raises:
            [`PushError`]: One sentence for every way to fail, with the repo left as it was.

        Example:

        ```python
        statistics = FisherStatistics.from_pretrained("path/to/statistics")
        statistics.push_to_hub("user/model-agl-fisher", private=True)
        ```
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self.save_pretrained(folder)
            name = path.relative_to(folder).as_posix()
            repo_id = create_repo(repo_id, private=private, token=token)
            api = HfApi(token=token)
            try:
                if revision is not None and not revision.startswith("refs/pr/"):
                    _make_branch(api, repo_id, revision, create_pr=create_pr)
                info = api.model_info(repo_id, revision=revision, files_metadata=True)
                there = {file.rfilename: file.lfs.sha256 if file.lfs else "" for file in info.siblings or ()}
                self._check_repo(there)
                told = (f"{FOLDER}/{file}" for file in self._told_by) if there.get(name) != sha256(path) else ()
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)]
                    + [CommitOperationDelete(path_in_repo=file) for file in told if file in there],
                    commit_message=commit_message or f"Upload {type(self).__name__}",
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=info.sha,  # what was checked is what this is put upon
                )
            except PushError:
                raise
            except FAILURES as error:
                raise PushError.because(f"Can't push '{name}' to '{repo_id}'", error) from error


def _make_branch(api: HfApi, repo_id: str, branch: str, *, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        if not (create_pr and error.response.status_code == 403):  # who may open a pull request may not make branches
            raise
