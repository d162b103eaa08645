"""Stage 1: the VAE. Reconstructs crops of clips from latents with noise on them.

    python -m tools.train_tiny.vae [folder]

The noise, a share of each channel's spread, makes near latents decode to near pictures, which is what the DiT's
small errors need; its size is relative, so the encoder cannot escape it by growing. At the end an affine map is folded
into the 1 x 1 x 1 convolutions on both sides, so that the latents have about the statistics of Wan 2.2's.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tools.train_tiny.judge import psnr
from tools.train_tiny.training import DEVICE, FOLDER, Run, autocast, averaged, in_phase, warm_and_decay
from tools.train_tiny.world import FRAMES, SIDE, draw_many, render
from wan_fast.tasks import VAES

# steps, peak learning rate, most noise: first what is robust, then what is fine
PHASES = ((3600, 2e-3, 0.5), (1700, 6e-4, 0.15))
STEPS = sum(steps for steps, _, _ in PHASES)
LAYOUT = torch.channels_last_3d  # a fifth faster on a CPU
# clips, frames, side of the crop: the first ones see many clips, the last one whole frames and a longer past
BATCHES = ((12, 5, 64), (8, 9, 64), (12, 5, 64), (2, 17, SIDE))


def rms_norm(self: autoencoder_kl_wan.WanRMS_norm, x: Tensor) -> Tensor:
    """The same as theirs in sums: their norm over a strided dimension takes a third of a step on a CPU."""
    scale = x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return x * scale.to(x.dtype) * (self.scale * self.gamma) + self.bias


def build() -> AutoencoderKLWan:
    spec = VAES["2.2"]
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=16, z_dim=48, in_channels=12, out_channels=12, is_residual=True, patch_size=2,
        latents_mean=list(spec.mean), latents_std=list(spec.std), scale_factor_spatial=16, scale_factor_temporal=4,
    )  # fmt: skip


def batch(step: int) -> Tensor:
    """[N, 3, F, side, side]: crops that the shape is in, at some moment of the clip."""
    count, frames, side = BATCHES[step % len(BATCHES)]
    rng = random.Random(f"vae {step}")
    clips = draw_many(rng.getrandbits(32), count, held_out=False)
    first = rng.randint(0, FRAMES - frames)
    share = (first + frames / 2) / FRAMES

    def corner(start: float, end: float) -> int:
        middle = start + (end - start) * share + rng.uniform(-24, 24)
        return round(min(max(middle - side / 2, 0), SIDE - side))

    corners = [(corner(c.start[0], c.end[0]), corner(c.start[1] - c.hop / 2, c.end[1] - c.hop / 2)) for c in clips]
    return render(clips, range(first, first + frames), corners, side, DEVICE).contiguous(memory_format=LAYOUT)


def loss_of(vae: AutoencoderKLWan, clips: Tensor, most_noise: float) -> tuple[Tensor, Tensor]:
    """What is trained on, and the mean squared error."""
    with autocast():
        latents = vae.encode(clips).latent_dist.mode()
        spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
        strength = most_noise * torch.rand(latents.shape[0], 1, 1, 1, 1, device=DEVICE)
        noisy = latents + torch.randn_like(latents) * strength * spread
        # not `decode`, which clamps and takes the slope with it
        decoded = autoencoder_kl_wan.unpatchify(decode(vae, noisy), 2).float()
    error = decoded - clips
    # the differences of neighbours are where the outlines are
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges, error.square().mean()


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """[N, 48, T, h, w] -> [N, 12, F, 8h, 8w]: frame by frame of latents, as `decode` does, unclamped."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                latents[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0
            )
        )
    vae.clear_cache()
    return torch.cat(frames, 2)


def fold_statistics(vae: AutoencoderKLWan) -> None:
    """Rescale the latents, per channel, to the mean and spread of Wan 2.2's, and undo it before the decoder."""
    with torch.no_grad():
        clips = draw_many(1, 48, held_out=False)
        latents = torch.cat([vae.encode(render(clips[i : i + 4], device=DEVICE)).latent_dist.mode() for i in range(0, 48, 4)])
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        wanted_mean, wanted_std = (torch.tensor(vae.config[f"latents_{name}"], device=DEVICE) for name in ("mean", "std"))
        scale = wanted_std / std
        shift = wanted_mean - scale * mean
        encode, decode = vae.quant_conv, vae.post_quant_conv
        encode.weight[:48] *= scale[:, None, None, None, None]
        encode.bias[:48] = encode.bias[:48] * scale + shift
        # the spread of the posterior was not trained: a tenth of the channel's
        encode.weight[48:] = 0
        encode.bias[48:] = 2 * (0.1 * wanted_std).log()
        decode.bias -= (decode.weight[..., 0, 0, 0] @ (shift / scale)).to(decode.bias)
        decode.weight /= scale[None, :, None, None, None]


def quality(vae: AutoencoderKLWan) -> float:
    """Mean over unseen clips of the reconstruction's PSNR, in dB."""
    values = []
    for clip in draw_many(2, 16, held_out=True):
        pixels = render([clip], device=DEVICE)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        values.append(psnr(decoded, pixels))
    return sum(values) / len(values)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    autoencoder_kl_wan.WanRMS_norm.forward = rms_norm
    vae = build().to(DEVICE)
    for weight in vae.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=LAYOUT)
    average = averaged(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=1e-3)

    def rate(step: int) -> float:
        step, (total, peak, _) = in_phase(step, PHASES)
        return peak * warm_and_decay(step, total, 200)

    schedule = LambdaLR(optimizer, rate)
    run = Run(folder / "vae", STEPS, model=vae, average=average, optimizer=optimizer, schedule=schedule)
    for step in run:
        loss, error = loss_of(vae, batch(step), in_phase(step, PHASES)[1][-1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        run.log(loss=loss.item(), mse=error.item())
    fold_statistics(average.module)
    average.module.save_pretrained(folder / "vae")
    print(f"reconstruction of unseen clips: {quality(average.module):.1f} dB", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
