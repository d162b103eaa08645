"""What Animate adds to the transformer (arXiv 2509.14055): the tokens of poses, and attention to the motion of a face.

A face's motion is a sum of directions that are orthogonal to each other (LIA, arXiv 2203.09043). Of all this the official code
computes everything in every forward; what depends on the clip alone is computed once here: 3 TFLOP of 77 frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.adapters.causal import CausalConv1d, activated
from wan_fast.adapters.protocol import AfterBlock
from wan_fast.attention import Attention, Projected, sdpa
from wan_fast.blocks import Context, Given, Grid, KeysValues, RMSNorm, fuse
from wan_fast.inputs import Inputs
from wan_fast.kernels import patchify
from wan_fast.manifest import DiTDims
from wan_fast.manifest.animate import FaceDims
from wan_fast.quantize import modulated
from wan_fast.tasks import PATCH

EPS = 1e-6


class ScaledConv2d(nn.Conv2d):
    """Its weight is multiplied by 1 / sqrt(fan in) as it is used (arXiv 1710.10196)."""

    def __init__(self, into: int, out: int, side: int, **settings: int) -> None:
        super().__init__(into, out, side, bias=False, **settings)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / sqrt(self.weight[0].numel()), None)


class ScaledLinear(nn.Linear):
    """Likewise; its bias is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / sqrt(self.in_features), self.bias)


class Activation(nn.Module):
    """Bias, leaky ReLU, and a gain that keeps the variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias, 0.2) * sqrt(2)


class Blur(nn.Module):
    """Each channel smoothed by 1 3 3 1 along both sides."""

    def __init__(self, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
        y = F.conv2d(x.flatten(0, 1)[:, None], line.outer(line)[None, None] / 64, stride=self.stride, padding=self.padding)
        return y[:, 0].unflatten(0, x.shape[:2])


class DownBlock(nn.Module):
    """Half the size, beside a way with no activation."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConv2d(into, into, 3, padding=1), Activation(into))
        self.conv2 = nn.Sequential(Blur(2), ScaledConv2d(into, out, 3, stride=2), Activation(out))
        # every other pixel of what is blurred is all that its convolution looks at
        self.skip = nn.Sequential(Blur(1, stride=2), ScaledConv2d(into, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / sqrt(2)


class MotionEncoder(nn.Module):
    """Frames of a face [F, 3, size, size] in [-1, 1] -> motion vectors [F, motion_dim] fp32."""

    def __init__(self, dims: FaceDims) -> None:
        super().__init__()
        first, width = dims.channels[0], dims.motion_dim
        convs = nn.Sequential(
            nn.Sequential(ScaledConv2d(3, first, 1), Activation(first)),
            *(DownBlock(into, out) for into, out in pairwise(dims.channels)),
            ScaledConv2d(dims.channels[-1], width, 4),
        )
        linears = [ScaledLinear(width, width) for _ in range(4)]
        fc = nn.Sequential(*linears, ScaledLinear(width, dims.directions))
        self.enc = nn.ModuleDict({"net_app": nn.ModuleDict({"convs": convs}), "fc": fc})
        self.dec = nn.ModuleDict({"direction": nn.Linear(dims.directions, width, bias=False)})

    def forward(self, frames: Tensor) -> Tensor:
        weight = self.dec["direction"].get_parameter("weight")
        seen = self.enc["net_app"]["convs"](frames.to(weight.device, weight.dtype)).flatten(1)  # type: ignore[index]
        # Householder's: the columns' signs are those that the model was trained with
        directions, _ = torch.linalg.qr(weight.float() + 1e-8)
        return self.enc["fc"](seen).float() @ directions.T


class FaceEncoder(nn.Module):
    """Motion vectors [F, motion_dim] of 4n + 1 frames -> tokens [n + 1, heads + 1, D], of latent frames."""

    def __init__(self, dims: FaceDims, dim: int) -> None:
        super().__init__()
        self.heads = dims.heads
        self.conv1_local = CausalConv1d(dims.motion_dim, dims.heads * dims.width)
        self.conv2, self.conv3 = (CausalConv1d(dims.width, dims.width, stride=2) for _ in range(2))
        self.out_proj = nn.Linear(dims.width, dim)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, dim))

    def forward(self, motion: Tensor) -> Tensor:
        # the groups are independent from here on: [heads, F, width]
        x = self.conv1_local(motion[None])[0].unflatten(-1, (self.heads, -1)).transpose(0, 1)
        x = self.conv3(activated(self.conv2(activated(x))))
        tokens = self.out_proj(activated(x).to(self.out_proj.weight.dtype)).transpose(0, 1)
        return torch.cat([tokens, self.padding_tokens[0].expand(tokens.shape[0], -1, -1)], dim=1)


class FuserBlock(nn.Module):
    """Attention of a latent frame's tokens to those of its face. Keys and values are one projection; a state dict may have them
    apart."""

    def __init__(self, dim: int, head_dim: int, attention: Attention) -> None:
        super().__init__()
        self.head_dim, self.attention = head_dim, attention
        self.linear1_kv = nn.Linear(dim, 2 * dim)
        self.linear1_q, self.linear2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        # of each head by itself
        self.q_norm, self.k_norm = RMSNorm(head_dim, EPS), RMSNorm(head_dim, EPS)
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: fuse(state, prefix))

    def project(self, face: Tensor) -> KeysValues:
        """Tokens of the face [T, S, D] -> keys and values [T, S, N, K]: the same at every step."""
        k, v = self.linear1_kv(_normed(face, self.linear1_kv)).chunk(2, dim=-1)
        return ((self._heads(k, self.k_norm), v.unflatten(-1, (-1, self.head_dim)).contiguous()),)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """x [B, L, D] fp32, L tokens of T latent frames -> what is to be added to it, in the compute dtype."""
        ((k, v),) = keys_values
        q = self._heads(self.linear1_q(_normed(x, self.linear1_q)), self.q_norm)
        of_frames = q.view(k.shape[0], -1, *k.shape[2:])
        return self.linear2(self.attention(of_frames, k, v).reshape(x.shape))

    def _heads(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """[B, L, D] -> [B, L, N, K], normed."""
        return norm(x.contiguous().view(x.shape[0], -1, self.head_dim)).view(*x.shape[:2], -1, self.head_dim)


def _normed(x: Tensor, linear: nn.Linear) -> Tensor:
    none = x.new_zeros(1, 1, x.shape[-1], dtype=torch.float32).expand(x.shape[0], -1, -1)
    y = modulated(x, none, none, linear.weight.dtype, eps=EPS)
    assert isinstance(y, Tensor)
    return y


class FaceAdapter:
    """Adds tokens of poses to those of the clip, and behind some blocks what these see of a face.

    The clip's first latent frame is the reference: it has no pose, and a face of zeros.

    Args:
        dims: sizes of the model.
        attention, in_8_bits: of the model's own blocks; not used.
    """

    takes = frozenset({"pose", "face"})

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Sequence[Projected | None]) -> None:
        face = dims.face
        assert face is not None
        self.layers, self.size = frozenset(face.layers), face.size
        self.place = {layer: n for n, layer in enumerate(face.layers)}
        self.pose_embedding = nn.Conv3d(face.pose_dim, dims.dim, PATCH, stride=PATCH)
        self.motion_encoder, self.face_encoder = MotionEncoder(face), FaceEncoder(face, dims.dim)
        # not every backend takes as few keys as these
        self.blocks = nn.ModuleList(FuserBlock(dims.dim, face.head_dim, sdpa) for _ in face.layers)
        self.modules: dict[str, nn.Module] = {
            "pose_patch_embedding": self.pose_embedding,
            "motion_encoder": self.motion_encoder,
            "face_encoder": self.face_encoder,
            "face_adapter": nn.ModuleDict({"fuser_blocks": self.blocks}),
        }

    def prepare(self, inputs: Inputs, text: Tensor, grid: Grid, like: Context | None) -> Given:
        assert inputs.pose is not None and inputs.face is not None
        known = like is not None and like.inputs.pose is inputs.pose
        added = like.given.added if known and like else self.embed(inputs.pose, grid)
        if like is not None and like.inputs.face is inputs.face:
            return Given(added=added, keys_values=like.given.keys_values)
        tokens = self.tokens(inputs.face)
        before = grid[0] - tokens.shape[0]
        seen = F.pad(tokens, (0, 0, 0, 0, before, 0)).repeat(text.shape[0], 1, 1)  # [B T, heads + 1, D]
        blocks: list[FuserBlock] = list(self.blocks)  # type: ignore[arg-type]
        return Given(added=added, keys_values=tuple(block.project(seen) for block in blocks))

    def embed(self, pose: Tensor, grid: Grid) -> Tensor:
        """Latents of poses [C, t, H, W], of the last t latent frames -> [1, L, D] in the compute dtype, zeros for the first."""
        weight, bias = self.pose_embedding.weight, self.pose_embedding.bias
        tokens = F.linear(patchify(pose[None], dtype=weight.dtype), weight.flatten(1), bias)
        return F.pad(tokens, (0, 0, grid[0] * grid[1] * grid[2] - tokens.shape[1], 0))

    def tokens(self, face: Tensor) -> Tensor:
        """Frames of a face [3, F, h, w] in [-1, 1], on any device -> its tokens [T, heads + 1, D] in the compute dtype."""
        still = face.stride(1) == 0  # one frame, repeated
        frames = face.transpose(0, 1)[: 1 if still else None]
        motion = torch.cat([self.motion_encoder(self._sized(some)) for some in frames.split(FaceDims.AT_ONCE)])
        return self.face_encoder(motion.expand(face.shape[1], -1) if still else motion)

    def _sized(self, frames: Tensor) -> Tensor:
        if frames.shape[-2:] == (self.size, self.size):
            return frames
        return F.interpolate(frames, size=(self.size, self.size), mode="bilinear", antialias=True)

    def begin(self, x: Tensor, modulation: Tensor, context: Context, split: int, in_8_bits: bool) -> AfterBlock:
        def seen(layer: int, x: Tensor) -> Tensor:
            n = self.place[layer]
            return self.blocks[n](x, context.given.keys_values[n])

        return seen
