"""Which passes of the plan are computed, reused or reconstructed: the rules behind --step-cache and --cfg-cache.

A step that is reused adds the block stack's last residual, its output less its input, to the new tokens, and runs the head
alone. All rules are known before the loop: none reads a latent.

TeaCache (arXiv 2411.19108) adds up a polynomial of the relative L1 distance between the time embeddings of neighbouring steps,
and computes again when the sum reaches a threshold. MagCache (arXiv 2506.09045) multiplies measured ratios of the residuals'
magnitudes, and adds up how far the product is from 1. Reconstruction from the difference of the two passes: arXiv 2312.12487,
in two frequency bands arXiv 2410.19355; CFG-Zero*: arXiv 2503.18886. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

from wan_fast.caches import CfgCache, StepCache
from wan_fast.calibration import BRANCHES, Calibration
from wan_fast.errors import WanFastError
from wan_fast.steps import Step

# steps computed first by TeaCache on the embedding, and on its projection ("ret")
WARM_UP = {"embedding": 1, "projection": 5}
SIGNALS = {"teacache": "embedding", "teacache-ret": "projection"}
# magcache: what is tried, in this order, to reach a share of steps
MAX_SKIPS = (2, 3, 4, 6, 9)
# up to which number of steps every one changes too much to be reused
FEW_STEPS = 8


class Rule(Protocol):
    """Decides for one branch, step by step."""

    def reuse(self, index: int) -> bool:
        """Whether this step may take the last residual."""
        ...

    def computed(self) -> None:
        """The step is computed: the residual is new."""
        ...


@dataclass
class TeaCache:
    """`changes`: by step, the polynomial of the distance to the step before."""

    changes: Sequence[float]
    threshold: float
    warm_up: int
    total: float = 0.0

    def reuse(self, index: int) -> bool:
        if index < self.warm_up:
            return False
        self.total += self.changes[index]
        return self.total < self.threshold

    def computed(self) -> None:
        self.total = 0.0


@dataclass
class MagCache:
    """`ratios`: by step, of the residual's magnitude to that of the step before; `kept`: steps that are computed."""

    ratios: Sequence[float]
    threshold: float
    max_skips: int
    kept: frozenset[int]
    ratio: float = 1.0
    error: float = 0.0
    skips: int = 0

    def reuse(self, index: int) -> bool:
        if index in self.kept:
            return False
        self.ratio *= self.ratios[index]
        self.skips += 1
        self.error += abs(1 - self.ratio)
        return self.error < self.threshold and self.skips <= self.max_skips

    def computed(self) -> None:
        self.ratio, self.error, self.skips = 1.0, 0.0, 0


@dataclass
class Mask:
    """`mask`: a # for every step that is computed."""

    mask: str

    def reuse(self, index: int) -> bool:
        return self.mask[index] == "."

    def computed(self) -> None:
        pass


def teacache(
    signal: str,
    distances: Sequence[float],
    coefficients: Mapping[str, Sequence[float]],
    steps: Sequence[Step],
    threshold: float,
) -> TeaCache:
    """`distances`: by step, mean |s - s of the step before| / mean |s of the step before|; `coefficients`: by expert."""
    changes = []
    for step, distance in zip(steps, distances, strict=True):
        value = 0.0
        for coefficient in coefficients[step.expert]:
            value = value * distance + coefficient
        changes.append(value)
    return TeaCache(changes, threshold, WARM_UP[signal])


def resampled(curve: Sequence[float], num_steps: int) -> list[float]:
    """A curve of any number of steps but the first, as one of `num_steps` with the first: the nearest points of it."""
    whole = [1.0, *curve]
    if len(whole) == num_steps:
        return whole
    return [whole[round(i * (len(whole) - 1) / max(num_steps - 1, 1))] for i in range(num_steps)]


def retained(branch: int, steps: Sequence[Step], retention: float, high_noise: str | None) -> frozenset[int]:
    """Steps that MagCache computes, counted as its authors do: passes of both branches in turn.

    high_noise: "computed" where that expert is never skipped.
    """
    passes, split = 2 * len(steps), 2 * sum(step.expert == "high_noise" for step in steps)
    after = split + (passes - split) * retention

    def kept(number: int) -> bool:
        if not split:
            return number < int(passes * retention)
        if high_noise == "computed":
            return number < int(after)
        return number < int(split * retention) or split <= number <= after

    return frozenset(i for i in range(len(steps)) if kept(2 * i + branch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What rules are made from: `calibration` of the model, None where there is none, and `distances` of its time embeddings
    by signal."""

    calibration: Calibration | None
    distances: Callable[[str], Sequence[float]]
    others: Mapping[str, str] = field(default_factory=dict)
    """What of the calibration is of another run: field -> in words."""


def rules(cache: StepCache, steps: Sequence[Step], known: Known, *, nearest: bool = False) -> dict[str, Rule]:
    """A rule per branch; `nearest`: a share that is out of reach becomes the nearest one.

    Raises:
        WanFastError: the model has no calibration for it, or a mask is of another length.
    """
    if cache.share is not None and cache.kind != "searched":
        return _by_share(cache, steps, known, nearest)
    if cache.kind == "mask":
        _check_mask(cache.mask, steps)
        return {branch: Mask(cache.mask) for branch in BRANCHES}
    if cache.kind == "every":
        first = max(0, round((cache.retention or 0) * len(steps)) - 1)
        mask = "#" * first + ("#" + "." * (cache.every - 1)) * len(steps)
        return {branch: Mask(mask) for branch in BRANCHES}
    found = known.calibration
    if cache.kind == "searched":
        mask = _searched(found, cache.share if cache.share is not None else 0.5, len(steps), known.others, nearest)
        return {branch: Mask(mask) for branch in BRANCHES}
    if cache.kind == "magcache":
        if found is None or not found.magcache:
            raise WanFastError(
                "--step-cache magcache: no curve of this model is known; run wan-fast calibrate, or take every:2"
            )
        curve = found.magcache
        given = {"threshold": cache.threshold, "max_skips": cache.max_skips, "retention": cache.retention}
        limits = {name: curve[name] if value is None else value for name, value in given.items()}
        return {
            branch: MagCache(
                resampled(curve[branch], len(steps)),
                limits["threshold"],
                int(limits["max_skips"]),
                retained(number, steps, limits["retention"], curve.get("high_noise")),
            )
            for number, branch in enumerate(BRANCHES)
        }
    signal = SIGNALS[cache.kind]
    coefficients = found.teacache.get(signal) if found else None
    if not coefficients or any(step.expert not in coefficients for step in steps):
        raise WanFastError(
            f"--step-cache {cache.kind}: no coefficients for this model are known; run wan-fast calibrate, or take magcache"
        )
    threshold = coefficients["threshold"] if cache.threshold is None else cache.threshold
    polynomials = {name: values for name, values in coefficients.items() if name != "threshold"}
    return {branch: teacache(signal, known.distances(signal), polynomials, steps, threshold) for branch in BRANCHES}


def described(asked: StepCache, cache: StepCache, rule: Rule) -> str:
    """In words what a step cache came to."""
    words = cache.kind
    if isinstance(rule, (TeaCache, MagCache)):
        words += f" of threshold {rule.threshold:.3g}"
    if isinstance(rule, MagCache):
        words += f", at most {rule.max_skips} in a row"
    return f"{words} (auto)" if asked.kind == "auto" else words


def _by_share(cache: StepCache, steps: Sequence[Step], known: Known, nearest: bool) -> dict[str, Rule]:
    """The rules that compute no more than the share: of the fewest steps reused in a row the lowest threshold.

    Where the calibration of magcache computes more than a fifth of the steps at first, a fifth is tried besides.
    """
    assert cache.share is not None
    most, fewest, last = int(cache.share * len(steps) + 1e-9), len(steps), cache
    tries: list[tuple[int | None, float | None]] = [(cache.max_skips, cache.retention)]
    if cache.kind == "magcache":
        retentions = [None, 0.2] if cache.retention is None and _retention(known) > 0.2 else [cache.retention]
        tries = list(product([cache.max_skips] if cache.max_skips else MAX_SKIPS, retentions))
    for (max_skips, retention), number in product(tries, range(81)):
        threshold = 1e-4 * 10 ** (number / 20)  # to 1
        made = replace(cache, share=None, threshold=threshold, max_skips=max_skips, retention=retention)
        count = computed_mask(rules(made, steps, known).values(), steps).count("#")
        if count < fewest:
            fewest, last = count, made
        if count <= most:
            return rules(made, steps, known)
    if nearest and fewest < len(steps):
        return rules(last, steps, known)
    raise WanFastError(
        f"--step-cache {cache.kind}:{cache.share:.0%} is {most} of {len(steps)} steps, and it computes {fewest} at the "
        "fewest; ask for more"
    )


def _retention(known: Known) -> float:
    return known.calibration.magcache.get("retention", 0.0) if known.calibration else 0.0


def _check_mask(mask: str, steps: Sequence[Step]) -> None:
    if len(mask) != len(steps):
        raise WanFastError(f"--step-cache {mask} has {len(mask)} steps, the run has {len(steps)}; give one # or . per step")
    for i in forced(steps):
        if mask[i] == ".":
            raise WanFastError(
                f"--step-cache {mask} reuses step {i}, which must be computed as the first of expert {steps[i].expert} or the "
                "last of all; put a # there"
            )


def _searched(found: Calibration | None, share: float, num_steps: int, others: Mapping[str, str], nearest: bool) -> str:
    if found is None or not found.masks:
        raise WanFastError("--step-cache searched: no mask was searched for this model; run wan-fast calibrate --search")
    if {"num_steps", "shift"} & set(others):
        raise WanFastError(
            f"--step-cache searched: masks were searched for {found.num_steps} steps at shift {found.shift:g}, this run of "
            f"{num_steps} is another; run wan-fast calibrate --search for it, or take --step-cache magcache"
        )
    fitting = [row["mask"] for row in found.masks if row["mask"].count("#") <= share * num_steps + 1e-9]
    if not fitting and nearest:
        return min((row["mask"] for row in found.masks), key=lambda mask: mask.count("#"))
    if not fitting:
        fewest = min(row["mask"].count("#") for row in found.masks)
        raise WanFastError(
            f"--step-cache searched:{share:.0%}: the cheapest mask computes {fewest} of {num_steps} steps; ask for more"
        )
    return max(fitting, key=lambda mask: mask.count("#"))  # fewer are never better


def forced(steps: Sequence[Step]) -> list[int]:
    """Steps that are computed whatever a rule says: the first of each expert, and the last."""
    return [i for i, step in enumerate(steps) if i in (0, len(steps) - 1) or step.expert != steps[i - 1].expert]


def computed_mask(of: Iterable[Rule], steps: Sequence[Step], also: Iterable[int] | None = None) -> str:
    """What rules compute together, at each step all branches or none; `also`: what is forced, the default `forced(steps)`."""
    always, of = set(forced(steps) if also is None else also), list(of)
    return "".join(".#"[_decided(of, i, i in always) == "run"] for i in range(len(steps)))


def without_guidance(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The plan without the unconditional pass where its weight is 0."""
    return tuple(
        replace(step, unconditional="none") if step.guidance_scale == 1 and step.image_guidance is None else step
        for step in steps
    )


def with_caches(
    steps: Sequence[Step], by_branch: Mapping[str, Rule] | None, cfg: CfgCache | None, zero: int = 0
) -> tuple[Step, ...]:
    """The plan with what need not be computed left out.

    The first `zero` steps predict nothing (CFG-Zero*). Both passes of a step are reused where the rules of both allow it:
    guidance would multiply what residuals of different steps differ by.

    From the start of the CFG cache on the conditional pass follows its own rule, and that of the unconditional one is asked no
    more: its counters stand still. Where the conditional pass is computed, the unconditional one is reconstructed if the last
    difference is of fewer than N steps before, and else computed, as it is at the first step of an expert and, but for a gate,
    at the last of all. Where the conditional pass is reused, both are if their residuals are of the same step, else the
    unconditional one is reconstructed.

    Args:
        steps: the plan, all of it computed but for `without_guidance`.
        by_branch: the rules of a step cache.
        cfg: the CFG cache.
        zero: steps at the start that predict nothing.
    """
    always = {max(i, zero) for i in forced(steps)}
    firsts = {i for i in always if i == zero or steps[i].expert != steps[i - 1].expert}
    rules_of = [by_branch[branch] for branch in BRANCHES] if by_branch else []
    rows: list[Step] = []
    twins = False  # the residuals of both branches are of the same step
    source = 0  # the step that the difference is of
    for i, step in enumerate(steps):
        guided, last = step.unconditional != "none", i == len(steps) - 1
        if i < zero:
            rows.append(replace(step, conditional="zero", unconditional="zero" if guided else "none"))
            continue
        caching = cfg is not None and guided and i >= cfg.start * len(steps) and i not in firsts and not (last and cfg.every)
        together = guided and not caching
        conditional = _decided(rules_of if together else rules_of[:1], i, i in always)
        if not guided:
            unconditional = "none"
        elif not cfg or not caching:
            unconditional = conditional
        elif conditional == "reuse":
            unconditional = "reuse" if twins else "reconstruct"
        else:
            unconditional = "run" if cfg.every and i - source >= cfg.every else "reconstruct"
        if conditional == "run":
            twins = unconditional == "run"
        if unconditional == "run":
            source = i
        weights = _weights(cfg, step) if unconditional == "reconstruct" else (1.0, 1.0)
        rows.append(replace(step, conditional=conditional, unconditional=unconditional, difference=weights))
    return tuple(rows)


def _decided(of: Sequence[Rule], index: int, must: bool) -> str:
    """ "reuse" where all rules allow it."""
    if of and not must and all([rule.reuse(index) for rule in of]):
        return "reuse"
    for rule in of:
        rule.computed()
    return "run"


def _weights(cfg: CfgCache | None, step: Step) -> tuple[float, float]:
    """What the low and the high frequencies of the last difference are multiplied by; arXiv 2410.19355 and its code."""
    if cfg is None or cfg.kind != "frequency":
        return 1.0, 1.0
    return (1.1 if 99 < step.timestep < 901 else 1.0), (1.1 if step.timestep < 301 else 1.0)
