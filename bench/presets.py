"""Cases of whole denoising runs: what --quality takes against lossless, all steps, both branches, on random weights.

Weights do not matter to which passes are computed: the plan is that of the released model, by its published curve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gemm import in_8_bits
from bench.networks import BF16, FP32, make_dit
from bench.registry import OURS, Case, Work
from wan_fast import manifest
from wan_fast.attention import choose, first_that_runs
from wan_fast.branches import Branches
from wan_fast.config import ATTENTION_8BIT, EngineConfig, Request
from wan_fast.manifest import DiTDims
from wan_fast.planning import Plan, plan
from wan_fast.sampler import denoise
from wan_fast.schemes import Form, default_keep
from wan_fast.solver import Solver


def planned(quality: str, task: str, checkpoint: str | None, video: tuple[int, int, int], device: torch.device) -> Plan:
    """The plan of a run of `video` (width, height, frames) at 50 steps."""
    config = EngineConfig(
        task=task,
        checkpoint=checkpoint,
        quality=quality,  # type: ignore[arg-type]
        device=str(device) if device.type == "cuda" else "cpu",
        vram=2**50,
    )
    return plan(config, Request(prompt="a cat", size=video[:2], num_frames=video[2], num_steps=50))


def denoising(
    task: str, checkpoint: str | None, video: tuple[int, int, int], qualities: tuple[str, ...], device: torch.device
) -> Work:
    """All steps of a generation as the engine does them; the first of `qualities` is ours, and lossless a rival."""
    plans = {quality: planned(quality, task, checkpoint, video, device) for quality in (*qualities, "lossless")}
    exact = plans["lossless"]
    dims = DiTDims.of_task(exact.config.spec)
    if exact.checkpoint:
        part = exact.checkpoint.experts["model"]
        dims = DiTDims.of_shapes(part.shapes, part.config)
    dtype = BF16 if exact.dtype == "bf16" else FP32
    parts = make_dit(dims, exact.latent_shape, dtype, device)
    noise = torch.randn(exact.latent_shape, device=device)
    narrow: dict[str, Any] = {}

    def run(todo: Plan) -> Callable[[], Tensor]:
        config, model = todo.config, parts["model"]
        if config.precision in ("fp8", "int8"):
            if config.precision not in narrow:
                narrow[config.precision] = in_8_bits(model, Form(config.precision), default_keep(dims.num_layers))
            model = narrow[config.precision]
        attend = None
        if config.attention in ATTENTION_8BIT:
            rows = choose(config.attention, torch.cuda.get_device_capability(device), todo.dtype, dims.head_dim)
            attend = first_that_runs(rows, device, dtype, dims.num_heads, dims.head_dim)[1]

        def call() -> Tensor:
            for block in model.blocks:
                block.self_attn.in_8_bits = attend
            solver = Solver(todo.steps, noise)
            branches = Branches(todo.steps, lambda name: model, {}, 0, device)
            branches.contexts = {("model", branch): parts["context"] for branch in ("conditional", "unconditional")}
            denoise(todo.steps, branches, solver)
            return solver.latents

        return call

    ours, *others = qualities
    arms: dict[str, Callable[[], Callable[[], Tensor]]] = {OURS: partial(run, plans[ours])}
    arms |= {f"{OURS}, --quality {name}": partial(run, plans[name]) for name in (*others, "lossless")}
    return Work(
        arms=arms,
        rate="bf16" if dtype == BF16 else "fp32",
        tolerance=None,
        flops=plans[ours].forwards * manifest.dit_flops(dims, exact.tokens),
    )


_PRESETS = ("fast", "high", "draft")
_5B = partial(denoising, "ti2v-5B", None, (1280, 704, 121), _PRESETS)
_1B = partial(denoising, "t2v-1.3B", None, (832, 480, 81), _PRESETS)
_TINY = partial(denoising, "ti2v-5B", "tiny", (128, 128, 33), _PRESETS)
GPU_PRESET_CASES = (
    # 0 s: every arm once, as a run takes half a minute
    Case("quality/ti2v-5B/1280x704x121-50-steps/bf16", "cuda", _5B, 0.0, True),
    Case("quality/t2v-1.3B/832x480x81-50-steps/bf16", "cuda", _1B, 0.0),
)
CPU_PRESET_CASES = (Case("quality/tiny/128x128x33-50-steps/fp32", "cpu", _TINY, 40.0, True),)
