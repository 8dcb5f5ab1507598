# /// script
# requires-python = ">=3.11"
# dependencies = ["agl-trl"]
#
# [tool.uv.sources]
# agl-trl = { path = "..", editable = true }
# ///
"""
GRPO with AGL, as TRL's own script:

    accelerate launch examples/grpo.py --config examples/configs/miniworld_grpo.yaml
    uv run examples/grpo.py --config examples/configs/miniworld_grpo.yaml  # in an environment that uv makes
"""

from agl_trl.scripts.grpo import main, make_parser
from agl_trl.scripts.training import parse


if __name__ == "__main__":
    main(*parse(make_parser()))
