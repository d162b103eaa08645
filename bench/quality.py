"""What linears in 8 bits do to the picture: PSNR of whole videos of `tiny`, and the error of every linear.

    python -m bench.quality                  # 20 prompts, every scheme; writes bench/results/quality.md
    python -m bench.quality --prompts 3      # fewer; prints alone

On the CPU, where FP8 is emulated: values are rounded to e4m3 and multiplied in fp32. All numbers are against the same model in
fp32 from the same noise; none depends on the machine beyond rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import log10
from typing import Any

import torch
from torch import Tensor, nn

from bench import RESULTS
from wan_fast import schemes
from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine
from wan_fast.quantize import QuantizedLinear, quantize_weight
from wan_fast.schemes import Form

COLOURS = ("red", "orange", "yellow", "green", "blue")
THINGS = ("circle on white moves left", "square on grey rotates", "triangle on black bounces", "star on sky grows")
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]
# what is compared: name -> options beside the task's
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp8 row": {"precision": "fp8"},
    "fp8 block": {"precision": "fp8", "scaling": "block"},
    "int8 row": {"precision": "int8"},
    "int8 block": {"precision": "int8", "scaling": "block"},
    **{f"fp8 row, {keep} kept": {"precision": "fp8", "keep_blocks": keep} for keep in (0, 2)},
    **{f"int8 row, {keep} kept": {"precision": "int8", "keep_blocks": keep} for keep in (0, 2)},
}
FORMS = {f"{p} {s}": Form(p, s, s) for p in ("fp8", "int8") for s in ("row", "block")}


@contextmanager
def emulated() -> Iterator[None]:
    """Within, a CPU may compute in every precision, by the operators' references."""
    before = schemes.computes
    schemes.computes = lambda precision, capability: ""
    try:
        yield
    finally:
        schemes.computes = before


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1]."""
    return 10 * log10(4 / (frames - reference).double().square().mean().item())


def sqnr(result: Tensor, exact: Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB."""
    return 10 * log10(exact.double().square().sum().item() / (result - exact).double().square().sum().item())


def videos(options: Mapping[str, Any], prompts: Sequence[str]) -> Iterator[Tensor]:
    """One clip [3, F, H, W] in [-1, 1] per prompt, from the prompt's own seed."""
    engine = Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", **{"dtype": "fp32", **options}))
    for seed, prompt in enumerate(prompts):
        chunks: list[Tensor] = []
        engine.generate(Request(prompt=prompt, seed=seed), on_frames=lambda chunk, to=chunks: to.append(chunk.cpu()))
        yield torch.cat(chunks, dim=1)


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
    engine.generate(Request(prompt=PROMPTS[0], seed=0, num_steps=steps))
    for hook in hooks:
        hook.remove()
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="What linears in 8 bits do to the picture.")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"of {len(PROMPTS)}; fewer write no file")
    parser.add_argument("runs", nargs="*", help=f"of: {', '.join(RUNS)}; fewer write no file")
    parsed = parser.parse_args(argv)
    if unknown := [name for name in parsed.runs if name not in RUNS]:
        parser.error(f"unknown run {unknown[0]!r}; choose of: {', '.join(RUNS)}")
    chosen, prompts = parsed.runs or list(RUNS), PROMPTS[: max(parsed.prompts, 1)]
    lines = [
        f'Videos of `tiny`, 128x128x33, 12 steps, {len(prompts)} prompts, against fp32. "Kept" are blocks at either end, of 6,',
        "that stay in fp32; without that word it is the rule, one at either end.",
        "",
        "| run | mean PSNR, dB | lowest | prompt of the lowest |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    with emulated(), torch.inference_mode():
        exact = list(videos({}, prompts))
        for name in chosen:
            found = [psnr(frames, reference) for frames, reference in zip(videos(RUNS[name], prompts), exact, strict=True)]
            worst = min(range(len(found)), key=found.__getitem__)
            lines.append(f"| {name} | {sum(found) / len(found):.1f} | {found[worst]:.1f} | {prompts[worst]} |")
            print(lines[-1], flush=True)
        linears = linear_errors(Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")), FORMS)
        more = ["", "Its linears, one by one, on the tokens of 3 steps:", "", *table(linears)]
        more += ["", "A linear of 1536 x 1536 on 512 tokens of heavy tails:", "", *table(synthetic_errors(FORMS))]
    print("\n".join(more))
    if chosen == list(RUNS) and prompts == PROMPTS:
        heading = "# Quality of linears in 8 bits\n\nWritten by `python -m bench.quality`.\n\n"
        (RESULTS / "quality.md").write_text(heading + "\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
