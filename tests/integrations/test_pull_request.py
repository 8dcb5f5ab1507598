"""The comment on a pull request, over HTTP: one for each name, rewritten by later runs, and a warning where it can't be made."""

import pytest

from agl_trl.integrations.pull_request import LONGEST, CommentError, comment
from tests.helpers.github_server import GitHub, serving


@pytest.fixture
def github():
    with serving() as server:
        yield server


def say(github: GitHub, body: str, name: str = "drift-report", **changed: str) -> str:
    where = dict(api=github.url, repository="me/model", token=github.token)
    return comment(body, 12, name=name, **where | changed)


def test_later_runs_rewrite_their_own_comment_alone(github):
    github.add("<!-- agl-trl: drift-report -->\na person who quotes it", kind="User")
    for n in range(120):  # more than one page
        github.add(None if n == 3 else f"comment {n}")
    address = say(github, "first")
    other = say(github, "of another job", name="drift-of-chat")
    assert say(github, "second") == address != other
    assert [c["body"].partition("\n")[2] for c in github.comments[-2:]] == ["second", "of another job"]
    assert len(github.comments) == 123 and github.comments[0]["body"].endswith("a person who quotes it")


def test_a_users_token_rewrites_its_own_comment_alone(github):
    github.login = "me"
    quoted = github.add("<!-- agl-trl: drift-report -->\na person who quotes it", kind="User", login="somebody")
    assert say(github, "first") == say(github, "second")
    assert len(github.comments) == 2 and quoted["body"].endswith("quotes it")
    assert github.comments[1]["body"].endswith("\nsecond")


def test_a_long_comment_is_cut(github):
    say(github, "x" * 2 * LONGEST)
    assert LONGEST < len(github.comments[0]["body"]) < 65_536


@pytest.mark.parametrize("status", [403, 404])
def test_no_permission_is_told(github, status):
    github.status = status
    with pytest.raises(
        CommentError, match=rf"may not comment \(status {status}\): give its job `pull-requests: write`"
    ):
        say(github, "text")


def test_no_token_is_in_a_message(github):
    with pytest.raises(CommentError) as refused:
        say(github, "text", token="another-token")
    with pytest.raises(CommentError) as gone:
        say(github, "text", api="http://127.0.0.1:9", token="another-token")
    github.status = 500
    with pytest.raises(CommentError, match="status 500"):
        say(github, "text")
    assert "could not be asked (ConnectError)" in str(gone.value)
    assert all("another-token" not in str(error.value) for error in (refused, gone))
