"""Every option there is, in three frozen dataclasses. Standard library only: importable and testable without a GPU.

`EngineConfig` is what is fixed when an engine is built, `Request` what changes per video, `Output` what the command line
writes. The command line is generated from the fields; a field's `flags` are its names there, the official one first.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from os.path import exists, expanduser
from pathlib import Path
from typing import Any, Literal

from wan_fast.caches import CfgCache, StepCache
from wan_fast.errors import WanFastError as WanFastError
from wan_fast.few_steps import OFF, PRESETS, SIGMA_MAX, parse_preset
from wan_fast.lora import EXPERTS, Lora
from wan_fast.tasks import TASKS, TaskSpec

# fields of a request that name pictures, videos and sounds, and a folder of such
INPUTS = (
    "image",
    "first_frame",
    "last_frame",
    "src_video",
    "src_mask",
    "src_ref_images",
    "audio",
    "pose_video",
    "pose_image",
    "src_root_path",
)
# and others that only some tasks have
SPECIFIC = ("num_clip", "infer_frames", "start_from_ref", "refert_num", "replace_flag", "image_guidance_scale")
# sizes that a name stands for, as in VACE's own script
NAMED_SIZES = {"480p": (832, 480), "720p": (1280, 720)}
# what files of weights end in
PART_SUFFIXES = (".safetensors", ".pth", ".gguf")
# values of --attention that compute in 8 bits
ATTENTION_8BIT = ("int8", "fp8", "sage", "int8-sm90", "fp8-sm90")


def option(default: Any, help: str, *flags: str, parse: Callable[[str], Any] | None = None, unit: str = "") -> Any:
    metadata = {"help": help, "flags": flags, "parse": parse, "unit": unit}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def parse_size(text: str) -> tuple[int, int]:
    """'1280*704', '1280x704' or '720p' -> (width, height) in pixels."""
    if text.strip().lower() in NAMED_SIZES:
        return NAMED_SIZES[text.strip().lower()]
    match = re.fullmatch(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*", text)
    if not match:
        raise WanFastError(f"--size must be WIDTH*HEIGHT in pixels, got {text!r}; for example 1280*704")
    return int(match[1]), int(match[2])


def parse_guidance(text: str) -> float | tuple[float, float]:
    """'5' -> 5.0; '3,4' -> (3.0, 4.0), low-noise first."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise WanFastError(f"--sample_guide_scale must be one number or LOW,HIGH, got {text!r}; for example 5 or 3,4")
    return values[0] if len(values) == 1 else (values[0], values[1])


def parse_steps(text: str) -> tuple[int, int]:
    """'2' -> (2, 2); '4,1' -> (4, 1), first ones first."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", text)
    if not match:
        raise WanFastError(f"--keep_steps must be one number or FIRST,LAST, got {text!r}; for example 2 or 4,1")
    return int(match[1]), int(match[2] or match[1])


def parse_bytes(text: str) -> int | None:
    """'12GiB', '12GB', '800MiB' -> bytes; 'auto' -> None."""
    if text == "auto":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise WanFastError(f"--vram must be a size or auto, got {text!r}; for example 12GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** "KMGT".find(match[2].upper()) * base if match[2] else float(match[1]))


def parse_experts(text: str, spec: TaskSpec) -> dict[str, str]:
    """What --dit says of a task: 'FILE' -> {'model': 'FILE'}, 'high=FILE,low=FILE' -> paths by expert, of both or of one."""
    one_expert, text = spec.experts == ("model",), text.strip()
    if not re.match("(?:high|low)=", text) or (one_expert and exists(text)):
        if not one_expert:
            raise WanFastError(f"task {spec.name} has two experts, got --dit {text!r}; give --dit high=FILE,low=FILE")
        return {"model": text}
    if one_expert:
        raise WanFastError(f"task {spec.name} has one expert, got --dit {text!r}; give --dit FILE")
    # a comma may also be part of a path
    named = [part.split("=", 1) for part in re.split(r"\s*,\s*(?=(?:high|low)=)", text)]
    if len({name for name, _ in named}) < len(named):
        raise WanFastError(f"--dit {text!r} gives an expert twice; give --dit high=FILE,low=FILE")
    return {EXPERTS[name]: path for name, path in named}


def parse_file(text: str) -> str:
    """'~/a.png' -> '/home/me/a.png', which a shell does not do behind an equals sign."""
    return expanduser(text)


def parse_files(text: str) -> tuple[str, ...]:
    """'a.png,b.png' -> ('a.png', 'b.png')."""
    files = tuple(parse_file(part.strip()) for part in text.split(","))
    if not all(files):
        raise WanFastError(f"--src_ref_images must be FILE or FILE,FILE, got {text!r}; take out the empty one")
    return files


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        raise WanFastError(f"expected true or false, got {text!r}")
    return word in ("yes", "true", "t", "y", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything fixed when an engine is built.

    Raises:
        WanFastError: a value is not allowed.
    """

    task: str = option(..., "what to make, and with which model: " + " ".join(TASKS), "--task", unit="TASK")
    checkpoint: str | None = option(
        None,
        "folder with the weights, a hub id, or 'tiny' (comes with the package); absent: the task's official hub id",
        "--ckpt_dir",
        "--checkpoint",
        unit="PATH",
    )
    dit: str | None = option(
        None,
        "file with the DiT, in the place of the checkpoint's: .safetensors, .pth, .gguf, or a folder with one; of two experts "
        "high=FILE,low=FILE; where every part is given, no checkpoint is needed; phantom needs it",
        "--dit",
        "--phantom_ckpt",
        unit="FILE",
    )
    vae: str | None = option(None, "file with the VAE, likewise", "--vae", unit="FILE")
    text_encoder: str | None = option(
        None,
        "file with umT5, likewise; a tokenizer in it serves where the checkpoint has none",
        "--text_encoder",
        unit="FILE",
    )
    image_encoder: str | None = option(None, "file with CLIP's image tower, likewise", "--image_encoder", unit="FILE")
    unianimate: str | None = option(
        None,
        "file with UniAnimate's LoRA and encoders of poses, unianimate-14B: .ckpt or .safetensors",
        "--unianimate_ckpt",
        parse=parse_file,
        unit="FILE",
    )
    device: str = option("auto", "auto, cuda, cuda:1 or cpu", "--device")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto", "compute type of the DiT; auto is bf16 on a GPU, fp32 on a CPU", "--dtype"
    )
    precision: Literal["auto", "bf16", "fp8", "int8"] = option(
        "auto",
        "linears of the DiT's blocks; auto: in 8 bits where the checkpoint has them so; fp8, int8: quantised as they are "
        "loaded; bf16: in --dtype",
        "--precision",
    )
    scaling: Literal["auto", "row", "tensor", "block"] = option(
        "auto",
        "scales of linears in 8 bits; auto: the checkpoint's, else row; row: one per token and output channel; tensor: a "
        "calibrated one for all tokens; block: one per 128 values",
        "--scaling",
    )
    keep_blocks: int | None = option(
        None,
        "blocks at either end that are not in 8 bits; default: for linears 3 of 40, in proportion, for attention none",
        "--keep_blocks",
        unit="N",
    )
    vae_dtype: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "type of the VAE; auto is bf16 on a GPU unless --dtype is fp32, fp32 on a CPU", "--vae_dtype"
    )
    attention: Literal["auto", "sdpa", "flash", "xformers", "int8", "fp8", "sage", "int8-sm90", "fp8-sm90"] = option(
        "auto",
        "self-attention; auto: the best exact backend; int8, fp8: in 8 bits; sage: SageAttention; -sm90: CUDA C++ for Hopper, "
        "not measured yet",
        "--attention",
    )
    keep_steps: tuple[int, int] | None = option(
        None,
        "first and last steps whose attention is not in 8 bits, N or FIRST,LAST; default: none",
        "--keep_steps",
        parse=parse_steps,
        unit="N",
    )
    skip_softmax: float = option(
        0.0,
        "in attention in 8 bits, leave out tiles whose weights are all below this part of the row's largest; 0: none",
        "--skip_softmax",
        unit="PART",
    )
    quality: Literal["lossless", "high", "fast", "draft"] | None = option(
        None,
        "measured choice of precision, attention and caches; lossless: none that changes the picture; what is given beside it "
        "stays; the plan says what it took",
        "--quality",
        unit="lossless|high|fast|draft",
    )
    step_cache: str | None = option(
        None,
        "steps that reuse what the blocks added the step before: off, auto[:P%], teacache[:T], teacache-ret[:T], "
        "magcache[:T[,K[,R]]], every[:N[,R]], searched[:P%], or a quoted mask, '#' for a computed step and '.' for a reused "
        "one; T is a threshold, or P%, the share of steps to compute; default off",
        "--step-cache",
        unit="CACHE",
    )
    cfg_cache: str | None = option(
        None,
        "unconditional passes that are reconstructed from the conditional ones: off, difference[:N[,START]], "
        "frequency[:N[,START]], gate[:START]; at a computed step one is computed if the last was N steps before; all are "
        "before START, a part of the steps; default off",
        "--cfg-cache",
        unit="CACHE",
    )
    cfg_zero: int | None = option(
        None, "CFG-Zero*: guidance of optimal scale, and the first N steps predict nothing; default off", "--cfg-zero", unit="N"
    )
    calibration: str | None = option(
        None,
        "what wan-fast calibrate wrote, for the caches; default: beside the checkpoint, in the user's cache, or as published",
        "--calibration",
        unit="JSON",
    )
    kernels: Literal["auto", "reference"] = option(
        "auto", "auto: the fused kernels, where there is a GPU; reference: their definition in plain PyTorch", "--kernels"
    )
    vram: int | None = option(
        None, "memory budget the plan must keep, for example 12GiB; auto: what is free", "--vram", parse=parse_bytes
    )
    offload_model: bool | None = option(
        None,
        "keep on the GPU only the model at work; default: only where the plan needs it to fit",
        "--offload_model",
        parse=parse_bool,
        unit="BOOL",
    )
    t5_cpu: bool = option(False, "run the text encoder on the CPU", "--t5_cpu")
    lora: tuple[str, ...] = option(
        (),
        "LoRA to add to the DiT's weights, PATH[:STRENGTH]; for two experts also high=PATH,low=PATH, or a folder with "
        "high_noise_model and low_noise_model; may be given several times",
        "--lora",
        "--lora_dir",
        unit="LORA",
    )
    cuda_graphs: bool | None = option(
        None,
        "replay what a step, and a chunk of the VAE, issues as one CUDA graph; default: where there is a GPU and all models "
        "stay on it",
        "--cuda-graphs",
    )
    no_cache: bool = option(False, "neither take a prompt's embedding from the user's cache nor put it there", "--no-cache")
    use_relighting_lora: bool = option(
        False,
        "add the checkpoint's LoRA that fits a person to the light of the scene, animate-14B with --replace_flag",
        "--use_relighting_lora",
    )
    convert_model_dtype: bool = option(
        False, "round all weights of the DiT to bf16, as the official flag does", "--convert_model_dtype"
    )
    ulysses_size: int = option(
        1,
        "processes that share the heads of attention; several processes come with a later version",
        "--ulysses_size",
        unit="N",
    )
    ring_size: int = option(
        1, "processes that share the keys of attention, Wan 2.1; several come with a later version", "--ring_size", unit="N"
    )
    t5_fsdp: bool = option(False, "spread the text encoder over several processes; comes with a later version", "--t5_fsdp")
    dit_fsdp: bool = option(False, "spread the DiT over several processes; comes with a later version", "--dit_fsdp")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            close = get_close_matches(str(self.task), TASKS, 1)
            hint = f"did you mean {close[0]}?" if close else "choose one of " + " ".join(TASKS)
            if self.task == "s2v-1.3B":  # as Phantom's own program calls it
                hint = "it is Phantom's name for phantom-1.3B; take that one, or add --phantom_ckpt FILE"
            raise WanFastError(f"unknown task {self.task!r}; {hint}")
        if self.checkpoint is not None and not str(self.checkpoint).strip():
            raise WanFastError("--ckpt_dir is empty; give a folder, a hub id, or tiny")
        self._check_parts()
        if self.use_relighting_lora and self.spec.kind != "animate":
            raise WanFastError(f"--use_relighting_lora is of animate-14B, --task is {self.task}; leave it out")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise WanFastError(f"unknown device {self.device!r}; choose auto, cuda, cuda:N or cpu")
        _check_choice(self, "dtype", "auto", "bf16", "fp32")
        _check_choice(self, "precision", "auto", "bf16", "fp8", "int8")
        _check_choice(self, "scaling", "auto", "row", "tensor", "block")
        if self.keep_blocks is not None and self.keep_blocks < 0:
            raise WanFastError(f"--keep_blocks must be 0 or more, got {self.keep_blocks}")
        if self.precision == "int8" and self.scaling == "tensor":
            raise WanFastError("--scaling tensor is for fp8: an integer's scale is that of its token; take --scaling row")
        _check_choice(self, "vae_dtype", "auto", "bf16", "fp16", "fp32")
        _check_choice(self, "attention", "auto", "sdpa", "flash", "xformers", *ATTENTION_8BIT)
        if self.keep_steps is not None and not (
            isinstance(self.keep_steps, (tuple, list))
            and len(self.keep_steps) == 2
            and all(isinstance(count, int) and count >= 0 for count in self.keep_steps)
        ):
            raise WanFastError(f"--keep_steps must be two numbers of 0 or more, got {self.keep_steps}; for example 2,1")
        if not isinstance(self.skip_softmax, (int, float)) or not 0 <= self.skip_softmax < 1:
            raise WanFastError(f"--skip_softmax must be from 0 to below 1, got {self.skip_softmax}; for example 0.001")
        for flag, given in (("--keep_steps", self.keep_steps), ("--skip_softmax", self.skip_softmax)):
            # a preset's attention is known with the device
            if given and self.attention not in ATTENTION_8BIT and (self.quality is None or self.attention != "auto"):
                raise WanFastError(
                    f"{flag} is for attention in 8 bits, --attention is {self.attention}; add --attention int8, or leave it out"
                )
        _check_choice(self, "quality", None, "lossless", "high", "fast", "draft")
        _ = self.caches
        if self.cfg_zero is not None and not 0 <= self.cfg_zero <= 1000:
            raise WanFastError(
                f"--cfg-zero must be a number of steps from 0 to 1000, got {self.cfg_zero}; the authors take 2 of 50"
            )
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise WanFastError(
                f"--calibration {str(self.calibration)!r} is not a file; check the path, or run wan-fast calibrate"
            )
        _check_choice(self, "kernels", "auto", "reference")
        if not isinstance(self.lora, (list, tuple)) or not all(isinstance(lora, str) for lora in self.lora):
            raise WanFastError(f"lora must be a list of PATH[:STRENGTH], got {self.lora!r}; for example ['style.safetensors']")
        _ = self.loras
        if self.cuda_graphs and self.kernels == "reference":
            raise WanFastError("--cuda-graphs is for kernels, --kernels reference copies numbers from the host; leave one out")
        if self.cuda_graphs and self.offload_model:
            raise WanFastError(
                "--cuda-graphs and --offload_model True exclude each other: a graph holds the addresses of weights, and these "
                "move; leave one out"
            )
        if self.vram is not None and self.vram <= 0:
            raise WanFastError(f"--vram must be positive, got {self.vram} bytes")
        for flag, count in (("--ulysses_size", self.ulysses_size), ("--ring_size", self.ring_size)):
            if not isinstance(count, int) or count < 1:
                raise WanFastError(f"{flag} must be a number of processes, 1 or more, got {count!r}; 1 is one process")
        if self.ring_size > 1 and not self.spec.has_ring:
            raise WanFastError(
                f"--ring_size is of the Wan 2.1 tasks, got {self.ring_size} for {self.task}; take --ulysses_size "
                f"{self.ulysses_size * self.ring_size}"
            )
        if self.t5_cpu and self.t5_fsdp:
            raise WanFastError(
                "--t5_cpu has the text encoder on the CPU, --t5_fsdp spreads it over GPUs, got both; leave one out"
            )

    def _check_parts(self) -> None:
        for name, path in self.parts.items():
            flag = f"--{'dit' if name in self.spec.experts else name} {path!r}"
            if not path.strip():
                raise WanFastError(f"{flag} is empty; give a file")
            if not Path(path).exists():
                raise WanFastError(f"{flag} does not exist; check the path")
            if Path(path).suffix not in PART_SUFFIXES and not Path(path).is_dir():
                raise WanFastError(f"{flag} is no file of weights: its name must end in {' '.join(PART_SUFFIXES)}")
        if self.image_encoder is not None and not self.spec.image_tokens:
            raise WanFastError(f"task {self.task} takes no --image_encoder: its model has no input for one; leave it out")
        if (file := self.unianimate) is not None:
            if self.spec.extension != "pose":
                raise WanFastError(f"task {self.task} takes no --unianimate_ckpt {file!r}; take --task unianimate-14B")
            if not Path(file).is_file():
                raise WanFastError(f"--unianimate_ckpt {file!r} is not a file; check the path")

    @property
    def spec(self) -> TaskSpec:
        return TASKS[self.task]

    @property
    def parts(self) -> dict[str, str]:
        """What is given by itself: paths by expert, "vae", "text_encoder" and "image_encoder".

        Raises:
            WanFastError: --dit says something else of the experts than the task.
        """
        named = {} if self.dit is None else parse_experts(str(self.dit), self.spec)
        others = {name: getattr(self, name) for name in ("vae", "text_encoder", "image_encoder")}
        named |= {name: str(path) for name, path in others.items() if path is not None}
        return {name: expanduser(path) for name, path in named.items()}

    @property
    def caches(self) -> tuple[StepCache | None, CfgCache | None]:
        """What --step-cache and --cfg-cache say."""
        return StepCache.parse(self.step_cache or "off"), CfgCache.parse(self.cfg_cache or "off")

    @property
    def loras(self) -> tuple[Lora, ...]:
        """What --lora says, behind UniAnimate's own."""
        own = () if self.unianimate is None else (Lora(self.unianimate, flag="--unianimate_ckpt"),)
        return (*own, *(lora for text in self.lora for lora in Lora.parse(text)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One video: what to show and how to sample it. None means the model's own default.

    Raises:
        WanFastError: a value is not allowed, whatever the task.
    """

    prompt: str | None = option(None, "what the video shows", "--prompt", unit="TEXT")
    negative_prompt: str | None = option(
        None, "what it must not show; default: the model's official one", "--negative_prompt", unit="TEXT"
    )
    image: str | None = option(None, "picture to start from (ti2v-5B: optional)", "--image", parse=parse_file, unit="FILE")
    first_frame: str | None = option(None, "picture to start from, flf2v-14B", "--first_frame", parse=parse_file, unit="FILE")
    last_frame: str | None = option(
        None, "picture to end with, flf2v-14B, of the same size", "--last_frame", parse=parse_file, unit="FILE"
    )
    src_video: str | None = option(
        None,
        "video to follow or to change, vace: of poses, depth, or with --src_mask",
        "--src_video",
        parse=parse_file,
        unit="FILE",
    )
    src_mask: str | None = option(
        None, "video of what to make anew of --src_video, white, vace", "--src_mask", parse=parse_file, unit="FILE"
    )
    src_ref_images: tuple[str, ...] = option(
        (),
        "pictures of what is to be seen, vace; phantom: 1 to 4",
        "--src_ref_images",
        "--ref_image",
        parse=parse_files,
        unit="FILE,FILE",
    )
    context_scale: float = option(1.0, "strength of what vace follows", "--context_scale")
    audio: str | None = option(
        None,
        "what is spoken or sung, s2v-14B: a file with sound, which also says how long the video is; of animate-14B the sound "
        "that goes into the video, default: that of the folder's videos",
        "--audio",
        parse=parse_file,
        unit="FILE",
    )
    pose_video: str | None = option(
        None, "video of poses to follow, s2v-14B, unianimate-14B", "--pose_video", parse=parse_file, unit="FILE"
    )
    pose_image: str | None = option(
        None, "the pose in the picture, drawn as those of the video, unianimate-14B", "--pose_image", parse=parse_file,
        unit="FILE",
    )  # fmt: skip
    num_clip: int | None = option(
        None, "clips of a chain at most, s2v-14B; default: as many as the sound takes", "--num_clip", unit="N"
    )
    infer_frames: int | None = option(None, "frames of each clip, s2v-14B, 4n; default 80", "--infer_frames", unit="N")
    start_from_ref: bool = option(False, "the first clip goes on from the picture, s2v-14B", "--start_from_ref")
    src_root_path: str | None = option(
        None,
        "folder that the preprocessing made, animate-14B: src_pose.mp4, src_face.mp4, src_ref.png; to replace also src_bg.mp4 "
        "and src_mask.mp4",
        "--src_root_path",
        parse=parse_file,
        unit="FOLDER",
    )
    refert_num: int | None = option(
        None, "frames that a clip takes over from the one before, animate-14B: 1 or 5; default 1", "--refert_num", unit="N"
    )
    replace_flag: bool = option(
        False, "put the picture's person into the video, in the place of the one there, animate-14B", "--replace_flag"
    )
    size: tuple[int, int] | None = option(
        None,
        "WIDTH*HEIGHT in pixels, 480p or 720p; with --image, --first_frame or --src_video an area, whose shape these give",
        "--size",
        parse=parse_size,
        unit="W*H",
    )
    num_frames: int | None = option(None, "frames, 4n+1", "--frame_num", "--num_frames")
    fps: float | None = option(None, "frames per second of the file", "--fps", "--sample_fps")
    num_steps: int | None = option(None, "denoising steps", "--sample_steps", "--num_steps")
    shift: float | None = option(None, "shift of the noise schedule", "--sample_shift", "--shift")
    guidance_scale: float | tuple[float, float] | None = option(
        None,
        "classifier-free guidance; LOW,HIGH for models with two experts",
        "--sample_guide_scale",
        "--guidance_scale",
        "--sample_guide_scale_text",
        parse=parse_guidance,
        unit="G",
    )
    image_guidance_scale: float | None = option(
        None, "guidance by the pictures, phantom; default 5", "--sample_guide_scale_img", "--image_guidance_scale"
    )
    solver: Literal["unipc", "dpm++", "euler", "lcm"] | None = option(
        None,
        "solver of the flow, unipc unless a preset says otherwise; lcm: for models distilled to a few steps, with fresh noise "
        "at each and no guidance",
        "--sample_solver",
        "--solver",
        unit="unipc|dpm++|euler|lcm",
    )
    preset: str | None = option(
        None,
        f"sampler of a distilled model: {', '.join(PRESETS)}; for rcm with :S, its largest sigma; default: what the checkpoint "
        "or a LoRA is named after; off: none",
        "--preset",
        unit="PRESET",
    )
    seed: int | None = option(None, "seed of the noise; negative: drawn, and printed", "--base_seed", "--seed")
    noise: str | None = option(
        None,
        "start from the tensor 'noise' [C, T, H, W] of this file instead of the seed",
        "--noise",
        parse=parse_file,
        unit="SAFETENSORS",
    )

    def __post_init__(self) -> None:
        # what is settled is the length of a chain, whose clips may come to another
        asked = None if isinstance(self, Resolved) else self.num_frames
        if asked is not None and (asked < 1 or asked % 4 != 1):
            low = max(1, (asked - 1) // 4 * 4 + 1)
            near = str(low) if asked < 1 else f"{low} or {low + 4}"
            raise WanFastError(f"--frame_num must be 4n+1, got {asked}; take {near}")
        for count, least in (("num_clip", 1), ("infer_frames", 4)):
            if (value := getattr(self, count)) is not None and value < least:
                raise WanFastError(f"--{count} must be {least} or more, got {value}")
        if self.infer_frames is not None and self.infer_frames % 4:
            low = self.infer_frames // 4 * 4
            raise WanFastError(f"--infer_frames must be a multiple of 4, got {self.infer_frames}; take {low} or {low + 4}")
        if self.refert_num not in (None, 1, 5):
            raise WanFastError(f"--refert_num must be 1 or 5, got {self.refert_num}; 1 is what the examples take")
        if self.num_steps is not None and not 1 <= self.num_steps <= 1000:
            raise WanFastError(f"--sample_steps must be from 1 to 1000, got {self.num_steps}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise WanFastError(f"--size must be two positive numbers, got {self.size}")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise WanFastError(f"--sample_shift must be a positive number, got {self.shift}")
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise WanFastError(f"--fps must be from 1 to 240, got {self.fps}")
        if self.guidance_scale is not None and not all(map(math.isfinite, _pair(self.guidance_scale))):
            raise WanFastError(f"--sample_guide_scale must be finite, got {self.guidance_scale}")
        if self.image_guidance_scale is not None and not math.isfinite(self.image_guidance_scale):
            raise WanFastError(f"--sample_guide_scale_img must be finite, got {self.image_guidance_scale}; 5 is the default")
        _check_choice(self, "solver", None, "unipc", "dpm++", "euler", "lcm")
        if self.preset is not None:
            parse_preset(self.preset)
        if self.seed is not None and self.seed >= 2**63:
            raise WanFastError(f"--base_seed must be below 2**63, got {self.seed}")
        listed = isinstance(self.src_ref_images, (list, tuple))
        if not listed or not all(isinstance(path, (str, Path)) for path in self.src_ref_images):
            raise WanFastError(f"src_ref_images must be a list of files, got {self.src_ref_images!r}; for example ['cat.png']")
        if not 0 <= self.context_scale <= 10:
            raise WanFastError(f"--context_scale must be from 0 to 10, got {self.context_scale}; 1 is what it was trained with")
        for name in (*INPUTS, "noise"):
            for path in self.given(name):
                if not Path(path).is_file() and not (name == "src_root_path" and Path(path).is_dir()):
                    what = "folder" if name == "src_root_path" else "file"
                    raise WanFastError(f"--{name} {str(path)!r} is not a {what}; check the path")

    def given(self, name: str) -> tuple[str, ...]:
        """The files that a field names."""
        value = getattr(self, name)
        return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)

    @property
    def is_area(self) -> bool:
        """Whether `size` is an area, whose shape a picture or a video gives."""
        return any(self.given(name) for name in ("image", "first_frame", "src_video", "src_root_path"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Request):
    """A request that leaves nothing open; `size` and `num_frames` are what was asked for, until the plan settles them.

    preset: with its largest sigma, where it has one; None for a solver on its own grid.
    """

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    num_frames: int
    fps: float
    num_steps: int
    shift: float
    guidance_scale: tuple[float, float]
    solver: str  # type: ignore[assignment]
    seed: int

    @property
    def two_scales(self) -> bool:
        """Whether the guidance by pictures takes a pass of its own: not where it is none, or that by the text."""
        return self.image_guidance_scale not in (None, 1.0, self.guidance_scale[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What the command line writes, beside the video itself."""

    save_file: str | None = option(
        None, "the file to write: .mp4 .webm .gif, or .png for one frame; default: a name from task and prompt",
        "--save_file", unit="FILE",
    )  # fmt: skip
    save_latents: str | None = option(
        None, "also write the final latents, tensor 'latents' [C, T, H, W] fp32", "--save-latents", unit="SAFETENSORS"
    )
    save_frames: str | None = option(
        None, "also write the frames before rounding, tensor 'frames' [3, F, H, W] fp32", "--save-frames",
        unit="SAFETENSORS",
    )  # fmt: skip
    stats: str | None = option(None, "also write seconds, peak memory and the plan as JSON", "--stats", unit="JSON")
    profile: bool = option(
        False,
        "also print where the time goes, and write a Chrome trace beside the video, NAME.trace.json; it records every "
        "operator: take few --sample_steps",
        "--profile",
    )
    quiet: bool = option(False, "no progress bars", "--quiet")


def resolve(spec: TaskSpec, request: Request, defaults: Request | None = None) -> Resolved:
    """Fill what `request` leaves open from the checkpoint's own `defaults`, then from the task; hold it against the task.

    Raises:
        WanFastError: the request does not fit the task.
    """
    for name in INPUTS:
        if (given := ",".join(map(str, request.given(name)))) and name not in spec.takes:
            fit = " ".join(other.name for other in TASKS.values() if name in other.takes)
            raise WanFastError(f"task {spec.name} takes no --{name} (given {given!r}); tasks that do: {fit}")
    for name in SPECIFIC:
        if (value := getattr(request, name)) not in (None, False) and name not in spec.takes:
            fit = " ".join(other.name for other in TASKS.values() if name in other.takes)
            raise WanFastError(f"task {spec.name} takes no {_flag(Request, name)} (given {value}); tasks that do: {fit}")
    for name in INPUTS:
        if not request.given(name) and name in spec.needs:
            raise WanFastError(f"task {spec.name} needs --{name}, got none; add --{name} FILE")
    if request.context_scale != 1 and not spec.vace_layers:
        raise WanFastError(f"--context_scale is of the vace tasks, --task is {spec.name}; leave it out")
    prompt = request.prompt if request.prompt is not None else spec.prompt
    if not (prompt or "").strip():
        raise WanFastError(f'task {spec.name} needs a prompt, got none; add --prompt "..."')

    def chosen(name: str, last: Any) -> Any:
        values = (getattr(request, name), defaults and getattr(defaults, name), last)
        return next(value for value in values if value is not None)

    size = chosen("size", spec.default_size)
    is_480p = spec.shift_480p is not None and tuple(sorted(size)) == (480, 832)
    sampling = of_preset(spec, request, request.preset or OFF) or {
        "preset": None,
        "num_steps": chosen("num_steps", spec.num_steps),
        "shift": chosen("shift", spec.shift_480p if is_480p else spec.shift),
        "solver": (solver := chosen("solver", spec.solver)),
        "guidance_scale": _pair(
            (request.guidance_scale or 1.0) if solver == "lcm" else chosen("guidance_scale", spec.guidance_scale)
        ),
    }
    if spec.image_guidance_scale is not None:
        without = sampling["preset"] is not None or sampling["solver"] == "lcm"
        sampling["image_guidance_scale"] = chosen("image_guidance_scale", 1.0 if without else spec.image_guidance_scale)
        if without and sampling["image_guidance_scale"] != 1:
            raise WanFastError(
                f"--sample_guide_scale_img {sampling['image_guidance_scale']:g}: guidance blurs what models distilled to a few "
                "steps make; leave it out"
            )
    resolved = Resolved(
        **{
            **{f.name: getattr(request, f.name) for f in fields(request)},
            "size": size,
            "num_frames": chosen("num_frames", spec.num_frames),
            "fps": chosen("fps", spec.fps),
            **sampling,
            "prompt": prompt,
            "negative_prompt": chosen("negative_prompt", spec.negative_prompt),
            "seed": with_seed(request).seed,
        }
    )
    low, high = resolved.guidance_scale
    if resolved.solver == "lcm" and resolved.guidance_scale != (1.0, 1.0):
        raise WanFastError(
            f"--sample_solver lcm is for distilled models, which guidance blurs: got --sample_guide_scale {low:g}; leave it out"
        )
    if spec.boundary is None and low != high:
        raise WanFastError(f"task {spec.name} has one expert, got two guidance scales ({low:g},{high:g}); give one number")
    if spec.image_only and resolved.num_frames != 1:
        raise WanFastError(f"task {spec.name} makes one picture, got --frame_num {resolved.num_frames}; leave it out")
    grid = spec.vae_spec.grid
    if not request.is_area and (size[0] % grid or size[1] % grid):
        near = "*".join(str(max(grid, round(side / grid) * grid)) for side in size)
        raise WanFastError(
            f"--size {size[0]}*{size[1]} is not on the {grid}-pixel grid of {spec.name}; the nearest that is: {near}"
        )
    return resolved


def of_preset(spec: TaskSpec, request: Request, asked: str) -> dict[str, Any]:
    """What a preset says of the sampling; empty for none.

    Raises:
        WanFastError: there is no such preset, or the request says something else of the sampling.
    """
    name, sigma_max = parse_preset(asked)
    if name == OFF:
        return {}
    preset, said = PRESETS[name], f"--preset {asked}"
    if request.solver not in (None, preset.solver):
        raise WanFastError(
            f"{said} is a sampler of its own, of solver {preset.solver}: got --sample_solver {request.solver}; leave it out"
        )
    if request.num_steps not in (None, *preset.steps):
        able = " or ".join(map(str, sorted(preset.steps)))
        raise WanFastError(f"{said} has {able} steps: got --sample_steps {request.num_steps}; leave it out")
    if request.guidance_scale is not None and _pair(request.guidance_scale) != (1.0, 1.0):
        raise WanFastError(
            f"{said} has no guidance, as its models were distilled with it, and blur with more: got --sample_guide_scale "
            f"{','.join(f'{scale:g}' for scale in dict.fromkeys(_pair(request.guidance_scale)))}; leave it out"
        )
    if request.shift is not None and preset.shift is None:
        raise WanFastError(f"{said} has its own noise levels: got --sample_shift {request.shift:g}; leave it out")
    shift = preset.shift_of_two if preset.shift_of_two and spec.boundary is not None else preset.shift
    if preset.sigma_max:
        sigma_max = sigma_max or SIGMA_MAX["image" in spec.needs or request.image is not None]
    return {
        "preset": f"{name}:{sigma_max:.10g}" if preset.sigma_max else name,
        "num_steps": request.num_steps or preset.steps[0],
        "shift": request.shift or shift or 1.0,
        "solver": preset.solver,
        "guidance_scale": (1.0, 1.0),
    }


def _flag(cls: type, name: str) -> str:
    """What a field is called on the command line."""
    return next(field.metadata["flags"][0] for field in fields(cls) if field.name == name)


def with_seed(request: Request) -> Request:
    """The request with a seed drawn where it has none or a negative one."""
    if request.seed is not None and request.seed >= 0:
        return request
    return replace(request, seed=random.randrange(2**31))


def _pair(scale: float | tuple[float, float]) -> tuple[float, float]:
    return (float(scale), float(scale)) if isinstance(scale, (int, float)) else (float(scale[0]), float(scale[1]))


def _check_choice(options: Any, name: str, *allowed: str | None) -> None:
    value = getattr(options, name)
    if value not in allowed:
        raise WanFastError(f"--{name} must be one of {' '.join(filter(None, allowed))}, got {value!r}")
