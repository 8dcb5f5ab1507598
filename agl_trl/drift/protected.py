"""What a report says of the behaviours that a run was to keep, in words."""

from collections.abc import Mapping
from typing import Any


KINDS = {"refuse": "to refuse", "comply": "to answer"}  # of alignment rows, in words


def protected_lines(protected: Mapping[str, Any]) -> list[str]:
    """
    Lines of a summary.

    Args:
        protected (`Mapping`):
            What was held by its KL: `metadata["protected"]` of a report.
    """
    lines = []
    for name, kept in protected["behaviours"].items():
        limit = "no budget" if kept.get("budget") is None else f"budget {kept['budget']:g}"
        if kept.get("kl") is None:
            lines.append(f"KL, protected rows    not measured ({name}, {limit})")
            continue
        parts = [f"{KINDS.get(kind, kind)} {kl:.2e}" for kind, kl in kept.get("kinds", {}).items()]
        if kept.get("kl_first_tokens") is not None:
            parts.append(f"first five tokens {kept['kl_first_tokens']:.2e}")
        lines.append(
            f"KL, protected rows    {kept['kl']:.2e} nats per answer token, {limit}  ({name}, {kept['rows']} rows)"
        )
        lines += [f"  of these            {', '.join(parts)}"] if parts else []
    scale = protected.get("scale")
    if scale is not None and scale < 1:
        lines.append(f"shrunk at the end     to {scale:.3f} of the update, to hold the budget")
    if broken := over_budget(protected):
        lines.append(f"NOT held              {', '.join(broken)}: what was trained beside LoRA exceeds it by itself")
    return lines


def over_budget(protected: Mapping[str, Any]) -> list[str]:
    """Names of the behaviours whose measured KL exceeds its budget."""
    return [
        name
        for name, kept in protected["behaviours"].items()
        if kept.get("kl") is not None and kept.get("budget") is not None and kept["kl"] > kept["budget"]
    ]
