"""What base and tuned model did, in a few readable lines."""

from collections.abc import Sequence
from math import isinf, isnan

from .abilities import Ability
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


def ability_lines(abilities: Sequence[Ability]) -> list[str]:
    """A line for every set: right answers before and after with interval and paired test, or likelihoods and their rise."""
    lines = []
    for one in abilities:
        missing = f"; {one.unmeasured} rows {one.why_unmeasured}" if one.unmeasured else ""
        if not one.total:
            lines.append(f"{one.name:<21} not measured{missing}")
        elif one.is_text:
            low, high = one.change.interval()
            span = f" (90 % interval {low:+.3f} to {high:+.3f}, {one.total} pieces of text)"
            span = "" if isinf(low) or isinf(high) else span
            lines.append(
                f"{one.name:<21} NLL {one.mean_nll(False):.3f} before, {one.mean_nll(True):.3f} after: "
                f"{one.change.value:+.3f} nats per token{span}{missing}"
            )
        else:
            base, tuned = (one.rate(side) for side in (False, True))
            low, high = tuned.interval
            raw = ""
            if one.raw_base is not None:
                before, after = (one.rate(side, raw=True) for side in (False, True))
                raw = f"; by likelihood without its length {before.value:.1%} and {after.value:.1%}"
            lines.append(
                f"{one.name:<21} {base.value:.1%} right before, {tuned.value:.1%} after (95 % interval {low:.1%} to {high:.1%}, "
                f"{one.total} rows, {one.lost} lost, {one.won} won, paired p {one.paired_p_value:.2g}){raw}{missing}"
            )
    return lines
