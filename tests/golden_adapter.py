"""Adapter for the acceptance cases: every method calls the code that `wan-fast run` uses."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from wan_fast import checkpoint, manifest
from wan_fast.config import EngineConfig, Request
from wan_fast.dit import WanDiT, grid_of
from wan_fast.encoders import TextEncoder, Tokenizer
from wan_fast.engine import Engine
from wan_fast.loading import load_model
from wan_fast.solver import Solver
from wan_fast.steps import Step, official, sigma_grid, solver_rows
from wan_fast.vae import WanVAE

TASK = {"t2v": "t2v-1.3B", "ti2v": "ti2v-5B", "t2v_A14B": "t2v-A14B"}
FP32 = torch.float32


class Adapter:
    name = "wan-fast"
    layout = os.environ.get("WAN_FAST_GOLDEN_LAYOUT", "native")
    sigma_grid = "official"

    def tokenize(self, tokenizer_dir, text):
        return Tokenizer(Path(tokenizer_dir))(text).tolist()

    def t5(self, ckpt, ids):
        part = checkpoint.open_checkpoint(Path(ckpt)).text_encoder
        return load_model(lambda: TextEncoder(part.shapes), part, "cpu", lambda name: FP32)(ids)

    def clip(self, ckpt, image_u8):
        raise NotImplementedError("the image tasks are not wired yet")

    def vae_encode(self, ckpt, which, video):
        return self._vae(ckpt).encode(video)

    def vae_decode(self, ckpt, which, z):
        return self._vae(ckpt).decode(z)

    def _vae(self, ckpt):
        part = checkpoint.open_checkpoint(Path(ckpt)).vae
        return load_model(lambda: WanVAE(manifest.VaeDims.of_shapes(part.shapes)), part, "cpu", lambda name: FP32)

    def scheduler(self, solver, steps, shift):
        return Scheduler(solver, steps, shift)

    def dit(self, ckpt, variant, inputs):
        if variant not in TASK:
            raise NotImplementedError(f"{variant} is not wired yet")
        part = checkpoint.open_dit(Path(ckpt))
        dims = manifest.DiTDims.of_shapes(part.shapes, part.config)
        model = load_model(lambda: WanDiT(dims), part, "cpu", lambda name: FP32)
        timestep, split = rows_and_split(inputs["t"].float())
        return model(inputs["x"], timestep, model.prepare(inputs["context"], grid_of(inputs["x"].shape)), split=split)

    def generate(self, ckpt, variant, meta, tensors):
        if variant not in TASK:
            raise NotImplementedError(f"{variant} is not wired yet")
        engine = Engine(EngineConfig(task=TASK[variant], checkpoint=str(ckpt), device="cpu", dtype="fp32"))
        chunks = []
        with TemporaryDirectory() as folder:
            save_file({"noise": tensors["noise"].contiguous()}, f"{folder}/noise.safetensors")
            request = Request(
                prompt=meta["prompt"],
                negative_prompt=meta["n_prompt"],
                size=tuple(meta.get("size") or meta["img"]),
                num_frames=meta["frame_num"],
                num_steps=meta["sampling_steps"],
                shift=meta["shift"],
                guidance_scale=tuple(meta["guide_scale"]) if isinstance(meta["guide_scale"], list) else meta["guide_scale"],
                solver=meta.get("solver", "unipc"),
                noise=f"{folder}/noise.safetensors",
            )
            if "image_u8" in tensors:
                from PIL import Image

                Image.fromarray(tensors["image_u8"].numpy()).save(f"{folder}/image.png")
                request = replace(request, image=f"{folder}/image.png")
            engine.generate(request, on_frames=chunks.append)
        return torch.cat(chunks, dim=1)


class Scheduler:
    """Our solvers, one call a step, over the official grid or over the two that diffusers uses."""

    def __init__(self, solver, steps, shift):
        name = solver.removeprefix("diffusers_")
        if solver == name:
            sigmas = sigma_grid(name, steps, shift)
            self.timesteps = official(name, steps, shift).timesteps
        else:
            sigmas, self.timesteps = GRIDS[solver](steps, shift)
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64).float()
        self._steps = [
            Step(
                index=index,
                total=len(self.timesteps),
                timestep=float(self.timesteps[index]),
                sigma=float(self.sigmas[index]),
                next_sigma=float(self.sigmas[index + 1]),
                expert="model",
                guidance_scale=1.0,
                corrector=corrector,
                predictor=predictor,
            )
            for index, (corrector, predictor) in enumerate(solver_rows(name, sigmas))
        ]
        self._solver, self._index = None, 0

    def step(self, v, t, x):
        latents, velocity = (tensor.reshape(1, 1, 1, -1) for tensor in (x, v))
        if self._solver is None:
            self._solver = Solver(self._steps, latents)
        self._solver.latents.copy_(latents)
        self._solver.load(self._steps[self._index])
        self._solver.advance(velocity, None)
        self._index += 1
        return self._solver.latents.reshape(x.shape).clone()


def shifted(shift, sigma):
    return shift * sigma / (1 + (shift - 1) * sigma)


def diffusers_unipc(steps, shift):
    """linspace(1, 0.001, steps + 1) without its end, shifted, the first just below 1; whole timesteps."""
    sigmas = [shifted(shift, 1 + i * (1 / 1000 - 1) / steps) for i in range(steps)]
    sigmas[0] -= 1e-6
    return [*sigmas, 0.0], [float(int(s * 1000)) for s in sigmas]


def diffusers_euler(steps, shift):
    """Shifted once when the scheduler is made and once more when its steps are set; fractional timesteps."""
    last = shifted(shift, 1 / 1000)
    sigmas = [shifted(shift, 1 + i * (last - 1) / max(steps - 1, 1)) for i in range(steps)]
    return [*sigmas, 0.0], [1000 * s for s in sigmas]


GRIDS = {"diffusers_unipc": diffusers_unipc, "diffusers_euler": diffusers_euler}


def rows_and_split(t):
    """Per-sample [B] or per-token [B, L] timesteps -> rows [B, R] and the number of tokens in the first row."""
    if t.ndim == 1:
        return t[:, None], 0
    split = int((t[0] == t[0, 0]).sum())
    return (t[:, :1], 0) if split == t.shape[1] else (t[:, [0, -1]], split)
