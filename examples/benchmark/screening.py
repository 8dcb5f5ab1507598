"""
Similarity screening (after He et al., arXiv 2404.01099): training rows whose representations lie closest to harmful requests are
dropped before training; the rest is trained on as always.

    s_i = cos(h_i − m, u − c)      with u, c the mean states of unsafe requests and of look-alikes, m = (u + c) / 2

The share of the rows with the largest s_i goes.

Faithful: selection by cosine in the representations of the model that is to be tuned. Inferred: the state at the end of the
prompt in the middle layer, where unsafe requests and look-alikes come apart (there are no given harmful answers to compare with);
unsafe requests against look-alikes instead of harmful against safe conversations; the share, 15 %.
"""

from collections.abc import Callable

from torch import Tensor
from trl import SFTTrainer

from agl_trl.data.alignment import tokenize_rows
from agl_trl.miniworld import load_model

from .representations import middle, prompt_states, protected_states, similarity
from .setting import Setting, build, common


def kept_rows(scores: Tensor, share: float) -> list[int]:
    """Numbers of the rows that stay, in their order, where this share with the largest scores goes."""
    kept = len(scores) - round(share * len(scores))
    return sorted(scores.argsort(stable=True)[:kept].tolist())


def screening(share: float = 0.15) -> Callable[[Setting], SFTTrainer]:
    """With the share of the rows that goes."""

    def make(setting: Setting) -> SFTTrainer:
        model = load_model()
        unsafe, safe = map(middle, protected_states(model, setting.tokenizer, setting.seed))
        states = middle(prompt_states(model, setting.tokenizer, tokenize_rows(setting.train, setting.tokenizer)))
        train = setting.train.select(kept_rows(similarity(states, unsafe, safe), share))
        trainer_class, config_class = setting.plain
        return build(trainer_class, config_class(**common(setting)), setting, train_dataset=train)

    return make
