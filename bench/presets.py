"""Cases of whole runs on random weights: what --quality takes against lossless, and distilled models of a few steps.

Weights do not matter to which passes are computed: the plan is that of the released model, by its published curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.gemm import in_8_bits
from bench.networks import BF16, FP32, make_dit, random_model
from bench.registry import OURS, Case, Work
from bench.timer import now
from wan_fast import manifest
from wan_fast.attention import choose, first_that_runs
from wan_fast.branches import Branches
from wan_fast.conditioning import Conditioning
from wan_fast.config import ATTENTION_8BIT, EngineConfig, Request
from wan_fast.graphs import Capture
from wan_fast.manifest import DiTDims
from wan_fast.planning import Plan, plan
from wan_fast.running import on_the_host, tf32_convolutions
from wan_fast.sampler import denoise
from wan_fast.schedule import sampler_of
from wan_fast.schemes import Form, default_keep
from wan_fast.setup import Models
from wan_fast.solver import Solver
from wan_fast.vae import WanVAE
from wan_fast.workspace import Workspace

# seconds wanted of three steps of TI2V-5B at 1280x704x121 on one H200, the prompt's embedding at hand
FEW_STEPS_GOAL = ("few-steps/ti2v-5B/1280x704x121-3-steps/bf16", 6.0)
IN_BF16 = f"{OURS}, bf16"


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


# --- a few steps, end to end --------------------------------------------------------------------------------------------


def few_steps(task: str, checkpoint: str | None, video: tuple[int, int, int], preset: str, device: torch.device) -> Work:
    """A prompt's embedding on the host to frames on the host, by a distilled model: on a GPU in 8 bits, and in bf16."""
    options: dict[str, dict[str, Any]] = {OURS: {}}
    if device.type == "cuda":
        options = {OURS: {"precision": "fp8", "attention": "int8"}, IN_BF16: {}}
    plans = {name: _of_few_steps(task, checkpoint, video, preset, device, given) for name, given in options.items()}
    exact = list(plans.values())[-1]
    models, in_bf16 = Models.of(exact.config.spec, exact.checkpoint), exact.dtype == "bf16"
    dims, dtype = models.experts["model"], BF16 if in_bf16 else FP32
    parts = make_dit(dims, exact.latent_shape, dtype, device)
    vae = random_model(lambda: WanVAE(models.vae), manifest.vae_shapes(models.vae), device, lambda name: dtype)
    noise = torch.randn(exact.latent_shape, device=device)
    # a prompt of 64 tokens, as the cache of embeddings gives it
    embedding = torch.empty(64, dims.text_dim, dtype=dtype, device="meta" if device.type == "meta" else "cpu").normal_()
    stages: dict[str, dict[str, float]] = {}
    findings: dict[str, dict[str, float]] = {}

    def run(name: str) -> Callable[[], Tensor]:
        todo, model = plans[name], parts["model"]
        attend = None
        if name == OURS and todo.config.precision == "fp8":
            model = in_8_bits(model, Form("fp8"), default_keep(dims.num_layers))
            rows = choose("int8", torch.cuda.get_device_capability(device), todo.dtype, dims.head_dim)
            attend = first_that_runs(rows, device, dtype, dims.num_heads, dims.head_dim)[1]
        for block in model.blocks:
            block.self_attn.in_8_bits = attend
        clip = Distilled(todo, model, vae, noise)

        def call() -> Tensor:
            with tf32_convolutions(in_bf16):
                frames, stages[name] = clip.made(embedding)
            if isinstance(count := clip.workspace.captured.get("steps"), int):
                findings[name] = {"captured": float(count)}
            return frames

        return call

    return Work(
        arms={name: partial(run, name) for name in plans},
        rate="bf16" if in_bf16 else "fp32",
        rates={name: _shares(todo) for name, todo in plans.items()},
        tolerance=None,
        flops=exact.flops["denoise"] + exact.flops["decode"] + manifest.dit_text_flops(dims),
        stages=stages,
        findings=findings,
    )


class Distilled:
    """Makes clips of one plan as the engine does, with graphs where it would have them."""

    def __init__(
        self,
        todo: Plan,
        model: Any,
        vae: WanVAE,
        noise: Tensor,
        capture: Callable[[torch.device, bool], Capture] | None = None,
    ) -> None:
        self.todo, self.vae, self.noise = todo, vae, noise
        self.workspace = Workspace(noise.device, lambda name: model)
        if capture is not None:
            self.workspace.capture = capture

    def made(self, embedding: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Frames [F, H, W, 3] uint8 on the host, and seconds by stage."""
        todo, device = self.todo, self.noise.device
        marks = [now(device)]
        C, T, H, W = self.noise.shape
        assert sampler_of(todo.request).time_first
        clip = self.workspace.begin(
            todo,
            Conditioning(text={"conditional": embedding.to(device)}),
            self.noise,
            lambda: torch.randn(T, C, H, W, device=device).transpose(0, 1),
        )
        marks.append(now(device))
        denoise(todo.steps, clip.branches, clip.solver, run=clip.run)
        marks.append(now(device))
        self.workspace.note(clip.run, "steps")
        (width, height), memory = todo.request.size, todo.memory
        stream: Iterator[Tensor] = self.vae.decode_stream(
            clip.solver.latents,
            chunk=memory.decode_chunk,
            piece=memory.decode_piece,
            tiles=memory.decode_tiles,
            run=self.workspace.run(todo) if memory.decode_graphs else None,
        )
        frames = torch.empty(todo.request.num_frames, height, width, 3, dtype=torch.uint8, device=embedding.device)
        done = 0
        for pixels in stream if device.type == "meta" else on_the_host(stream):
            frames[done : done + pixels.shape[0]] = pixels
            done += pixels.shape[0]
        marks.append(now(device))
        spent = [end - start for start, end in pairwise(marks)]
        return frames, dict(zip(("prepare", "denoise", "decode"), spent, strict=True))


def _of_few_steps(
    task: str,
    checkpoint: str | None,
    video: tuple[int, int, int],
    preset: str,
    device: torch.device,
    options: Mapping[str, Any],
) -> Plan:
    name = str(device) if device.type == "cuda" else "cpu"
    config = EngineConfig(task=task, checkpoint=checkpoint, device=name, vram=2**50, **options)
    return plan(config, Request(prompt="a cat", size=video[:2], num_frames=video[2], preset=preset, seed=0))


def _shares(todo: Plan) -> dict[str, float]:
    """Of the operations of denoising and decoding, by the product that they run in."""
    whole = todo.flops["denoise"] + todo.flops["decode"]
    narrow = {kind: count / whole for kind, count in todo.flops_8bit.items()}
    return narrow | {"bf16" if todo.dtype == "bf16" else "fp32": 1 - sum(narrow.values())}


def few_steps_lines(row: Mapping[str, Any]) -> list[str]:
    """Markdown of a case few-steps/*: arms by stage of their last call, and whether what is wanted was reached."""
    stages = ("prepare", "denoise", "decode")
    lines = [f"| `{row['case']}` | end to end | {' | '.join(stages)} |", "| --- " * 5 + "|"]
    for name, arm in row["arms"].items():
        by_stage = " | ".join(f"{arm['stages'][stage]:.3f} s" for stage in stages)
        without = ", launched kernel by kernel" if arm.get("findings", {}).get("captured") == 0 else ""
        lines.append(f"| {name}{without} | {arm['seconds']:.3f} s | {by_stage} |")
    lines += [f"| {name} | not measured: {why} | | | |" for name, why in row["skipped"].items()]
    case, wanted = FEW_STEPS_GOAL
    if row["case"] == case:
        reached = "reached" if row["arms"][OURS]["seconds"] <= wanted else "not reached"
        lines += ["", f"{wanted:g} s or less is wanted of {OURS} on one H200: {reached} here."]
    return ["", *lines, ""]


# --- the rows -----------------------------------------------------------------------------------------------------------

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
GPU_FEW_STEPS_CASES = (
    Case(FEW_STEPS_GOAL[0], "cuda", partial(few_steps, "ti2v-5B", None, (1280, 704, 121), "fastwan-3step"), 15.0, True),
)
CPU_FEW_STEPS_CASES = (
    Case(
        "few-steps/tiny/128x128x33-3-steps/fp32",
        "cpu",
        partial(few_steps, "ti2v-5B", "tiny", (128, 128, 33), "fastwan-3step"),
        8.0,
        True,
    ),
)
