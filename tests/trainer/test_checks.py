"""What AGL refuses before a run, with the reason; accelerate's own plugin objects, without starting their engines."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig

from agl_trl import AGLSFTConfig
from agl_trl.trainer.checks import check_engine


def state(fsdp=None, deepspeed=None, parallel=None):
    kind = DistributedType.NO if fsdp is None else DistributedType.FSDP
    return SimpleNamespace(
        deepspeed_plugin=deepspeed, fsdp_plugin=fsdp, parallelism_config=parallel, distributed_type=kind
    )


def fsdp(version, kind="FULL_STATE_DICT"):
    return FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=kind)


CASES = {
    "fsdp1": (dict(fsdp=fsdp(1)), {}, "FSDP1 flattens the adapter"),
    "sharded": (dict(fsdp=fsdp(2, "SHARDED_STATE_DICT")), {}, "Sharded checkpoints hold no adapter file"),
    "zero3": (dict(deepspeed=SimpleNamespace(zero_stage=3)), {}, "Under DeepSpeed ZeRO-3 no process holds"),
    "zero2 budget": (
        dict(deepspeed=SimpleNamespace(zero_stage=2)),
        dict(drift_budget=1e-3),
        "which `drift_budget` can't scale back",
    ),
    "tensor parallel": (dict(parallel=ParallelismConfig(tp_size=2)), {}, "AGL runs on data parallelism alone"),
}


@pytest.mark.parametrize("name", CASES)
def test_engines_that_are_refused(name, tmp_path):
    engine, options, sentence = CASES[name]
    args = AGLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **dict(gradient_checkpointing=False) | options)
    with pytest.raises(ValueError, match=sentence):
        check_engine(args, args, state(**engine))


def test_engines_that_are_supported(tmp_path):
    args = AGLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, alignment_coef=3.0, gradient_checkpointing=True)
    check_engine(args, args, state())
    check_engine(args, args, state(fsdp=fsdp(2)))
    check_engine(args, args, state(deepspeed=SimpleNamespace(zero_stage=2)))
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True))
    reentrant = AGLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    check_engine(
        reentrant, reentrant, state()
    )  # the penalty does not go through the model, and the anchor does in eval mode
