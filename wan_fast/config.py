"""Every option there is, in three frozen dataclasses. Standard library only: importable and testable without a GPU.

`EngineConfig` is what is fixed when an engine is built, `Request` what changes per video, `Output` what the command line
writes. The command line is generated from the fields; a field's `flags` are its names there, the official one first.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import expanduser
from pathlib import Path
from typing import ClassVar, Literal

from wan_fast.caches import CfgCache, StepCache
from wan_fast.errors import WanFastError as WanFastError
from wan_fast.few_steps import PRESETS, parse_preset
from wan_fast.lora import Lora
from wan_fast.parsing import (
    check_choice,
    check_types,
    option,
    pair,
    parse_bool,
    parse_bytes,
    parse_experts,
    parse_file,
    parse_files,
    parse_guidance,
    parse_size,
    parse_steps,
)
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
# what files of weights end in
PART_SUFFIXES = (".safetensors", ".pth", ".gguf")
# values of --attention that compute in 8 bits
ATTENTION_8BIT = ("int8", "fp8", "sage", "int8-sm90", "fp8-sm90")


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
        check_types(self)
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
        check_choice(self, "dtype", "auto", "bf16", "fp32")
        check_choice(self, "precision", "auto", "bf16", "fp8", "int8")
        check_choice(self, "scaling", "auto", "row", "tensor", "block")
        if self.keep_blocks is not None and self.keep_blocks < 0:
            raise WanFastError(f"--keep_blocks must be 0 or more, got {self.keep_blocks}")
        if self.precision == "int8" and self.scaling == "tensor":
            raise WanFastError("--scaling tensor is for fp8: an integer's scale is that of its token; take --scaling row")
        check_choice(self, "vae_dtype", "auto", "bf16", "fp16", "fp32")
        check_choice(self, "attention", "auto", "sdpa", "flash", "xformers", *ATTENTION_8BIT)
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
        check_choice(self, "quality", None, "lossless", "high", "fast", "draft")
        _ = self.caches
        if self.cfg_zero is not None and not 0 <= self.cfg_zero <= 1000:
            raise WanFastError(
                f"--cfg-zero must be a number of steps from 0 to 1000, got {self.cfg_zero}; the authors take 2 of 50"
            )
        if self.calibration is not None and not Path(self.calibration).is_file():
            raise WanFastError(
                f"--calibration {str(self.calibration)!r} is not a file; check the path, or run wan-fast calibrate"
            )
        check_choice(self, "kernels", "auto", "reference")
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
            own = self.spec.own_file is not None and self.spec.own_file[0] == "dit"
            flag = f"--{name if name not in self.spec.experts else 'phantom_ckpt' if own else 'dit'} {path!r}"
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

    settled: ClassVar[bool] = False

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
        check_types(self)
        # what is settled may be the length of a chain
        asked = None if self.settled else self.num_frames
        if asked is not None and (asked < 1 or asked % 4 != 1):
            low = max(1, (asked - 1) // 4 * 4 + 1)
            near = str(low) if asked < 1 else f"{low} or {low + 4}"
            raise WanFastError(f"--frame_num must be 4n+1, got {asked}; take {near}")
        for count, least in (("num_clip", 1), ("infer_frames", 4)):
            if (value := getattr(self, count)) is not None and value < least:
                raise WanFastError(f"--{count} must be {least} or more, got {value}; leave it out for the usual number")
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
        if self.guidance_scale is not None and not all(map(math.isfinite, pair(self.guidance_scale))):
            raise WanFastError(f"--sample_guide_scale must be finite, got {self.guidance_scale}")
        if self.image_guidance_scale is not None and not math.isfinite(self.image_guidance_scale):
            raise WanFastError(f"--sample_guide_scale_img must be finite, got {self.image_guidance_scale}; 5 is the default")
        check_choice(self, "solver", None, "unipc", "dpm++", "euler", "lcm")
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
