"""`python -m agl_trl` is `agl-trl`."""

from .cli import main


main()
