"""Adapter for the acceptance cases: every method calls the code that `wan-fast run` uses."""

import os
import wave
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from wan_fast import checkpoint, manifest
from wan_fast.config import EngineConfig, Request
from wan_fast.dit import WanDiT, grid_of
from wan_fast.encoders import ImageEncoder, TextEncoder, Tokenizer
from wan_fast.engine import Engine
from wan_fast.inputs import Inputs
from wan_fast.loading import load_model
from wan_fast.solver import Solver
from wan_fast.steps import Step, official, sigma_grid, solver_rows
from wan_fast.vae import WanVAE

TASK = {
    "t2v": "t2v-1.3B",
    "i2v": "i2v-14B",
    "flf2v": "flf2v-14B",
    "vace": "vace-1.3B",
    "ti2v": "ti2v-5B",
    "t2v_A14B": "t2v-A14B",
    "i2v_A14B": "i2v-A14B",
    "s2v": "s2v-14B",
    "animate": "animate-14B",
}
PICTURES = {"flf2v": {"image_u8": "first_frame", "last_image_u8": "last_frame"}}
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
        part = checkpoint.open_checkpoint(Path(ckpt)).image_encoder
        encoder = load_model(lambda: ImageEncoder(manifest.ClipDims.of_shapes(part.shapes)), part, "cpu", lambda name: FP32)
        return encoder(image_u8.permute(2, 0, 1).float() / 127.5 - 1)

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
        if variant == "s2v":  # what is not the clip's own is at timestep 0
            timestep, split = F.pad(timestep, (0, 1)), prod(grid_of(inputs["x"].shape))
        return torch.cat([self._velocity(model, inputs, timestep, split, i) for i in range(len(timestep))])

    def _velocity(self, model, inputs, timestep, split, i):
        """Of sample i; each has a clip's inputs of its own."""
        x, clip = inputs["x"][i : i + 1], inputs.get("clip_fea")
        given = Inputs(
            channels=inputs["y"][i] if "y" in inputs else None,
            image=None if clip is None else clip.chunk(len(timestep))[i],
            control=inputs["vace_context"][i] if "vace_context" in inputs else None,
            control_scale=inputs.get("vace_context_scale", 1.0),
            reference=inputs["ref_latents"][i] if "ref_latents" in inputs else None,
            motion=None if inputs.get("drop_motion_frames", True) else inputs["motion_latents"][i],
            pose=next((inputs[name][i] for name in ("cond_states", "pose_latents") if name in inputs), None),
            face=inputs["face_pixel_values"][i] if "face_pixel_values" in inputs else None,
            audio=inputs["audio_input"][i] if "audio_input" in inputs else None,
        )
        context = model.prepare(inputs["context"][i : i + 1], grid_of(x.shape), given)
        return model(x, timestep[i : i + 1], context, split=split)

    def generate(self, ckpt, variant, meta, tensors):
        if variant not in TASK:
            raise NotImplementedError(f"{variant} is not wired yet")
        engine = Engine(EngineConfig(task=TASK[variant], checkpoint=str(ckpt), device="cpu", dtype="fp32"))
        chunks = []
        with TemporaryDirectory() as folder:
            noises = {name: noise.contiguous() for name, noise in tensors.items() if name.startswith("noise")}
            save_file(noises, f"{folder}/noise.safetensors")
            request = Request(
                prompt=meta["prompt"],
                negative_prompt=meta["n_prompt"],
                size=size_of(meta),
                num_frames=meta.get("frame_num") or meta.get("clip_len"),
                num_steps=meta["sampling_steps"],
                shift=meta["shift"],
                guidance_scale=tuple(meta["guide_scale"]) if isinstance(meta["guide_scale"], list) else meta["guide_scale"],
                solver=meta.get("solver", "unipc"),
                noise=f"{folder}/noise.safetensors",
            )
            for key, name in PICTURES.get(variant, {"image_u8": "image"}).items():
                if key in tensors:
                    request = replace(request, **{name: picture(tensors[key], f"{folder}/{name}.png")})
            if variant == "vace":
                references = [picture(frame, f"{folder}/{i}.png") for i, frame in enumerate(tensors["refs_u8"])]
                request = replace(
                    request,
                    src_video=lossless(tensors["frames_u8"], f"{folder}/video.mkv"),
                    src_mask=lossless(tensors["masks_u8"][..., None].expand(-1, -1, -1, 3), f"{folder}/mask.mkv"),
                    src_ref_images=tuple(references),
                    context_scale=meta["context_scale"],
                )
            if variant == "animate":
                request = replace(
                    request, src_root_path=driving(tensors, folder), refert_num=meta["refert_num"], replace_flag=meta["replace"]
                )
            given = nullcontext()
            if variant == "s2v":
                request = replace(
                    request,
                    image=picture(tensors["ref_u8"], f"{folder}/image.png"),
                    audio=meta.get("wav") or hiss(f"{folder}/sound.wav"),
                    num_clip=meta["num_repeat"],
                    infer_frames=meta["infer_frames"],
                )
                if "wav" not in meta:  # what is heard is given
                    given = patch("wan_fast.conditioning.speech.bucketed", lambda *_: tensors["audio_emb"][0])
            with given:
                engine.generate(request, on_frames=chunks.append)
        return torch.cat(chunks, dim=1)


def size_of(meta):
    """Width and height; where the size is an area, any two factors of it."""
    width, height = meta.get("size") or meta.get("img") or (meta["max_area"], 1)
    area = meta.get("max_area", width * height)
    if area == width * height:
        return width, height
    return next((side, area // side) for side in range(1, area + 1) if area % side == 0 and side * side >= area)


def picture(pixels, file):
    """Write [H, W, 3] uint8; returns the file."""
    Image.fromarray(pixels.numpy()).save(file)
    return file


def driving(tensors, folder):
    """Write the files of Animate's preprocessing; returns the folder."""
    videos = {name: tensors[f"{name}_u8"] for name in ("pose", "bg") if f"{name}_u8" in tensors}
    videos["face"] = tensors["face_u8_32"].repeat_interleave(16, 1).repeat_interleave(16, 2)
    if "mask_u8" in tensors:
        videos["mask"] = tensors["mask_u8"][..., None].expand(-1, -1, -1, 3)
    for name, frames in videos.items():
        lossless(frames, f"{folder}/src_{name}.mp4")
    picture(tensors["ref_u8"], f"{folder}/src_ref.png")
    return folder


def hiss(file, seconds=2):
    """Write a sound; returns the file."""
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(torch.randint(-9999, 9999, (16000 * seconds,), dtype=torch.int16).numpy().tobytes())
    return file


def lossless(frames, file):
    """Write frames [F, H, W, 3] uint8 as they are; returns the file."""
    import av

    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return file


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
