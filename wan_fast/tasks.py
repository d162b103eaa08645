"""The facts in which the Wan models differ, one frozen row per task. Standard library only.

Sources: the published configurations of Wan 2.1 and Wan 2.2 (Wan-Video, Apache-2.0), technical report arXiv 2503.20314.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD_DIM = 128
PATCH = (1, 2, 2)
# How far a pixel sees sideways from below the three upper levels of the VAE's decoder, counted there, where width and height
# are twice the latent's: six convolutions per level, one per doubling and one in the head, of 3 x 3 each, are
# 6 + (1 + 6) / 2 + (1 + 6 + 1) / 4 = 11.5.
TILE_HALO = 12
# How many chunks of 4 frames the result of the VAE's encoder depends on before its own, behind each level and at the end:
# convolutions over two earlier frames, 1 + 4 of them, then 4 and one over a single frame to halve the frames: 19 frames,
# 5 chunks; where a chunk is two frames 9, 5 chunks more; where it is one 18 chunks more.
ENCODER_REACH = (3, 5, 10, 28)
TEXT_LEN = 512
TEXT_DIM = 4096
FREQ_DIM = 256
# of CLIP's image tower, and of a head there
IMAGE_DIM, CLIP_HEAD_DIM = 1280, 80
# what the VACE branch is given: latents of what stays, of what changes, and 8 x 8 pixels of the mask
VACE_DIM = 16 + 16 + 64
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSpec:
    """Facts of one VAE. `stride` is (time, height, width) in pixels per latent; widths are those of the released model."""

    version: str
    channels: int
    stride: tuple[int, int, int]
    encoder_dim: int
    decoder_dim: int
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str

    @property
    def grid(self) -> int:
        """Pixels that width and height must be a multiple of: the spatial stride times the DiT's patch."""
        return self.stride[1] * PATCH[1]

    def latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self.stride[0] + 1

    def latent_shape(self, size: tuple[int, int], num_frames: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of a clip of `size` (width, height) pixels."""
        width, height = size
        return self.channels, self.latent_frames(num_frames), height // self.stride[1], width // self.stride[2]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


VAES = {
    "2.1": VaeSpec(
        version="2.1",
        channels=16,
        stride=(4, 8, 8),
        encoder_dim=96,
        decoder_dim=96,
        patch=1,
        file="Wan2.1_VAE.pth",
        mean=_numbers(
            "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 "
            "0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"
        ),
        std=_numbers(
            "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"
        ),
    ),
    "2.2": VaeSpec(
        version="2.2",
        channels=48,
        stride=(4, 16, 16),
        encoder_dim=160,
        decoder_dim=256,
        patch=2,
        file="Wan2.2_VAE.pth",
        mean=_numbers(
            "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 "
            "-0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 -0.1825 "
            "-0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 "
            "-0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 "
            "-0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 "
            "0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667"
        ),
        std=_numbers(
            "0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 "
            "0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 "
            "0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 "
            "0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 "
            "0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 "
            "0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744"
        ),
    ),
}

_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_NEGATIVE_S2V = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)

SIZES_480P = ((480, 832), (832, 480))
SIZES_720P = ((720, 1280), (1280, 720))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task: the released model's dimensions, the official sampling defaults, the inputs it takes.

    `kind` picks the function that prepares the conditioning; `sizes` are (width, height) pairs the model was trained for;
    `guidance_scale` is (low-noise, high-noise), equal for models with one expert; `boundary` is the fraction of the
    1000 training timesteps from which on the high-noise expert runs; `shift_480p` replaces `shift` at the 480P sizes;
    `prompt` is taken where none is given; `extension`: the field of `manifest.DiTDims` for what the model has beyond the image
    and VACE branches; `seed_per_clip`: each clip of a chain has its own noise, of the seed and its number, and in bf16;
    `image_guidance_scale`: guidance by the pictures, where it is another than by the text; `own_file`: the field of
    `config.EngineConfig`, and the hub repository, of what the task needs beside the checkpoint of `hub_id`.
    """

    name: str
    kind: str
    model_type: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    vae: str
    num_steps: int = 50
    shift: float = 5.0
    shift_480p: float | None = None
    solver: str = "unipc"
    guidance_scale: tuple[float, float] = (5.0, 5.0)
    image_guidance_scale: float | None = None
    boundary: float | None = None
    num_frames: int = 81
    fps: int = 16
    sizes: tuple[tuple[int, int], ...] = SIZES_720P + SIZES_480P
    default_size: tuple[int, int] = (1280, 720)
    negative_prompt: str = _NEGATIVE
    prompt: str | None = None
    takes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset({"prompt"})
    image_only: bool = False
    seed_per_clip: bool = False
    image_tokens: int = 0
    audio_encoder: bool = False
    vace_layers: tuple[int, ...] = ()
    extension: str = ""
    own_file: tuple[str, str] | None = None
    hub_id: str
    hub_id_diffusers: str | None = None

    @property
    def vae_spec(self) -> VaeSpec:
        return VAES[self.vae]

    @property
    def has_ring(self) -> bool:
        """Whether the official code of the model has ring attention: that of Wan 2.1 has."""
        return "/Wan2.1-" in self.hub_id

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the DiTs the task runs, in the order they run."""
        return ("high_noise", "low_noise") if self.boundary is not None else ("model",)


_1B: dict[str, Any] = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, out_dim=16, vae="2.1")
_14B: dict[str, Any] = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, out_dim=16, vae="2.1")
_5B: dict[str, Any] = dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, out_dim=48, vae="2.2")
_SMALL_SIZES: dict[str, Any] = dict(sizes=SIZES_480P, default_size=(832, 480))
_PHANTOM: dict[str, Any] = dict(
    kind="subjects",
    model_type="t2v",
    in_dim=16,
    guidance_scale=(7.5, 7.5),
    image_guidance_scale=5.0,
    default_size=(832, 480),
    needs=frozenset({"prompt", "src_ref_images"}),
    takes=frozenset({"src_ref_images", "image_guidance_scale"}),
    own_file=("dit", "bytedance-research/Phantom"),
)


def _row(name: str, repo: str, *, diffusers: str | None = "-Diffusers", **facts) -> TaskSpec:
    hub_id = f"Wan-AI/{repo}"
    return TaskSpec(name=name, hub_id=hub_id, hub_id_diffusers=diffusers and hub_id + diffusers, **facts)


TASKS: dict[str, TaskSpec] = {
    row.name: row
    for row in (
        _row("t2v-1.3B", "Wan2.1-T2V-1.3B", kind="text", model_type="t2v", in_dim=16, **_1B, **_SMALL_SIZES),
        _row("t2v-14B", "Wan2.1-T2V-14B", kind="text", model_type="t2v", in_dim=16, **_14B),
        _row(
            "t2i-14B",
            "Wan2.1-T2V-14B",
            kind="text",
            model_type="t2v",
            in_dim=16,
            num_frames=1,
            image_only=True,
            sizes=SIZES_720P + SIZES_480P + ((1024, 1024),),
            **_14B,
        ),
        _row(
            "i2v-14B",
            "Wan2.1-I2V-14B-720P",
            kind="image",
            model_type="i2v",
            in_dim=36,
            num_steps=40,
            shift_480p=3.0,
            image_tokens=257,
            needs=frozenset({"prompt", "image"}),
            takes=frozenset({"image"}),
            negative_prompt="镜头晃动，" + _NEGATIVE,
            **_14B,
        ),
        _row(
            "flf2v-14B",
            "Wan2.1-FLF2V-14B-720P",
            diffusers="-diffusers",
            kind="first_last",
            model_type="flf2v",
            in_dim=36,
            shift=16.0,
            image_tokens=514,
            needs=frozenset({"prompt", "first_frame", "last_frame"}),
            takes=frozenset({"first_frame", "last_frame"}),
            negative_prompt="镜头切换，镜头晃动，" + _NEGATIVE,
            **_14B,
        ),
        _row(
            "vace-1.3B",
            "Wan2.1-VACE-1.3B",
            diffusers="-diffusers",
            kind="vace",
            model_type="vace",
            in_dim=16,
            shift=16.0,
            vace_layers=tuple(range(0, 30, 2)),
            takes=frozenset({"src_video", "src_mask", "src_ref_images"}),
            **_1B,
            **_SMALL_SIZES,
        ),
        _row(
            "vace-14B",
            "Wan2.1-VACE-14B",
            diffusers="-diffusers",
            kind="vace",
            model_type="vace",
            in_dim=16,
            shift=16.0,
            vace_layers=tuple(range(0, 40, 5)),
            takes=frozenset({"src_video", "src_mask", "src_ref_images"}),
            **_14B,
        ),
        _row(
            "t2v-A14B",
            "Wan2.2-T2V-A14B",
            kind="text",
            model_type="t2v",
            in_dim=16,
            num_steps=40,
            shift=12.0,
            guidance_scale=(3.0, 4.0),
            boundary=0.875,
            **_14B,
        ),
        _row(
            "i2v-A14B",
            "Wan2.2-I2V-A14B",
            kind="image",
            model_type="i2v",
            in_dim=36,
            num_steps=40,
            guidance_scale=(3.5, 3.5),
            boundary=0.9,
            needs=frozenset({"prompt", "image"}),
            takes=frozenset({"image"}),
            **_14B,
        ),
        _row(
            "ti2v-5B",
            "Wan2.2-TI2V-5B",
            kind="text_image",
            model_type="ti2v",
            in_dim=48,
            num_frames=121,
            fps=24,
            sizes=((704, 1280), (1280, 704)),
            default_size=(1280, 704),
            takes=frozenset({"image"}),
            **_5B,
        ),
        _row(
            "s2v-14B",
            "Wan2.2-S2V-14B",
            diffusers=None,
            kind="speech",
            audio_encoder=True,
            seed_per_clip=True,
            model_type="s2v",
            in_dim=16,
            num_steps=40,
            shift=3.0,
            guidance_scale=(4.5, 4.5),
            num_frames=80,
            default_size=(1024, 704),
            sizes=(*SIZES_720P, *SIZES_480P, (1024, 704), (704, 1024)),
            needs=frozenset({"prompt", "image", "audio"}),
            takes=frozenset({"image", "audio", "pose_video", "num_clip", "infer_frames", "start_from_ref"}),
            extension="speech",
            negative_prompt=_NEGATIVE_S2V,
            **_14B,
        ),
        _row(
            "animate-14B",
            "Wan2.2-Animate-14B",
            kind="animate",
            model_type="animate",
            in_dim=36,
            num_steps=20,
            guidance_scale=(1.0, 1.0),
            num_frames=77,
            fps=30,
            image_tokens=257,
            needs=frozenset({"src_root_path"}),
            prompt="视频中的人在做动作",
            takes=frozenset({"src_root_path", "audio", "refert_num", "replace_flag"}),
            extension="face",
            **_14B,
        ),
        # VAE and text encoder are those of Wan 2.1, whichever the size
        _row("phantom-1.3B", "Wan2.1-T2V-1.3B", **_PHANTOM, **_1B),
        _row("phantom-14B", "Wan2.1-T2V-1.3B", num_frames=121, fps=24, sizes=SIZES_480P, **_PHANTOM, **_14B),
        _row(
            "unianimate-14B",
            "Wan2.1-I2V-14B-720P",
            kind="poses",
            model_type="i2v",
            in_dim=36,
            solver="euler",
            guidance_scale=(1.5, 1.5),
            default_size=(832, 480),
            image_tokens=257,
            needs=frozenset({"prompt", "image", "pose_video"}),
            takes=frozenset({"image", "pose_video", "pose_image"}),
            prompt="a person is dancing",
            negative_prompt="镜头晃动，" + _NEGATIVE,
            extension="pose",
            own_file=("unianimate", "ZheWang123/UniAnimate-DiT"),
            **_14B,
        ),
    )
}
