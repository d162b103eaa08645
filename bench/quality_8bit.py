"""What 8 bits do to single operators: the error of every linear and every self-attention of `tiny`, and of made-up tokens.

    python -m bench.quality_8bit             # writes bench/results/quality_8bit.md

On the CPU, where FP8 is emulated: values are rounded to e4m3 and multiplied in fp32. None of the numbers depends on the machine
beyond rounding. `bench.quality` has what becomes of whole videos.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import log, log2, log10
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import RESULTS
from wan_fast import attention, schemes
from wan_fast.attention import Attention8bit, Projected, of_projection, sdpa
from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine
from wan_fast.kernels import qk_norm_rope, rope_table
from wan_fast.kernels.attention_8bit import left_out
from wan_fast.quantize import QuantizedLinear, quantize_weight
from wan_fast.schemes import Form

PROMPT = "a red circle on white moves left"
FORMS = {f"{p} {s}": Form(p, s, s) for p in ("fp8", "int8") for s in ("row", "block")}


def plain_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What attention in FP8 is without the care: one scale for all of q, k and v, keys as they are (arXiv 2407.08608)."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax() / 448
        return (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale

    q, k, v = (rounded(x.float()).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    out = (p * 448).to(torch.float8_e4m3fn).float() @ v / 448 / p.sum(-1, keepdim=True)
    return out.transpose(1, 2)


@contextmanager
def emulated() -> Iterator[None]:
    """Within, a CPU may compute in every precision, by the operators' references."""
    before = schemes.computes, attention.BACKENDS
    schemes.computes = lambda precision, capability: ""
    attention.BACKENDS = tuple(  # type: ignore[assignment]
        replace(row, majors=range(100), since=0, dtypes=("bf16", "fp32")) if row.module == "triton" else row
        for row in before[1]
    )
    try:
        yield
    finally:
        schemes.computes, attention.BACKENDS = before


def sqnr(result: Tensor, exact: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB."""
    return 10 * log10(exact.double().square().sum().item() / (result - exact).double().square().sum().item())


def quantized(linear: nn.Linear, form: Form) -> QuantizedLinear:
    """The linear in 8 bits."""
    values, scale = quantize_weight(linear.weight, form)
    other = QuantizedLinear(linear.in_features, linear.out_features, form).to(linear.weight.device)
    other.load_state_dict({"weight": values, "weight_scale": scale, "bias": linear.bias.detach()}, assign=True)
    return other


def linear_errors(engine: Engine, forms: Mapping[str, Form], steps: int = 3) -> dict[tuple[str, str], list[float]]:
    """(kind of linear, form) -> SQNR in dB of every such linear at every call while a video is made."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)

    def compare(module: nn.Module, args: tuple[Tensor, ...], result: Tensor, kind: str) -> None:
        assert isinstance(module, nn.Linear)
        for name, form in forms.items():
            found[kind, name].append(sqnr(quantized(module, form)(args[0]), result))

    hooks = [
        module.register_forward_hook(partial(compare, kind=name.split(".", 2)[2]))
        for name, module in engine.models["model"].named_modules()
        if schemes.linear_of(f"{name}.weight")
    ]
    # a hook sees what a linear returns before GELU changes it in place
    engine.generate(Request(prompt=PROMPT, seed=0, num_steps=steps))
    for hook in hooks:
        hook.remove()
    return found


SKIPS = (1e-4, 1e-3, 1e-2, 1e-1)
# name -> self-attention, of which the errors are shown
ATTENTIONS: dict[str, Projected] = {
    "int8": Attention8bit("int8"),
    "int8, values bf16": Attention8bit("int8", wide_values=True),
    "fp8": Attention8bit("fp8"),
    "plain fp8": of_projection(plain_fp8),
}


def attention_errors(engine: Engine, steps: int = 3) -> dict[tuple[str, str], list[float]]:
    """(block, attention) -> SQNR in dB of every self-attention while a video is made."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    layers = len(engine.models["model"].blocks)  # type: ignore[arg-type]
    for i, ((qkv, *others), settings) in enumerate(captured(engine, (128, 128), steps)):
        wanted = of_projection(sdpa)(qkv.clone(), *others, **settings)
        for name, other in ATTENTIONS.items():
            found[f"block {i % layers}", name].append(sqnr(other(qkv.clone(), *others, **settings), wanted))
    return found


def captured(engine: Engine, size: tuple[int, int], steps: int) -> list[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """What every self-attention is given while a video of `tiny` is made: projection, weight, table; and the rest."""
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def keeping(attention: Projected, *args: Tensor, **settings: Any) -> Tensor:
        calls.append((tuple(arg.clone() for arg in args), settings))
        return attention(*args, **settings)

    layers = [block.self_attn for block in engine.models["model"].blocks]  # type: ignore[union-attr]
    before = [layer.attention for layer in layers]
    for layer, own in zip(layers, before, strict=True):
        layer.attention = partial(keeping, own)
    engine.generate(Request(prompt=PROMPT, seed=0, num_steps=steps, size=size))
    for layer, own in zip(layers, before, strict=True):
        layer.attention = own
    return calls


def skipping(engine: Engine, thresholds: Sequence[float]) -> list[str]:
    """Markdown: what skip-softmax leaves out of `tiny`'s self-attention on 1,296 tokens, and what it costs."""
    calls = captured(engine, (384, 384), 3)
    lines = ["| skip | tiles left out | lowest SQNR, dB |", "| --- | --- | --- |"]
    for skip in (0.0, *thresholds):
        parts, ratios = [], []
        for (qkv, *others), settings in calls:
            exact = of_projection(sdpa)(qkv.clone(), *others, **settings)
            ratios.append(sqnr(Attention8bit("int8", skip=skip)(qkv.clone(), *others, **settings), exact))
            turned = qkv.clone()
            qk_norm_rope(turned, *others, **settings)
            q, k, _ = turned.unflatten(-1, (settings["heads"], -1)).unbind(2)
            scores = torch.einsum("blnk,bsnk->bnls", q, k) / (q.shape[-1] ** 0.5 * log(2))
            parts += [left_out(x, log2(skip)).float().mean().item() if skip else 0.0 for x in scores.flatten(0, 1)]
        lines.append(f"| {skip:g} | {sum(parts) / len(parts):.1%} | {min(ratios):.1f} |")
    return lines


def wan_like_attention() -> dict[str, Callable[[torch.Generator], Tensor]]:
    """Projections [1, L, 3, D] of 2 heads, before their norm, on a clip of 4 x 16 x 16 tokens.

    Of a Wan model keys have a large part in common, q and k a few channels that are larger than the others, and tokens beside
    one another are alike.
    """
    T, H, W, D = 4, 16, 16, 256

    def white(generator: torch.Generator) -> Tensor:
        return torch.randn(1, T * H * W, 3, D, generator=generator)

    def common(generator: torch.Generator) -> Tensor:
        return white(generator) + torch.randn(3, D, generator=generator) * torch.tensor([0.5, 4.0, 0.5])[:, None]

    def channels(generator: torch.Generator) -> Tensor:
        x = common(generator)
        x[:, :, :2, ::32] *= 8
        return x

    def smooth(generator: torch.Generator) -> Tensor:
        coarse = torch.randn(3 * D, T, H // 4, W // 4, generator=generator)
        fine = F.interpolate(coarse, scale_factor=4, mode="bilinear")  # [3 D, T, H, W]
        return (fine.flatten(1).t().reshape(1, -1, 3, D) * 2 + channels(generator)).contiguous()

    return {"white": white, "keys in common": common, "and large channels": channels, "and smooth": smooth}


def synthetic_attention_errors() -> dict[tuple[str, str], list[float]]:
    """(kind of tokens, attention) -> SQNR in dB."""
    found, grid = {}, (4, 16, 16)
    for kind, make in wan_like_attention().items():
        qkv, weight, table = make(torch.Generator().manual_seed(0)), torch.ones(2, 256), rope_table(16, 128)
        where: dict[str, Any] = {"grid": grid, "heads": 2, "eps": 1e-6}
        wanted = of_projection(sdpa)(qkv.clone(), weight, table, **where)
        for name, other in ATTENTIONS.items():
            found[kind, name] = [sqnr(other(qkv.clone(), weight, table, **where), wanted)]
    return found


def synthetic() -> dict[str, Callable[[torch.Generator], Tensor]]:
    """Tokens [512, 1536] with heavy tails: a few channels 20 times the others, and Student's t of 3 degrees of freedom."""

    def outlier_channels(generator: torch.Generator) -> Tensor:
        x = torch.randn(512, 1536, generator=generator)
        x[:, ::256] *= 20
        return x

    def student(generator: torch.Generator) -> Tensor:
        normal = torch.randn(512, 1536, generator=generator)
        chi = torch.randn(512, 1536, 3, generator=generator).square().mean(-1)
        return normal / chi.sqrt()

    return {"outlier channels": outlier_channels, "Student's t": student}


def synthetic_errors(forms: Mapping[str, Form]) -> dict[tuple[str, str], list[float]]:
    """(kind of tokens, form) -> SQNR in dB of a linear of 1536 x 1536."""
    found = {}
    for kind, make in synthetic().items():
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(1536, 1536).requires_grad_(False)
        linear.weight.copy_(torch.randn(1536, 1536, generator=generator) / 40)
        x = make(generator)
        for name, form in forms.items():
            found[kind, name] = [sqnr(quantized(linear, form)(x), linear(x))]
    return found


def table(rows: Mapping[tuple[str, str], Sequence[float]]) -> list[str]:
    """Markdown: a line per kind, the lowest SQNR of each form."""
    kinds, forms = dict.fromkeys(kind for kind, _ in rows), dict.fromkeys(form for _, form in rows)
    lines = ["| lowest SQNR, dB | " + " | ".join(forms) + " |", "| --- |" + " --- |" * len(forms)]
    return lines + [f"| {kind} | " + " | ".join(f"{min(rows[kind, form]):.1f}" for form in forms) + " |" for kind in kinds]


def videos_table() -> list[str]:
    """Markdown: PSNR of whole videos of `tiny` in 8 bits against fp32, over all prompts."""
    from bench.quality import IN_8_BITS, PROMPTS, psnr, videos  # which imports this module

    lines = [
        f'Videos of `tiny`, 128x128x33, 12 steps, {len(PROMPTS)} prompts, against fp32. "Kept" are blocks at either end, of 6,',
        "that stay in fp32; without that word it is the rule, one at either end.",
        "",
        "| run | mean PSNR, dB | lowest | prompt of the lowest |",
        "| --- | --- | --- | --- |",
    ]
    exact = list(videos({}, PROMPTS))
    for name, options in IN_8_BITS.items():
        found = [psnr(frames, reference) for frames, reference in zip(videos(options, PROMPTS), exact, strict=True)]
        worst = min(range(len(found)), key=found.__getitem__)
        lines.append(f"| {name} | {sum(found) / len(found):.1f} | {found[worst]:.1f} | {PROMPTS[worst]} |")
        print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality_8bit", description="What 8 bits do to videos, linears and attention."
    )
    parser.parse_args(argv)
    with emulated(), torch.inference_mode():
        engine = Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu"))
        lines = ["# Linears and attention in 8 bits", "", "Written by `python -m bench.quality_8bit`.", ""]
        lines += [
            *videos_table(),
            "",
            "Linears of `tiny`, one by one, on the tokens of 3 steps:",
            "",
            *table(linear_errors(engine, FORMS)),
        ]
        lines += ["", "A linear of 1536 x 1536 on 512 tokens of heavy tails:", "", *table(synthetic_errors(FORMS))]
        lines += ["", "Self-attention of `tiny`, on the tokens of 3 steps:", "", *table(attention_errors(engine))]
        lines += ["", "Self-attention of 1,024 tokens like Wan's:", "", *table(synthetic_attention_errors())]
        lines += ["", "Skip-softmax with INT8, on the tokens of 3 steps of 384x384x33:", "", *skipping(engine, SKIPS)]
    print("\n".join(lines))
    (RESULTS / "quality_8bit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
