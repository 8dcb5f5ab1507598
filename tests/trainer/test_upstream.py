"""Where our trainers lean on methods that TRL and transformers keep to themselves: their names, arguments and places."""

import inspect

import pytest
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

from agl_trl.trainer.base import AlignGuardMixin
from agl_trl.trainer.saving import SavingMixin


# What ours override, and the arguments that theirs are called with, in their order.
OVERRIDDEN = {
    "_finish_current_push": [],
    "_load_best_model": [],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_save": ["output_dir", "state_dict"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "init_hf_repo": ["token"],
    "push_to_hub": ["commit_message", "blocking", "token", "revision"],
    "save_model": ["output_dir", "_internal_call"],
}
TRAINERS = [SFTTrainer, DPOTrainer, GRPOTrainer, KTOTrainer]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_there_with_its_arguments(trainer, name):
    takes = [p.name for p in inspect.signature(getattr(trainer, name)).parameters.values() if p.kind != p.VAR_KEYWORD]
    assert takes[1 : len(OVERRIDDEN[name]) + 1] == OVERRIDDEN[name]


def test_nothing_else_of_theirs_is_overridden():
    # Our own names, which no trainer of theirs may take one day.
    own = {
        name
        for mixin in (AlignGuardMixin, SavingMixin)
        for name in vars(mixin)
        if not name.startswith("__") and name not in OVERRIDDEN
    }
    for trainer in TRAINERS:
        assert not [name for name in sorted(own) if hasattr(trainer, name)]


def test_steps_come_after_clipping_and_saves_after_their_push():
    loop = inspect.getsource(Trainer)
    assert loop.index("clip_grad_norm") < loop.index("callback_handler.on_pre_optimizer_step")
    assert loop.index("callback_handler.on_pre_optimizer_step") < loop.index("callback_handler.on_optimizer_step")
    assert "on_push_begin" in vars(CallbackHandler)
