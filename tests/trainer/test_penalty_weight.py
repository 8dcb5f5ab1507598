"""The penalty weighs what was asked for, whatever the accumulation, the trainer, and the checkpointing: one process."""

import pytest

from tests.helpers.penalty_weight import measured_weights


CASES = [
    (kind, accumulation, checkpointing)
    for kind in ("sft", "dpo")
    for accumulation in (1, 2, 4)
    for checkpointing in (False, True)
]
STEPS = {1: 5, 2: 3, 4: 2}  # the last window of 2 and of 4 is incomplete


@pytest.mark.parametrize(("kind", "accumulation", "checkpointing"), CASES)
def test_weight_in_one_process(kind, accumulation, checkpointing, tmp_path, tokenizer):
    weights, distance, _ = measured_weights(
        kind,
        tmp_path,
        tokenizer,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    assert len(weights) == STEPS[accumulation]
    assert weights == pytest.approx([1.0] * len(weights), rel=1e-4) and distance < 1e-3
