"""From data to HTML: Jinja templates of this folder, which escape whatever is put into them."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


_TEMPLATES = Environment(
    loader=PackageLoader("agl_trl.space"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,  # they are drawn after every token, and don't change while the app runs
)


def render(template: str, **values: Any) -> str:
    """
    HTML of a template with these values.

    Args:
        template (`str`): Its name without `.html.jinja`.
        values (`Any`): What it shows.

    Raises:
        `jinja2.UndefinedError`: If it uses a value that is missing.
    """
    return _TEMPLATES.get_template(f"{template}.html.jinja").render(values)
