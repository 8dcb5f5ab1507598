"""
GRPO with AGL, as TRL's own script:

    accelerate launch examples/grpo.py --config examples/configs/miniworld_grpo.yaml
"""

from agl_trl.scripts.grpo import main, make_parser
from agl_trl.scripts.training import parse


if __name__ == "__main__":
    main(*parse(make_parser()))
