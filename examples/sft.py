# /// script
# requires-python = ">=3.11"
# dependencies = ["agl-trl"]
#
# [tool.uv.sources]
# agl-trl = { path = "..", editable = true }
# ///
"""
SFT with AGL, as TRL's own script:

    accelerate launch examples/sft.py --config examples/configs/miniworld_sft.yaml
    uv run examples/sft.py --config examples/configs/miniworld_sft.yaml  # in an environment that uv makes
"""

from agl_trl.scripts.sft import main, make_parser
from agl_trl.scripts.training import parse


if __name__ == "__main__":
    main(*parse(make_parser()))
