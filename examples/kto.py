# /// script
# requires-python = ">=3.11"
# dependencies = ["agl-trl"]
#
# [tool.uv.sources]
# agl-trl = { path = "..", editable = true }
# ///
"""
KTO with AGL, as TRL's own script:

    accelerate launch examples/kto.py --config examples/configs/miniworld_kto.yaml
    uv run examples/kto.py --config examples/configs/miniworld_kto.yaml  # in an environment that uv makes
"""

from agl_trl.scripts.kto import main, make_parser
from agl_trl.scripts.training import parse


if __name__ == "__main__":
    main(*parse(make_parser()))
