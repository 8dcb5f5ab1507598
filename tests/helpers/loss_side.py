"""The former way to the same training: the penalty in the loss. The brute-force twin of what the callback adds."""

from trl import DPOTrainer, SFTTrainer

from agl_trl.trainer.config import AlignGuardConfig
from agl_trl.trainer.regularizer import Regularizer


class LossSideMixin:
    """
    Adds the terms to the loss of the micro-batch that synchronises, times what the trainer will divide it by for
    accumulation, and lets automatic differentiation and the trainer do the rest. Holds the budget after every step.
    """

    def regularize(self, layers, statistics, **options) -> None:
        config = AlignGuardConfig(**options)
        self.regularizer = Regularizer(
            config, layers, statistics, drift_budget=config.drift_budget, seed=self.args.seed
        )

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        self.optimizer.optimizer.register_step_post_hook(lambda *_: self.regularizer.hold())
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self.model.training and self.accelerator.sync_gradients):
            return loss
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        divisor = 1 if scaled else self.current_gradient_accumulation_steps
        step, anchor = self.state.global_step, self.anchor
        penalty = self.regularizer.terms(step)["penalty"]
        if anchor is not None and anchor.due(step):
            penalty = penalty + self.regularizer.config.anchor_coef * anchor.kl(self.model, "alignment", step)[0]
        return loss + penalty * divisor


class LossSideSFTTrainer(LossSideMixin, SFTTrainer):
    pass


class LossSideDPOTrainer(LossSideMixin, DPOTrainer):
    pass
