"""What the speech model (Wan-S2V, arXiv 2508.18621) adds: sound, poses, and tokens of a picture and of the frames before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.adapters.causal import CausalConv1d, activated
from wan_fast.adapters.protocol import AfterBlock
from wan_fast.attention import Attention, Projected, sdpa
from wan_fast.blocks import Context, CrossAttention, Given, Grid, KeysValues
from wan_fast.inputs import Inputs
from wan_fast.kernels import patchify
from wan_fast.manifest import DiTDims
from wan_fast.manifest.speech import MOTION_FRAMES, MOTION_LATENTS, MOTION_PARTS, SpeechDims
from wan_fast.quantize import modulated, takes
from wan_fast.tasks import PATCH

# where the tokens of the picture are along time
REFERENCE_TIME = 30
# other than everywhere else in the model
INJECTION_EPS = 1e-5


class SoundTokens(nn.Module):
    """Frames of sound, four to a latent frame, as tokens; all of it in fp32."""

    def __init__(self, speech: SpeechDims, dim: int) -> None:
        super().__init__()
        self.count = speech.audio_tokens
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dim))
        self.conv1_local = CausalConv1d(speech.audio_dim, speech.audio_tokens * (dim // 4))
        self.conv1_global = CausalConv1d(speech.audio_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)

    def forward(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """[C, F] of the frames before and the clip -> tokens of the clip's latent frames [T, S, D], the last of them learned,
        and what modulates [T, D]."""
        local, whole = (conv(sound.T[None]) for conv in (self.conv1_local, self.conv1_global))
        # [S, F, D / 4], each a stream of its own
        x = torch.cat([local[0].unflatten(-1, (self.count, -1)).transpose(0, 1), whole])
        *tokens, whole = activated(self.conv3(activated(self.conv2(activated(x)))))[:, MOTION_LATENTS:]  # [T, D] each
        learned = self.padding_tokens[0, 0].expand_as(whole)
        return torch.stack([*tokens, learned], dim=1), self.final_linear(whole)


class SoundEncoder(nn.Module):
    """Mixes the layers of features of the sound, and makes tokens of them."""

    def __init__(self, speech: SpeechDims, dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(1, speech.audio_layers, 1, 1))
        self.encoder = SoundTokens(speech, dim)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """[layers, C, 4 T] -> tokens [T, S, D] and what modulates [T, D], both fp32."""
        # the frames before the clip sound as its first one does
        audio = torch.cat([audio[..., :1].expand(-1, -1, MOTION_FRAMES), audio], dim=-1).float()
        weights = F.silu(self.weights[0])
        return self.encoder((audio * weights).sum(0) / weights.sum())


class Modulation(nn.Module):
    """Of the norm before an injection: shift and scale per latent frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, whole: Tensor) -> Tensor:
        """[T, D] fp32 -> [T, 2, D] fp32."""
        return self.linear(F.silu(whole).to(self.linear.weight.dtype)).float().unflatten(1, (2, -1))


class Injector(nn.Module):
    """Cross-attention of the tokens of a latent frame to those of its sound, per block behind which there is one."""

    def __init__(self, dims: DiTDims, attention: Attention, count: int) -> None:
        super().__init__()
        self.injector = nn.ModuleList(CrossAttention(dims, attention) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(Modulation(dims.dim) for _ in range(count))


class FramePacker(nn.Module):
    """Latents of the frames before a clip as few tokens, the latest first, the coarser the longer ago."""

    def __init__(self, speech: SpeechDims, dim: int) -> None:
        super().__init__()
        for name, patch, _ in MOTION_PARTS:
            self.add_module(name, nn.Conv3d(speech.cond_dim, dim, patch, stride=patch))

    def forward(self, motion: Tensor) -> Tensor:
        """[C, M, H, W] -> [1, E, D] in the compute dtype."""
        tokens, end = [], motion.shape[1]
        for name, patch, times in MOTION_PARTS:
            start = end - patch[0] * len(times)
            conv = self.get_submodule(name)
            assert isinstance(conv, nn.Conv3d)
            tokens.append(conv(motion[None, :, start:end].to(conv.weight.dtype)).flatten(2).transpose(1, 2))
            end = start
        return torch.cat(tokens, dim=1)


class SpeechAdapter:
    """Injects sound behind some blocks, into the clip's own tokens, and adds the tokens of poses to these. Behind them are
    those of a picture, at a place of its own in time, and of the frames before the clip, at places before it.

    Args:
        dims: sizes of the model.
        attention, in_8_bits: of the model's own blocks; not used.
    """

    takes = frozenset({"reference", "motion", "pose", "audio"})

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Sequence[Projected | None]) -> None:
        assert dims.speech is not None
        self.sizes, self.place = dims.speech, {layer: n for n, layer in enumerate(dims.speech.layers)}
        self.layers = frozenset(self.place)
        self.sound = SoundEncoder(dims.speech, dims.dim)
        # not every backend takes as few keys as these
        self.injector = Injector(dims, sdpa, len(self.place))
        self.cond_encoder = nn.Conv3d(dims.speech.cond_dim, dims.dim, PATCH, stride=PATCH)
        self.packer = FramePacker(dims.speech, dims.dim)
        # of the clip's own tokens, of the picture's and of those of the frames before
        self.marks = nn.Embedding(3, dims.dim)
        self.modules: dict[str, nn.Module] = {
            "casual_audio_encoder": self.sound,
            "audio_injector": self.injector,
            "cond_encoder": self.cond_encoder,
            "frame_packer": self.packer,
            "trainable_cond_mask": self.marks,
        }

    def prepare(self, inputs: Inputs, text: Tensor, grid: Grid, like: Context | None) -> Given:
        self._check(inputs, grid)
        heard = like.given if like is not None and like.inputs.audio is inputs.audio else self._heard(inputs.audio, text)
        if like is not None and all(getattr(like.inputs, name) is getattr(inputs, name) for name in ("motion", "pose")):
            return replace(like.given, tensors=heard.tensors, keys_values=heard.keys_values)
        own, reference, before = self.marks.weight.float()[:, None]  # [1, D] each
        weight, bias = self.cond_encoder.weight, self.cond_encoder.bias
        assert bias is not None
        pose: Tensor = bias  # of poses that are zeros, where there are none
        if inputs.pose is not None:
            pose = F.linear(patchify(inputs.pose[None], dtype=weight.dtype), weight.flatten(1), bias)
        motion = None
        if inputs.motion is not None:
            motion = (self.packer(inputs.motion) + before).expand(text.shape[0], -1, -1)
        return replace(
            heard,
            added=pose.float() + own,
            of_reference=reference,
            extra=motion,
            places=places_beside(grid, motion is not None).to(text.device),
        )

    def _check(self, inputs: Inputs, grid: Grid) -> None:
        T, H, W = grid
        for name, shape in self.sizes.inputs((self.sizes.cond_dim, T, 2 * H, 2 * W)).items():
            given = getattr(inputs, name)
            found = None if given is None else tuple(given.shape)
            if found != shape and (found or name not in ("motion", "pose")):
                raise ValueError(f"the model takes {name} {shape} with this clip, got {found}")

    def _heard(self, audio: Tensor | None, text: Tensor) -> Given:
        """Per injector keys and values [B T, S, N, K], and shift and scale [B T, 2, D]."""
        assert audio is not None
        tokens, whole = self.sound(audio)
        tokens, whole = tokens.to(text.dtype).repeat(text.shape[0], 1, 1), whole.repeat(text.shape[0], 1)
        keys_values: tuple[KeysValues, ...] = tuple((block.project(tokens),) for block in self.injector.injector)  # type: ignore[operator]
        return Given(
            tensors=tuple(modulation(whole) for modulation in self.injector.injector_adain_layers), keys_values=keys_values
        )

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        assert context.extra is not None
        given, own = context.given, x.shape[1] - context.extra.shape[1]

        def inject(layer: int, x: Tensor) -> None:
            n = self.place[layer]
            block, (shift, scale) = self.injector.injector[n], given.tensors[n][:, :, None].unbind(1)
            frames = x[:, :own].reshape(shift.shape[0], -1, x.shape[-1])
            y = modulated(frames, shift, scale, takes(block.q), eps=INJECTION_EPS)
            x[:, :own].add_(block(y, given.keys_values[n]).view(x.shape[0], own, -1))

        return inject


def places_beside(grid: Grid, motion: bool) -> Tensor:
    """[E, 3] along (T, H, W), of the tokens of the picture and, with `motion`, of those of the frames before; coarse ones are
    spread over the clip's."""
    _, *sides = grid
    parts = [(PATCH, (REFERENCE_TIME,)), *((patch, times) for _, patch, times in MOTION_PARTS if motion)]
    places = []
    for patch, times in parts:
        coarse = [side * fine // size for side, fine, size in zip(sides, PATCH[1:], patch[1:], strict=True)]
        spread = [np.linspace(0, side - 1, count).astype(int) for side, count in zip(sides, coarse, strict=True)]
        places.append(torch.cartesian_prod(torch.tensor(times, device="cpu"), *map(torch.from_numpy, spread)))
    return torch.cat(places)
