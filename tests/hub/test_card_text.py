"""Text of cards: names of others that do nothing, templates that lack nothing, settings of reports old and new."""

from importlib.resources import files

import pytest
from jinja2 import UndefinedError

from agl_trl.hub.card_text import plain, render


def test_names_of_others_are_shown_and_do_nothing():
    assert plain("illegal_goods") == "illegal_goods" and plain("a\u202eb\x00c") == "abc"
    assert plain("a|b [l](http://x) <b>") == r"a\|b \[l\](http://x) &lt;b&gt;"


def test_a_missing_value_is_an_error_and_templates_are_in_the_package():
    with pytest.raises(UndefinedError):
        render("statistics.md.jinja", name="n")
    for name in ("adapter", "citation", "evidence", "statistics"):
        assert files("agl_trl.model_cards").joinpath(f"{name}.md.jinja").is_file()
