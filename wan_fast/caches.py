"""What --step-cache and --cfg-cache can say. Standard library only; `skipping` has what it means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from wan_fast.errors import WanFastError

STEP_CACHES = ("auto", "teacache", "teacache-ret", "magcache", "every", "searched")
CFG_CACHES = ("difference", "frequency", "gate")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """Which steps take the block stack's result from the step before.

    kind: of STEP_CACHES, or "mask"; "auto" is searched where there is one, else magcache, else teacache. threshold: of teacache
    and magcache; None is the calibration's. share: in its place, the part of the steps that may be computed. max_skips: of
    magcache, steps reused in a row; None is the calibration's. retention: of magcache and every, the part of all steps at the
    start that is computed; None is the calibration's, or 0.2. every: one computed step in so many. mask: # and . by step.
    """

    kind: str
    threshold: float | None = None
    share: float | None = None
    max_skips: int | None = None
    retention: float | None = None
    every: int = 2
    mask: str = ""

    @classmethod
    def parse(cls, text: str) -> StepCache | None:
        """None for "off".

        Raises:
            WanFastError: it says none of these.
        """
        kind, colon, rest = text.strip().partition(":")
        if kind == "off" and not colon:
            return None
        if re.fullmatch(r"[#.]+", text.strip()):
            if text.strip()[0] != "#" or text.strip()[-1] != "#":
                raise WanFastError(
                    f"--step-cache {text}: the first and the last step are computed; let the mask begin and end with #"
                )
            return cls(kind="mask", mask=text.strip())
        if kind not in STEP_CACHES:
            close = get_close_matches(kind, ("off", *STEP_CACHES), 1)
            ways = "off, auto:P%, teacache:T, teacache-ret:T, magcache:T,K,R, every:N,R, searched:P%, or a mask like ##..##"
            raise WanFastError(
                f"--step-cache {text!r} is unknown; " + (f"did you mean {close[0]}?" if close else f"take {ways}")
            )
        flag = f"--step-cache {text}"
        first, *others = rest.split(",") if colon else [""]
        if len(others) > {"magcache": 2, "every": 1}.get(kind, 0):
            raise WanFastError(
                f"{flag}: {len(others) + 1} values are too many; magcache takes T,K,R, every N,R, the others one"
            )
        part = others[1] if kind == "magcache" and len(others) == 2 else others[0] if kind == "every" and others else None
        R = None if part is None else _number(flag, part, "R, the part of all steps computed first,", "[0, 1)")
        if kind == "every":
            every = _whole(flag, first or "2", "N, one step in N is computed,", 2, 100)
            return cls(kind=kind, every=every, retention=0.2 if R is None else R)
        threshold = share = None
        if first.endswith("%"):
            share = _number(flag, first[:-1], "the share of steps to compute", "(0, 100)") / 100
        elif first and kind in ("auto", "searched"):
            raise WanFastError(f"{flag}: {kind} takes the share of steps that are computed, as in {kind}:50%")
        elif first:
            threshold = _number(flag, first, "the threshold", "(0, 1]")
        return cls(
            kind=kind,
            threshold=threshold,
            share=share,
            max_skips=_whole(flag, others[0], "K, the steps reused in a row,", 1, 100) if others else None,
            retention=R,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CfgCache:
    """Where the unconditional pass is reconstructed from the conditional one and the last difference of the two.

    kind: of CFG_CACHES. every: at a computed step the pass is computed if its last is so many steps back; 0: never again.
    start: the part of all steps before which nothing is reconstructed.
    """

    kind: str
    every: int
    start: float

    @classmethod
    def parse(cls, text: str) -> CfgCache | None:
        """None for "off".

        Raises:
            WanFastError: it says none of these.
        """
        kind, colon, rest = text.strip().partition(":")
        if kind == "off" and not colon:
            return None
        flag = f"--cfg-cache {text}"
        if kind not in CFG_CACHES:
            close = get_close_matches(kind, ("off", *CFG_CACHES), 1)
            ways = "off, difference[:N[,START]], frequency[:N[,START]] or gate[:START]"
            raise WanFastError(
                f"--cfg-cache {text!r} is unknown; " + (f"did you mean {close[0]}?" if close else f"take {ways}")
            )
        values = rest.split(",") if colon else []
        if len(values) > (1 if kind == "gate" else 2):
            raise WanFastError(f"{flag}: too many values; gate takes START, the others N,START")
        if kind == "gate":
            return cls(
                kind=kind, every=0, start=_number(flag, values[0] if values else "0.5", "the part of steps before it", "(0, 1)")
            )
        every = _whole(flag, values[0] if values else "2", "N, the steps from one computed pass to the next,", 2, 100)
        start = _number(flag, values[1], "the part of steps before it", "[0, 1)") if len(values) > 1 else 0.3
        return cls(kind=kind, every=every, start=start)


def _number(flag: str, text: str, what: str, span: str) -> float:
    """A number within "(0, 1]", say: a round bracket leaves its bound out."""
    low, high = (float(bound) for bound in span[1:-1].split(","))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (low <= value <= high) or (value == low and span[0] == "(") or (value == high and span[-1] == ")"):
        words = f"{'above' if span[0] == '(' else 'from'} {low:g} {'and below' if span[-1] == ')' else 'to'} {high:g}"
        raise WanFastError(f"{flag}: {what} must be a number {words}, got {text!r}")
    return value


def _whole(flag: str, text: str, what: str, low: int, high: int) -> int:
    if not re.fullmatch(r"\s*\d+\s*", text) or not low <= int(text) <= high:
        raise WanFastError(f"{flag}: {what} must be a whole number from {low} to {high}, got {text!r}")
    return int(text)
