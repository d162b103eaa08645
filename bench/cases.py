"""The registry: every case is one piece of work done by this engine and by a rival, on the same weights and inputs.

A case's `make` builds both sides and returns two functions of no arguments that give comparable tensors; imports of
rivals stay inside. Later work adds rows here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from models import official_grid

from wan_fast.checkpoint import locate
from wan_fast.config import EngineConfig, Request
from wan_fast.dit import WanDiT, grid_of
from wan_fast.engine import Engine
from wan_fast.manifest import DiTDims, VaeDims, stays_fp32
from wan_fast.names import DIT_NAMES, VAE21_NAMES, VAE22_NAMES, native_name
from wan_fast.planning import DECODE_CHUNKS
from wan_fast.tasks import TASKS, VAES
from wan_fast.vae import WanVAE

Pair = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """`name` says what, at which shape and dtype; `tolerance` is the relative L2 difference the two sides may show."""

    name: str
    make: Callable[[], Pair]
    tolerance: float


def dit(dims: DiTDims, shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """One forward; the text is projected once for ours, as in a run, and at every call in diffusers."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=dims.num_heads,
        in_channels=dims.in_dim,
        out_channels=dims.out_dim,
        text_dim=dims.text_dim,
        ffn_dim=dims.ffn_dim,
        num_layers=dims.num_layers,
    ).eval()
    with torch.device("meta"):
        ours = WanDiT(dims)
    state = {native_name(n, DIT_NAMES): t for n, t in theirs.state_dict().items()}
    ours.load_state_dict(
        {n: t.to(torch.float32 if stays_fp32(n) else dtype) for n, t in state.items()}, assign=True, strict=True
    )
    theirs.to(dtype)
    x, text = torch.randn(1, *shape), torch.randn(1, dims.text_len, dims.text_dim)
    context = ours.prepare([text[0]], grid_of(x.shape))
    t = torch.tensor([700.0])
    return (
        lambda: ours(x, t[:, None], context),
        lambda: theirs(x.to(dtype), t, text.to(dtype), return_dict=False)[0].float(),
    )


def vae(dims: VaeDims, shape: tuple[int, ...], encode: bool) -> Pair:
    """Decode latents, or encode a video of that latent size, in fp32."""
    from diffusers import AutoencoderKLWan

    spec = VAES[dims.version]
    residual = dims.version == "2.2"
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(
        base_dim=dims.encoder_dim,
        decoder_base_dim=dims.decoder_dim,
        z_dim=dims.channels,
        latents_mean=list(spec.mean),
        latents_std=list(spec.std),
        is_residual=residual,
        in_channels=12 if residual else 3,
        out_channels=12 if residual else 3,
        patch_size=2 if residual else None,
        scale_factor_spatial=spec.stride[1],
    ).eval()
    ours = WanVAE(dims)
    names = VAE22_NAMES if residual else VAE21_NAMES
    ours.load_state_dict({native_name(n, names): t for n, t in theirs.state_dict().items()})
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (spec.mean, spec.std))
    if not encode:
        z = torch.randn(shape)
        return lambda: ours.decode(z, chunk=DECODE_CHUNKS[0]), lambda: theirs.decode(z[None] * std + mean, return_dict=False)[
            0
        ][0]
    frames, height, width = 4 * (shape[1] - 1) + 1, shape[2] * spec.stride[1], shape[3] * spec.stride[2]
    video = torch.rand(3, frames, height, width) * 2 - 1
    return (
        lambda: ours.encode(video),
        lambda: ((theirs.encode(video[None]).latent_dist.mode() - mean) / std)[0],
    )


def end_to_end(size: tuple[int, int], num_frames: int, num_steps: int) -> Pair:
    """Prompt to 8-bit frames on the bundled checkpoint, models loaded, one noise and one sigma grid for both."""
    from diffusers import WanPipeline

    torch.manual_seed(0)
    spec = TASKS["ti2v-5B"]
    pipe = WanPipeline.from_pretrained(str(locate("tiny", spec)), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = official_grid(num_steps, spec.shift)
    engine = Engine(EngineConfig(task=spec.name, checkpoint="tiny", device="cpu", dtype="fp32"))
    request = Request(prompt="a red ball bounces", size=size, num_frames=num_frames, num_steps=num_steps, seed=0)
    noise = torch.randn(spec.vae_spec.latent_shape(size, num_frames), generator=torch.Generator().manual_seed(0))

    def theirs() -> torch.Tensor:
        frames = pipe(
            prompt=request.prompt,
            negative_prompt=spec.negative_prompt,
            width=size[0],
            height=size[1],
            num_frames=num_frames,
            num_inference_steps=num_steps,
            latents=noise[None].clone(),
            output_type="np",
        ).frames[0]
        return torch.from_numpy(frames * 255)

    return lambda: engine.generate(request).frames.float(), theirs


_TOY = DiTDims(dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=48, out_dim=48, text_dim=64)
_NARROW = DiTDims(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2, in_dim=16, out_dim=16)
_VAE21 = VaeDims(version="2.1", encoder_dim=96, decoder_dim=96, channels=16)
_VAE22 = VaeDims(version="2.2", encoder_dim=160, decoder_dim=256, channels=48)
_VAE22_TOY = VaeDims(version="2.2", encoder_dim=8, decoder_dim=12, channels=48)
_FP32, _BF16 = torch.float32, torch.bfloat16

CPU_CASES = (
    Case("dit toy width, latents 48x9x8x8, fp32", partial(dit, _TOY, (48, 9, 8, 8), _FP32), 1e-4),
    Case("dit 1.3B width, 2 blocks, latents 16x3x30x52, fp32", partial(dit, _NARROW, (16, 3, 30, 52), _FP32), 1e-4),
    Case("dit 1.3B width, 2 blocks, latents 16x3x30x52, bf16", partial(dit, _NARROW, (16, 3, 30, 52), _BF16), 5e-2),
    Case("vae 2.1 decode, latents 16x2x16x24, fp32", partial(vae, _VAE21, (16, 2, 16, 24), False), 1e-4),
    Case("vae 2.1 encode, latents 16x2x16x24, fp32", partial(vae, _VAE21, (16, 2, 16, 24), True), 1e-4),
    Case("vae 2.2 decode, latents 48x2x8x12, fp32", partial(vae, _VAE22, (48, 2, 8, 12), False), 1e-4),
    Case("vae 2.2 encode, latents 48x2x8x12, fp32", partial(vae, _VAE22, (48, 2, 8, 12), True), 1e-4),
    Case("vae 2.2 toy width decode, latents 48x9x8x8, fp32", partial(vae, _VAE22_TOY, (48, 9, 8, 8), False), 1e-4),
    Case("vae 2.2 toy width encode, latents 48x9x8x8, fp32", partial(vae, _VAE22_TOY, (48, 9, 8, 8), True), 1e-4),
    Case("tiny end to end, 128x128x33, 4 steps, fp32", partial(end_to_end, (128, 128), 33, 4), 1e-2),
)
