"""What base and tuned model did, in a few readable lines."""

from math import isnan

from .behaviour import Behaviour
from .served import UNSEEN, served_facts
from .verdict_counts import verdict_notes


def behaviour_lines(behaviour: Behaviour) -> list[str]:
    """Refusals before and after with interval and paired test, uncertain verdicts, refusal margin, hidden states."""
    lines = []
    for unsafe, label in ((True, "refuses unsafe"), (False, "refuses safe")):
        if (behaviour.unsafe == unsafe).any():
            base, tuned = (behaviour.refusal(side, unsafe) for side in (False, True))
            low, high = tuned.interval
            lines.append(
                f"{label:<21} {base.value:.1%} before, {tuned.value:.1%} after (95 % interval {low:.1%} to {high:.1%}, "
                f"{tuned.total} prompts, paired p {behaviour.paired_p_value(unsafe):.2g})"
                + ("" if behaviour.served else f"; KL {behaviour.mean_kl(unsafe):.3f} nats per token")
            )
    if behaviour.num_unasked:
        lines.append(
            f"stopped               {behaviour.num_unasked} more prompts were not asked, since the verdict was certain without them"
        )
    if sentence := behaviour.metadata.get("tokenizer_set_aside"):
        lines.append(f"asked                 {sentence}")
    lines += verdict_notes(behaviour.metadata, len(behaviour.categories))
    if behaviour.served is not None:
        return [
            *lines,
            *(f"{name:<21} {told}" for name, told in served_facts(behaviour.served)),
            f"not measured          {UNSEEN}",
        ]
    chosen = behaviour.unsafe
    margins = [margin[chosen].mean().item() for margin in (behaviour.margin_base, behaviour.margin_tuned)]
    if chosen.any() and not isnan(margins[0]):
        lines.append(f"refusal margin        {margins[0]:+.2f} before, {margins[1]:+.2f} after (nats, unsafe prompts)")
    deepest = int(behaviour.hidden_drift.argmax())
    lines.append(
        f"hidden states         moved most after layer {deepest}: 1 - cos {behaviour.hidden_drift[deepest].item():.3f}"
    )
    return lines
