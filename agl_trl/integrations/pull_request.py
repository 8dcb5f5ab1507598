"""
What a workflow found, as a comment on its pull request: made once, and rewritten by every later run of the same name.

    python -m agl_trl.integrations.pull_request summary.md --number 12 --name drift-report

It speaks with GitHub's API, from within a workflow: `GITHUB_API_URL`, `GITHUB_REPOSITORY` and `GITHUB_TOKEN` say where and who.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifacts.http_client import httpx


PER_PAGE, LONGEST = 100, 65_000  # comments that GitHub tells at once, and characters that it takes of one


class CommentError(OSError):
    """A comment that could not be made; the message says why, and never the token."""


def comment(body: str, number: int, *, name: str, api: str, repository: str, token: str) -> str:
    """
    Make the comment, or rewrite the one that is there. Comments of other names and of people stay as they are.

    Args:
        body (`str`):
            Markdown.
        number (`int`):
            Number of the pull request.
        name (`str`):
            What tells this comment from others of the same workflow.
        api (`str`):
            Address of the API.
        repository (`str`):
            Owner and name.
        token (`str`):
            Token of the workflow, with `pull-requests: write`, or of a user: then the comment is that user's.

    Returns:
        `str`: address of the comment.

    Raises:
        [`CommentError`]: If GitHub doesn't take it, or does not answer.
    """
    mark = f"<!-- agl-trl: {name.replace('--', '- -')} -->"
    text = f"{mark}\n{body if len(body) <= LONGEST else body[:LONGEST] + '…'}"
    issues = f"{api.rstrip('/')}/repos/{repository}/issues"
    comments = f"{issues}/{number}/comments"
    login = _login(api, token)
    page, own = 1, None
    while own is None:
        there = _ask("GET", comments, token, params={"per_page": PER_PAGE, "page": page})
        own = next((one for one in there if _is_own(one, mark, login)), None)
        if len(there) < PER_PAGE:
            break
        page += 1
    if own is None:
        made = _ask("POST", comments, token, json={"body": text})
    else:
        made = _ask("PATCH", f"{issues}/comments/{own['id']}", token, json={"body": text})
    return str(made["html_url"])


def _login(api: str, token: str) -> str | None:
    """Whose the token is; a workflow's own may not ask for it, and writes as a bot."""
    try:
        return str(_ask("GET", f"{api.rstrip('/')}/user", token)["login"])
    except CommentError:
        return None


def _is_own(one: dict[str, Any], mark: str, login: str | None) -> bool:
    """Anybody can quote the mark; a bot, or the token's own user, that writes it at the start is a workflow."""
    user = one.get("user") or {}
    written = user.get("type") == "Bot" or (login is not None and user.get("login") == login)
    return written and (one.get("body") or "").startswith(mark)


def _ask(method: str, url: str, token: str, **request: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"}
    try:
        answer = httpx.request(method, url, headers=headers, timeout=30, **request)
        if answer.status_code in (401, 403, 404):
            raise CommentError(
                f"The workflow may not comment (status {answer.status_code}): give its job `pull-requests: write`. Of a pull request "
                "from a fork GitHub allows none."
            )
        if answer.status_code >= 300:
            raise CommentError(f"GitHub answered with status {answer.status_code}, so there is no comment.")
        return answer.json()
    except CommentError:
        raise
    except (httpx.HTTPError, ValueError) as error:
        raise CommentError(
            f"GitHub's API could not be asked ({type(error).__name__}), so there is no comment."
        ) from None


def main(
    file: Annotated[Path, typer.Argument(help="Markdown of the comment.")],
    number: Annotated[int, typer.Option(help="Number of the pull request.")],
    name: Annotated[str, typer.Option(help="Name that tells this comment from others.")] = "drift-report",
) -> None:
    """Comment; where that can't be done, warn: the verdict is what a workflow ends with."""
    try:
        url = comment(
            file.read_text(encoding="utf-8"),
            number,
            name=name,
            api=os.environ["GITHUB_API_URL"],
            repository=os.environ["GITHUB_REPOSITORY"],
            token=os.environ["GITHUB_TOKEN"],
        )
    except KeyError as error:
        typer.echo(f"::warning::{error.args[0]} is not set, so there is no comment.")
    except OSError as error:
        typer.echo(f"::warning::{error}")
    else:
        typer.echo(f"Comment: {url}")


if __name__ == "__main__":
    typer.run(main)
