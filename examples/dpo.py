# /// script
# requires-python = ">=3.11"
# dependencies = ["agl-trl"]
#
# [tool.uv.sources]
# agl-trl = { path = "..", editable = true }
# ///
"""
DPO with AGL, as TRL's own script:

    accelerate launch examples/dpo.py --config examples/configs/miniworld_dpo.yaml
    uv run examples/dpo.py --config examples/configs/miniworld_dpo.yaml  # in an environment that uv makes
"""

from agl_trl.scripts.dpo import main, make_parser
from agl_trl.scripts.training import parse


if __name__ == "__main__":
    main(*parse(make_parser()))
