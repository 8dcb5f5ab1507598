"""`python -m agl_trl` is `agl-trl`."""

from .cli.app import main


main()
