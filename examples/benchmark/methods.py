"""
The methods that are compared: what each changes in an otherwise equal run, and what data it needs. A family has three strengths where
its method has one to choose; of strengths that the source does not say, those around the inferred one.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from peft import PeftModel
from trl import SFTTrainer

from agl_trl.miniworld import TASKS

from .alphasteer import alphasteer
from .asft import asft
from .baselines import agl, calibrated, ewc, kl, kl_budget, l2, plain, replay
from .guardspace import guardspace
from .ideas import agl_surgery, layer_importance, proximal, pseudo_replay
from .kl_sft import kl_sft
from .lapt import lapt
from .lookahead import lookahead, real, virtual
from .lox import lox
from .orthogonal import oft, osf
from .projection import ogpsa_projection, spf_projection
from .safe_lora import safe_lora
from .safegrad import safegrad
from .salora import salora
from .scans import scans
from .screening import screening
from .setting import Setting
from .sot import sot
from .splora import splora
from .ssah import ssah
from .star_dss import star_dss


@dataclass(frozen=True)
class Method:
    """
    Args:
        make (`Callable`):
            Builds the trainer.
        family (`str`):
            Methods of one family lie on one curve.
        needs (`str`):
            What data the training run itself holds.
        preferences (`bool`, *optional*, defaults to `False`):
            Whether it can train on preferences too.
        prefixed (`bool`, *optional*, defaults to `False`):
            Whether it teaches to begin every answer with LookAhead's P, which the test then expects.
        steer (`Callable`, *optional*):
            Makes the context in which the trained model is evaluated: hooks that steer it at inference. By default nothing.
    """

    make: Callable[[Setting], SFTTrainer]
    family: str
    needs: str
    preferences: bool = False
    prefixed: bool = False
    steer: Callable[[PeftModel, Setting], AbstractContextManager[None]] = lambda model, setting: nullcontext()


ALL = dict(collision_coef=0.1, collision_rows=32)
NOTHING, STATISTICS, ROWS, PAIR = "nothing", "statistics", "safety rows", "aligned and base weights"
GUARD = "a judge of refusals"
PLAIN, DEFAULT = plain(), kl_budget()  # what is steered at inference shares its training with them
METHODS = {
    "lora": Method(PLAIN, "plain LoRA", NOTHING, preferences=True),
    "lora-lr-1e-3": Method(plain(learning_rate=1e-3), "plain LoRA", NOTHING),
    "lora-lr-5e-4": Method(plain(learning_rate=5e-4), "plain LoRA", NOTHING),
    "agl-0.3": Method(agl(alignment_coef=0.3), "AGL penalty", STATISTICS),
    "agl-1": Method(agl(alignment_coef=1.0), "AGL penalty", STATISTICS, preferences=True),
    "agl-3": Method(agl(alignment_coef=3.0), "AGL penalty", STATISTICS, preferences=True),
    "agl-10": Method(agl(alignment_coef=10.0), "AGL penalty", STATISTICS, preferences=True),
    "budget-1e-2": Method(agl(alignment_coef=0.0, drift_budget=1e-2), "AGL budget", STATISTICS, preferences=True),
    "budget-3e-3": Method(agl(alignment_coef=0.0, drift_budget=3e-3), "AGL budget", STATISTICS, preferences=True),
    "budget-1e-3": Method(agl(alignment_coef=0.0, drift_budget=1e-3), "AGL budget", STATISTICS, preferences=True),
    "budget-5e-3": Method(agl(alignment_coef=0.0, drift_budget=5e-3), "AGL budget", STATISTICS),
    "budget-3e-3-shrunk": Method(
        agl(alignment_coef=0.0, drift_budget=3e-3, fisher_shrinkage=0.1), "AGL budget, both sides", STATISTICS
    ),
    "budget-3e-3-anchor": Method(
        agl(alignment_coef=0.0, drift_budget=3e-3, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS
    ),
    "only-alignment": Method(agl(task_coef=0.0), "one term", STATISTICS),
    "only-task": Method(agl(alignment_coef=0.0, task_coef=3.0), "one term", STATISTICS),
    "only-overlap": Method(
        agl(alignment_coef=0.0, collision_coef=0.1, collision_alpha=1.0, collision_rows=32), "one term", STATISTICS
    ),
    "only-geodesic": Method(agl(alignment_coef=0.0, collision_coef=0.1, collision_alpha=0.0), "one term", STATISTICS),
    "all": Method(agl(**ALL), "all terms", STATISTICS),
    "all-but-alignment": Method(agl(alignment_coef=0.0, task_coef=3.0, **ALL), "all terms", STATISTICS),
    "all-but-task": Method(agl(task_coef=0.0, **ALL), "all terms", STATISTICS),
    "all-but-overlap": Method(agl(collision_coef=0.1, collision_alpha=0.0), "all terms", STATISTICS),
    "all-but-geodesic": Method(
        agl(collision_coef=0.1, collision_alpha=1.0, collision_rows=32), "all terms", STATISTICS
    ),
    "paper": Method(agl(variant="paper"), "as published", STATISTICS),
    "shrinkage-0.1": Method(agl(fisher_shrinkage=0.1), "AGL, both sides", STATISTICS),
    "l2-1": Method(l2(1.0), "L2", NOTHING),
    "l2-10": Method(l2(10.0), "L2", NOTHING),
    "ewc-1e2": Method(ewc(1e2), "EWC", STATISTICS),
    "ewc-1e4": Method(ewc(1e4), "EWC", STATISTICS),
    "ewc-1e3": Method(ewc(1e3), "EWC", STATISTICS),
    "anchor": Method(agl(alignment_coef=0.3, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS, preferences=True),
    "anchor-alone": Method(agl(alignment_coef=0.0, anchor_coef=1.0, anchor_every=2), "AGL anchor", ROWS),
    "importance-3": Method(layer_importance(3.0), "layer importance", STATISTICS),
    "proximal-10": Method(proximal(10.0), "proximal step", STATISTICS),
    "pseudo-replay": Method(
        pseudo_replay(alignment_coef=0.0, anchor_coef=1.0, anchor_every=2), "pseudo-replay", NOTHING
    ),
    "replay": Method(replay(), "replay", ROWS),
    "replay-1": Method(replay(1.0), "replay", ROWS),
    "replay-5": Method(replay(5.0), "replay", ROWS),
    "kl": Method(kl(), "KL", ROWS),
    "kl-0.3": Method(kl(0.3), "KL", ROWS),
    "kl-3": Method(kl(3.0), "KL", ROWS),
    "agl": Method(DEFAULT, "AGL", ROWS, preferences=True),
    "agl-kl-0.005": Method(kl_budget(0.005), "AGL", ROWS, preferences=True),
    "agl-kl-0.05": Method(kl_budget(0.05), "AGL", ROWS, preferences=True),
    "agl-own": Method(kl_budget(own=True), "AGL, own answers", ROWS),
    "agl-rows-8": Method(kl_budget(anchor_batch_size=8), "AGL, more rows a step", ROWS),
    "agl-rows-16": Method(kl_budget(anchor_batch_size=16), "AGL, more rows a step", ROWS),
    "agl-surgery": Method(agl_surgery(), "AGL with SafeGrad's surgery", ROWS),
    "agl-surgery-16": Method(agl_surgery(16), "AGL with SafeGrad's surgery", ROWS),
    "agl-radius4": Method(kl_budget(0.02, trust_radius=4.0), "AGL, twice the trust region", ROWS),
    "agl-no-region": Method(kl_budget(0.02, trust_radius=None), "AGL, anchor and projection, no trust region", ROWS),
    "agl-no-anchor": Method(kl_budget(0.02, anchor_coef=0.0), "AGL, trust region and projection", ROWS),
    "agl-statistics": Method(calibrated(0.02), "AGL, statistics alone", STATISTICS, preferences=True),
    "agl-statistics-0.005": Method(calibrated(0.005), "AGL, statistics alone", STATISTICS),
    "agl-statistics-0.05": Method(calibrated(0.05), "AGL, statistics alone", STATISTICS),
    "safe-lora": Method(safe_lora(), "Safe LoRA", PAIR),
    "safe-lora-7": Method(safe_lora(number=7), "Safe LoRA", PAIR),
    "safe-lora-14": Method(safe_lora(number=14), "Safe LoRA", PAIR),
    "safe-lora-exact": Method(safe_lora(energy=0.5), "Safe LoRA, exact", PAIR),
    "salora": Method(salora(), "SaLoRA", ROWS),
    "salora-8": Method(salora(safety_rank=8), "SaLoRA", ROWS),
    "salora-64": Method(salora(safety_rank=64), "SaLoRA", ROWS),
    "splora": Method(splora(), "SPLoRA", PAIR),
    "splora-5": Method(splora(number=5), "SPLoRA", PAIR),
    "splora-15": Method(splora(number=15), "SPLoRA", PAIR),
    "splora-cosine": Method(splora(score="cosine"), "SPLoRA, by cosine", PAIR),
    "lox": Method(lox(), "LoX", PAIR),
    "lox-full": Method(lox(rank=0, coef=1.0), "LoX", PAIR),
    "lox-0.5": Method(lox(coef=0.5), "LoX", PAIR),
    "asft": Method(asft(), "AsFT", PAIR),
    "asft-0.1": Method(asft(0.1), "AsFT", PAIR),
    "asft-0.01": Method(asft(0.01), "AsFT", PAIR),
    "spf": Method(spf_projection(), "SPF", ROWS, preferences=True),
    "spf-2": Method(spf_projection(k=2), "SPF", ROWS),
    "spf-4": Method(spf_projection(k=4), "SPF", ROWS, preferences=True),
    "ogpsa": Method(ogpsa_projection(), "OGPSA", ROWS, preferences=True),
    "ogpsa-5": Method(ogpsa_projection(every=5), "OGPSA", ROWS),
    "ogpsa-1": Method(ogpsa_projection(every=1), "OGPSA", ROWS),
    "lookahead-real": Method(lookahead(real), "LookAhead", NOTHING),
    "lookahead-real-2": Method(lookahead(partial(real, tokens=2)), "LookAhead", NOTHING),
    "lookahead-real-12": Method(lookahead(partial(real, tokens=12)), "LookAhead", NOTHING),
    "lookahead-virtual": Method(lookahead(virtual), "LookAhead, virtual", NOTHING, prefixed=True),
    # Training-time methods of the field since.
    "safegrad": Method(safegrad(), "SafeGrad", ROWS),
    "safegrad-1": Method(safegrad(1.0), "SafeGrad", ROWS),
    "safegrad-0.1": Method(safegrad(0.1), "SafeGrad", ROWS),
    "ssah-0.075": Method(ssah(0.075), "SSAH", ROWS),
    "ssah-0.3": Method(ssah(0.3), "SSAH", ROWS),
    "ssah-0.5": Method(ssah(0.5), "SSAH", ROWS),
    "kl-sft-0.1": Method(kl_sft(0.1), "KL on the task's rows", NOTHING),
    "kl-sft-1": Method(kl_sft(1.0), "KL on the task's rows", NOTHING),
    "kl-sft-0.3": Method(kl_sft(0.3), "KL on the task's rows", NOTHING),
    "dft-kl-0.1": Method(kl_sft(0.1, dft=True), "ASFT", NOTHING),
    "dft-kl-0.03": Method(kl_sft(0.03, dft=True), "ASFT", NOTHING),
    "dft-kl-0.01": Method(kl_sft(0.01, dft=True), "ASFT", NOTHING),
    "oft": Method(oft(), "OFT", NOTHING),
    "oft-4": Method(oft(4), "OFT", NOTHING),
    "oft-32": Method(oft(32), "OFT", NOTHING),
    "osf-0.5": Method(osf(0.5), "OSF", NOTHING),
    "osf-0.9": Method(osf(0.9), "OSF", NOTHING),
    "osf-0.75": Method(osf(0.75), "OSF", NOTHING),
    "guardspace-0.95": Method(guardspace(0.95), "GuardSpace", STATISTICS),
    "guardspace-0.8": Method(guardspace(0.8), "GuardSpace", STATISTICS),
    "guardspace-0.99": Method(guardspace(0.99), "GuardSpace", STATISTICS),
    # Methods on the data and at inference.
    "similarity": Method(screening(), "similarity screening", ROWS),
    "similarity-0.05": Method(screening(0.05), "similarity screening", ROWS),
    "similarity-0.3": Method(screening(0.3), "similarity screening", ROWS),
    "sot": Method(sot(), "SOT", ROWS),
    "sot-0.95": Method(sot(0.95), "SOT", ROWS),
    "sot-0.7": Method(sot(0.7), "SOT", ROWS),
    "replay-own": Method(replay(own=True), "replay, own answers", ROWS),
    "replay-own-1": Method(replay(1.0, own=True), "replay, own answers", ROWS),
    "replay-own-5": Method(replay(5.0, own=True), "replay, own answers", ROWS),
    "lora+scans": Method(PLAIN, "plain LoRA + SCANS", ROWS, preferences=True, steer=scans),
    "lora+scans-0.3": Method(PLAIN, "plain LoRA + SCANS", ROWS, preferences=True, steer=partial(scans, strength=0.3)),
    "lora+scans-3.0": Method(PLAIN, "plain LoRA + SCANS", ROWS, steer=partial(scans, strength=3.0)),
    "lora+alphasteer": Method(PLAIN, "plain LoRA + AlphaSteer", ROWS, preferences=True, steer=alphasteer),
    "lora+alphasteer-0.3": Method(
        PLAIN, "plain LoRA + AlphaSteer", ROWS, preferences=True, steer=partial(alphasteer, strength=0.3)
    ),
    "lora+alphasteer-3.0": Method(PLAIN, "plain LoRA + AlphaSteer", ROWS, steer=partial(alphasteer, strength=3.0)),
    "agl+scans": Method(DEFAULT, "AGL + SCANS", ROWS, preferences=True, steer=scans),
    "agl+alphasteer": Method(DEFAULT, "AGL + AlphaSteer", ROWS, preferences=True, steer=alphasteer),
    "lapt": Method(lapt(), "LAPT", ROWS),
    "lapt-0.03": Method(lapt(epsilon=0.03), "LAPT", ROWS),
    "lapt-0.3": Method(lapt(epsilon=0.3), "LAPT", ROWS),
    "star-dss-1": Method(star_dss(1.0), "STAR-DSS", PAIR),
    "star-dss-5": Method(star_dss(5.0), "STAR-DSS", PAIR),
    "star-dss-20": Method(star_dss(20.0), "STAR-DSS", PAIR),
    "star-dss-judged-1": Method(star_dss(1.0, judged=True), "STAR-DSS, judged", GUARD),
    "star-dss-judged-5": Method(star_dss(5.0, judged=True), "STAR-DSS, judged", GUARD),
    "star-dss-judged-20": Method(star_dss(20.0, judged=True), "STAR-DSS, judged", GUARD),
}
# On every protocol. Of a peer it is the strength that dominates most, in the mean over SWEPT with the first seed; of AGL the defaults. All
# others, strengths and ablations, run on SWEPT with the first seed.
CORE = ("lora", "agl", "agl-rows-16", "agl-statistics", "budget-3e-3")
CORE += (
    "ewc-1e4",
    "replay-1",
    "replay-own",
    "kl-3",
    "safe-lora-7",
    "salora-64",
    "splora",
    "lox",
    "asft",
    "spf-4",
    "ogpsa",
)
CORE += ("lookahead-real-12", "safegrad-1", "ssah-0.5", "kl-sft-0.3", "dft-kl-0.1", "oft", "osf-0.5", "guardspace-0.8")
CORE += (
    "similarity-0.05",
    "sot",
    "lapt-0.03",
    "star-dss-1",
    "star-dss-judged-20",
    "lora+scans-0.3",
    "lora+alphasteer-0.3",
)
SWEPT = ("steps", "hostile-10")
SEEDED = (*TASKS, "hostile-1", "hostile-10", "identity", "attack")  # with every seed; the others with the first
QUICK = ("lora", "agl", "budget-3e-3", "replay")


def wanted(method: str, protocol: str, seed: int) -> bool:
    """Whether the full comparison has a method on a protocol with a seed."""
    if seed == 0:
        return method in CORE or protocol in SWEPT
    return method in CORE and protocol in SEEDED


def made_alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Methods in groups that share one training and differ in how the model is steered at inference."""
    groups: dict[Callable, list[str]] = {}
    for name in names:
        groups.setdefault(METHODS[name].make, []).append(name)
    return [tuple(group) for group in groups.values()]
