"""
AGL for ms-swift: `swift sft --external_plugins ms_swift_plugin.py --callbacks alignguard ...`. Settings are those of
`AlignGuardConfig`, and the rows any that it takes: change them here.
"""

from swift.callbacks import callbacks_map

from agl_trl import AlignGuardCallback, AlignGuardConfig
from agl_trl.miniworld import alignment_dataset


def alignguard(args, trainer) -> AlignGuardCallback:
    return AlignGuardCallback(
        AlignGuardConfig(kl_budget=0.02),
        alignment_dataset=alignment_dataset(),  # your own rows, such as `load_dataset("json", data_files=..., split="train")`
        processing_class=trainer.template.tokenizer,
    )


callbacks_map["alignguard"] = alignguard
