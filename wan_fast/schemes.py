"""Which linears of a DiT compute in 8 bits, and how: decided from file headers and the options. Standard library only.

Those inside the blocks do, the VACE branch's among them: the joint q, k and v, self-attention's output, cross-attention's four
and two more where it looks at pictures, the feed-forward's two. Embeddings, head, time embedding, what joins a branch to the
model, norms and modulation stay as they are, and so may whole blocks at both ends of the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil

from wan_fast.config import WanFastError
from wan_fast.dialects import granularity
from wan_fast.manifest import Shapes

GROUP = 128
_LINEAR = re.compile(
    r"((?:vace_)?blocks\.\d+\.(?:self_attn\.(?:qkv|[qkvo])|cross_attn\.(?:[qkvo]|[kv]_img)|ffn\.[02]))\.weight"
)
# what blocks lie in, and where that is in words
_STACKS = {"blocks": "", "vace_blocks": " of the VACE branch"}
NAMES = {"fp8": "FP8 e4m3", "int8": "INT8"}
SCALINGS = {
    "row": "a scale per token and per output channel",
    "tensor": "a calibrated scale for all tokens, one per output channel",
    "block": "a scale per 128 values of a token and per 128 x 128 of the weight",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How one linear computes.

    precision: "fp8" or "int8". weight: scales per output channel, "row", or per 128 x 128, "block". input: scales of the
    tokens, one each, "row", per 128 values, "block", or one calibrated, "tensor". smooth: a vector multiplies them first.
    stored: the weight lies in 8 bits in the checkpoint; else it is quantised as it is loaded.
    """

    precision: str
    weight: str = "row"
    input: str = "row"
    smooth: bool = False
    stored: bool = False

    @property
    def scaling(self) -> str:
        return "tensor" if self.input == "tensor" else self.weight


def linear_of(name: str) -> str | None:
    """The linear, as the model has it, that a weight of that native name belongs to: q, k and v are one."""
    match = _LINEAR.fullmatch(name)
    return None if match is None else re.sub(r"self_attn\.[qkv]$", "self_attn.qkv", match[1])


def linears_of(shapes: Shapes) -> tuple[str, ...]:
    """All of a model's, as it has them, from native names."""
    return tuple(dict.fromkeys(linear for name in shapes if (linear := linear_of(name))))


def per_block(linears: Iterable[str]) -> Counter[tuple[str, int]]:
    """("blocks" or "vace_blocks", number of the block) -> how many of these linears it has."""
    return Counter((stack, int(number)) for stack, number, _ in (linear.split(".", 2) for linear in linears))


def num_blocks(shapes: Shapes) -> int:
    """The model's own, a branch's not counted."""
    return 1 + max((number for stack, number in per_block(linears_of(shapes)) if stack == "blocks"), default=-1)


def default_keep(num_layers: int) -> int:
    """Blocks at either end that are not quantised: 3 of 40, as published for Wan's 14B models, in proportion for others, and at
    least one, where blocks are left between. On `tiny`, of 6 blocks, one at either end makes FP8 1.5 dB better, two 4.6 dB;
    with none the worst of 20 prompts falls below 30 dB (bench/results/quality.md)."""
    return max(1, round(3 * num_layers / 40)) if num_layers > 2 else 0


def kept(num_layers: int, keep: int) -> list[int]:
    """The blocks that are not quantised, `keep` at either end."""
    return sorted({*range(min(keep, num_layers)), *range(max(num_layers - keep, 0), num_layers)})


def quantized_at_load(shapes: Shapes, precision: str, scaling: str, keep: int) -> dict[str, Form]:
    """Linear -> form, for a checkpoint whose weights are not in 8 bits; `keep` counts the model's own blocks alone."""
    without = tuple(f"blocks.{i}." for i in kept(num_blocks(shapes), keep))
    form = Form(precision, weight=scaling, input=scaling)
    return {linear: form for linear in linears_of(shapes) if not linear.startswith(without)}


def as_stored(
    shapes: Shapes, precisions: Mapping[str, str], scales: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, Form]:
    """Linear -> form, for the weights that lie in 8 bits.

    Args:
        shapes: native name -> shape.
        precisions: native weight name -> "fp8" or "int8".
        scales: native weight name -> the shapes of its "weight_scale", "input_scale" and "pre_quant_scale".
    """
    members: dict[str, set[Form | None]] = {}
    for name, shape in shapes.items():
        if linear := linear_of(name):
            members.setdefault(linear, set()).add(_stored(shape, precisions.get(name), scales.get(name, {}), linear))
    # a joint linear whose parts lie in different forms has none
    return {linear: form for linear, forms in members.items() if len(forms) == 1 and (form := next(iter(forms)))}


def _stored(shape: tuple[int, ...], precision: str | None, scales: Mapping[str, tuple[int, ...]], linear: str) -> Form | None:
    if precision is None:
        return None
    blocks = "weight_scale" in scales and granularity(scales["weight_scale"], shape) == "block"
    if blocks and linear.endswith("qkv") and shape[0] % GROUP:
        return None  # blocks of q would reach into k
    # an integer's scale is always that of its token, which needs no calibration
    fixed = "input_scale" in scales and precision == "fp8" and not blocks
    given = "tensor" if fixed else "block" if blocks else "row"
    return Form(precision, "block" if blocks else "row", given, "pre_quant_scale" in scales, stored=True)


def scale_bytes(shape: tuple[int, ...], form: Form) -> int:
    """Bytes of the scales of a weight [N, K]."""
    N, K = shape
    return 4 * (ceil(N / GROUP) * ceil(K / GROUP) if form.weight == "block" else N)


def described(forms: Mapping[str, Form], shapes: Shapes) -> str:
    """In words: how many linears of a model of these shapes compute in what, and which blocks do not."""
    kinds = sorted({(form.precision, form.scaling) for form in forms.values()})
    how = ", ".join(f"{NAMES[precision]}, {SCALINGS[scaling]}" for precision, scaling in kinds)
    there, here = per_block(linears_of(shapes)), per_block(forms)
    counts, others = list[str](), list[str]()
    for stack, where in _STACKS.items():
        if blocks := [block for block in here if block[0] == stack]:
            counts.append(f"{sum(here[block] for block in blocks)} linears of {len(blocks)} blocks{where}")
        if without := sorted(number for own, number in there.keys() - here.keys() if own == stack):
            others.append(f"blocks {_ranges(without)}{where}")
    said = f"{' and '.join(counts)}: {how}"
    if missing := sum(there[block] for block in here) - len(forms):
        said += f"; {missing} more of these are not"
    return said + (f"; {' and '.join(others)} are not" if others else "")


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def computes(precision: str, capability: tuple[int, int] | None) -> str:
    """Why a device cannot compute in `precision`, "" where it can; a capability of None is a CPU's."""
    if capability is None:
        return "" if precision == "int8" else "a CPU has no FP8 products"
    if precision == "fp8" and capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]} has no FP8 products, 8.9 and above have"
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def settle(
    asked: str,
    scaling: str,
    keep: int | None,
    capability: tuple[int, int] | None,
    shapes: Shapes,
    precisions: Mapping[str, str],
    scales: Mapping[str, Mapping[str, tuple[int, ...]]],
    keeps_attention: bool = False,
) -> tuple[dict[str, Form], str]:
    """The forms of a DiT's linears, and why, in a few words.

    Args:
        asked: "auto", "bf16", "fp8" or "int8"; "auto" is what the checkpoint holds, where the device computes in it.
        scaling: "auto", "row", "tensor" or "block".
        keep: blocks at either end that are not to be quantised; None for the rule.
        capability: of the GPU; None for a CPU.
        shapes, precisions, scales: as for `as_stored`.
        keeps_attention: `keep` is for attention too, and need not be of use here.

    Raises:
        WanFastError: what is asked for cannot be, with what to do.
    """
    held = sorted({precisions[name] for name in precisions if linear_of(name)})
    if asked in NAMES and (reason := computes(asked, capability)):
        able = [precision for precision in NAMES if not computes(precision, capability)]
        # what the file holds can be converted, but not from one precision of 8 bits to another
        raise WanFastError(f"--precision {asked}: {reason}; take --precision {'auto' if held else [*able, 'bf16'][0]}")
    lacking = computes(held[0], capability) if held and asked == "auto" else ""
    if asked == "bf16" or not (held or asked in NAMES) or lacking:
        unused = (("--scaling", "linears", scaling != "auto"), ("--keep_blocks", "linears and attention", keep is not None))
        for flag, what, given in unused:
            if given and not (flag == "--keep_blocks" and keeps_attention):
                raise WanFastError(
                    f"{flag} is for {what} in 8 bits, and there are none here: --precision is {asked}; leave it out"
                )
        if lacking:
            return {}, f"auto: the checkpoint's {NAMES[held[0]]} is converted as it is loaded, as {lacking}"
        return {}, "asked for" if asked == "bf16" else "auto: as the checkpoint has them"
    if len(held) > 1:
        raise WanFastError("the checkpoint has both FP8 and INT8 linears; take --precision bf16, or one of a single precision")
    if held:
        return _settle_stored(
            asked, scaling, None if keeps_attention else keep, held[0], as_stored(shapes, precisions, scales)
        ), "as the checkpoint has them"
    if scaling == "tensor":
        raise WanFastError(
            "--scaling tensor needs calibrated scales, the checkpoint has none; write one with "
            "wan-fast quantize CKPT OUT --scheme fp8 --scaling tensor --calibrate PROMPTS.txt, or take --scaling row"
        )
    layers = num_blocks(shapes)
    count = default_keep(layers) if keep is None else keep
    if 2 * count >= layers:
        raise WanFastError(f"--keep_blocks {count} at either end leaves none of {layers} blocks; take a smaller number")
    forms = quantized_at_load(shapes, asked, "row" if scaling == "auto" else scaling, count)
    return forms, "asked for, quantised as it is loaded"


def _settle_stored(asked: str, scaling: str, keep: int | None, held: str, forms: dict[str, Form]) -> dict[str, Form]:
    """The forms of a checkpoint's own, held against the options."""
    if asked not in ("auto", held):
        raise WanFastError(
            f"--precision {asked}: the checkpoint's linears are {NAMES[held]} already; take --precision {held}, or give the "
            "checkpoint it was made from"
        )
    if keep is not None:
        raise WanFastError("--keep_blocks cannot undo a checkpoint's own quantisation; leave it out")
    if not forms and asked in NAMES:
        raise WanFastError(
            f"--precision {asked}: no linear of the checkpoint is whole in {NAMES[held]} (q, k and v are one, and must be "
            "alike); take --precision bf16"
        )
    if scaling == "row":  # tokens' own scales in place of a calibrated one
        forms = {linear: replace(form, input="row") if form.input == "tensor" else form for linear, form in forms.items()}
    for form in {*forms.values()}:
        if scaling not in ("auto", form.scaling):
            raise WanFastError(f"--scaling {scaling}: the checkpoint has {SCALINGS[form.scaling]}; leave it out")
    return forms
