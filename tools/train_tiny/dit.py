"""Stage 3: the DiT, by flow matching (arXiv 2210.02747) in the latents of stage 1, on the text of stage 2.

    python -m tools.train_tiny.dit [folder]

Its first steps see single frames. Then every other batch is given its first frame, as the TI2V
model is: clean, at timestep 0, and not part of the loss. One caption in ten is replaced, half by nothing and half by the
negative prompt, so that classifier-free guidance (arXiv 2207.12598) has something to lead away from. Matrices of the
blocks are trained by Muon, the rest by AdamW.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tools.train_tiny.text import tokens
from tools.train_tiny.training import DEVICE, FOLDER, Run, autocast, averaged, in_phase, save_whole, warm_and_decay
from tools.train_tiny.world import Clip, caption, draw_many, render
from wan_fast.manifest import VaeDims
from wan_fast.names import VAE22_NAMES, native_name
from wan_fast.tasks import TASKS
from wan_fast.vae import WanVAE

CLIPS = 3000
TURNING = 1500  # rotating clips besides, of the motion that is hardest to learn
# steps, the share of the peak learning rate that they begin with, and of the clips that are of those 1500
PHASES = ((5600, 1.0, 0.0), (7600, 0.5, 0.0), (2800, 0.4, 0.5))
STEPS = sum(steps for steps, _, _ in PHASES)
STILL_STEPS = 800
STILLS, BATCH = 96, 32
PEAK_MUON, PEAK_ADAMW = 2e-3, 1e-3
SHIFT = 5.0  # of the timesteps, as in sampling
DROPPED = 0.1
TEXT_LEN = 512


class PlainAttention:
    """Attention written out, which compiles to half the time of a fused one for so few tokens on a CPU.

    `bias`: [N, 1, 1, S], for cross-attention. The model attends to `TEXT_LEN` tokens, of which those past the caption are
    alike: one of them with the logarithm of their number added to its score does the same, and the others have minus
    infinity.
    """

    bias: Tensor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in (q, k, v))
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k, v = (t.transpose(1, 2).to(v.dtype) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if encoder_hidden_states is not None:
            scores = scores + self.bias
        return attn.to_out[0]((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs. x: [N, L, heads, K]; cos, sin: [1, L, 1, K], each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def build() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=48, out_channels=48, text_dim=64, ffn_dim=1024,
        num_layers=6, cross_attn_norm=True, rope_max_seq_len=1024,
    )  # fmt: skip


def training_clips() -> list[Clip]:
    """`CLIPS` of all kinds, then `TURNING` rotating ones."""
    turning = [clip for clip in draw_many(5, 30 * TURNING, held_out=False) if clip.motion == "rotate"]
    return [*draw_many(4, CLIPS, held_out=False), *turning[:TURNING]]


def cached_latents(folder: Path, clips: list[Clip]) -> Tensor:
    """[clips, 48, 9, 8, 8] bf16: through the engine's encoder, and kept in a file for these clips and these weights."""
    weights, file = folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "latents.pt"
    digest = hashlib.sha256(weights.read_bytes() + repr(clips).encode()).hexdigest()
    if file.exists() and (saved := torch.load(file, weights_only=True))["of"] == digest:
        return saved["latents"]
    stored = {native_name(name, VAE22_NAMES): tensor for name, tensor in load_file(weights).items()}
    vae = WanVAE(VaeDims.of_shapes({name: tuple(t.shape) for name, t in stored.items()}))
    vae.load_state_dict(stored)
    vae.to(DEVICE).requires_grad_(False)
    latents = []
    for index, clip in enumerate(clips):
        latents.append(vae.encode(render([clip], device=DEVICE)[0]).bfloat16().cpu())
        if index % 500 == 0:
            print(f"encoded {index} of {len(clips)} clips", file=sys.stderr, flush=True)
    save_whole({"of": digest, "latents": torch.stack(latents)}, file)
    return torch.stack(latents)


class Texts:
    """Captions through the frozen text encoder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").to(DEVICE, torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States [N, S, 64] and the bias of `PlainAttention` [N, 1, 1, S]."""
        ids, mask = tokens(self.tokenizer, texts)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        states, mask = F.pad(states, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        bias = torch.zeros(mask.shape, device=DEVICE).masked_fill_(mask == 0, -math.inf)
        lengths = mask.sum(1)
        bias[torch.arange(len(texts)), lengths] = (TEXT_LEN - lengths).float().log()
        return states, bias[:, None, None]


def timesteps(count: int) -> Tensor:
    """Shares of noise [N] in 0 .. 1: uniform, then shifted towards noise as the sampler's are (arXiv 2403.03206)."""
    u = torch.rand(count, device=DEVICE)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def usual_error(sigma: Tensor) -> Tensor:
    """About the mean squared error that a trained model has at this share of noise, most of it no model's to avoid."""
    return 0.05 + 0.3 * sigma**16


def loss_of(model: nn.Module, clean: Tensor, text: Tensor, first_given: bool) -> tuple[Tensor, Tensor]:
    """What is trained on, and the mean squared error of the velocity noise - clean, [N, 48, T, 8, 8].

    Each clip's error counts relative to `usual_error`; where the first frame is given, only the others are counted.
    """
    sigma = timesteps(len(clean))
    noise = torch.randn_like(clean)
    share = sigma[:, None, None, None, None].expand(-1, 1, clean.shape[2], 1, 1).clone()
    timestep = 1000 * sigma
    if first_given:
        share[:, :, 0] = 0
        # one timestep for each token, 2 x 2 positions of a frame
        per_frame = clean.shape[3] * clean.shape[4] // 4
        timestep = 1000 * share[:, 0, :, 0, 0].repeat_interleave(per_frame, dim=1)
    with autocast():
        velocity = model(torch.lerp(clean, noise, share), timestep, text, return_dict=False)[0].float()
    error = (velocity - (noise - clean)).square()
    error = (error[:, :, 1:] if first_given else error).mean((1, 2, 3, 4))
    # a tenth, so that gradients are of the size that clipping at 1 is meant for
    return (error / usual_error(sigma)).mean() / 10, error.mean()


def main(folder: Path) -> None:
    clips = training_clips()
    latents = cached_latents(folder, clips)
    texts = Texts(folder)
    torch.manual_seed(0)
    model = build().to(DEVICE)
    average = averaged(model, 0.999)
    attention = PlainAttention()
    for block in model.blocks:
        block.attn1.set_processor(attention)
        block.attn2.set_processor(attention)
        block.compile()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=PEAK_MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=PEAK_ADAMW, betas=(0.9, 0.98), weight_decay=0.0)

    def rate(step: int) -> float:
        step, (total, share, _) = in_phase(step, PHASES)
        return share * warm_and_decay(step, total, 200)

    schedules = [LambdaLR(optimizer, rate) for optimizer in (muon, adamw)]
    run = Run(
        folder / "transformer", STEPS, model=model, average=average, muon=muon, adamw=adamw,
        muon_schedule=schedules[0], adamw_schedule=schedules[1],
    )  # fmt: skip
    for step in run:
        rng = random.Random(f"dit {step}")
        still = step < STILL_STEPS
        turning = in_phase(step, PHASES)[1][2]
        chosen = [
            rng.randrange(CLIPS, len(clips)) if turning and rng.random() < turning else rng.randrange(CLIPS)
            for _ in range(STILLS if still else BATCH)
        ]
        captions = [
            rng.choice(("", TASKS["ti2v-5B"].negative_prompt)) if rng.random() < DROPPED else caption(clips[i], rng)
            for i in chosen
        ]
        states, attention.bias = texts(captions)
        clean = latents[chosen].to(DEVICE).float()
        first_given = not still and step % 2 == 1
        loss, error = loss_of(model, clean[:, :, :1] if still else clean, states, first_given)
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (muon, adamw, *schedules):
            part.step()
        average.update_parameters(model)
        run.log(**{"still" if still else "image" if first_given else "text": error.item()})
    average.module.save_pretrained(folder / "transformer")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
