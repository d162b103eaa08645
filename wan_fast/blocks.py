"""A block of the transformer: self-attention, cross-attention, feed-forward, and what they are given.

Letters and precision as in dit.py, which puts blocks together.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan_fast.attention import Attention, Projected, of_projection
from wan_fast.inputs import Inputs
from wan_fast.kernels import qk_norm_rope
from wan_fast.manifest import DiTDims
from wan_fast.quantize import Tokens, activated, added_and_modulated, shared, takes

Grid = tuple[int, int, int]
# of text, and behind it of pictures where there are any
KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Given:
    """What an adapter makes of a clip's inputs, for all forwards of it.

    added: [B, L, D] of any float dtype, or what broadcasts to it, to be added to the clip's embedded tokens. of_reference:
    likewise, to those of the reference latents, which come behind these. extra: [B, E, D] fp32, tokens behind both. places:
    [E', 3] along (T, H, W), of all that are not the clip's own. channels: [C, 1, H, W] fp32, to be added to those that follow
    the noisy ones. tensors: what it needs itself. keys_values: likewise, per block of its own.
    """

    added: Tensor | None = None
    of_reference: Tensor | None = None
    extra: Tensor | None = None
    places: Tensor | None = None
    channels: Tensor | None = None
    tensors: tuple[Tensor, ...] = ()
    keys_values: tuple[KeysValues, ...] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """What a forward needs that depends neither on the latents nor on the timestep.

    inputs: what it was made of, beside text. keys_values: per block, pairs of keys and values [B, S, N, K], of text and of
    pictures. grid: tokens along (T, H, W), the extra ones among them; None where these lie elsewhere. table: of `rope_table`
    for the grid's positions, or of `rope_table_of` for every token. channels: [B, L, 4 C] tokens of the channels that follow
    the noisy ones. extra: [B, E, D] fp32 tokens behind the clip's own. given: what an adapter made.
    """

    inputs: Inputs
    keys_values: tuple[KeysValues, ...]
    grid: Grid | None
    table: Tensor
    channels: Tensor | None = None
    extra: Tensor | None = None
    given: Given = Given()

    def tensors(self) -> Iterator[Tensor]:
        """All that depends on the clip, in an order that is the same for every clip of a shape."""
        for pairs in (*self.keys_values, *self.given.keys_values):
            for pair in pairs:
                yield from pair
        given = self.given
        others = (self.channels, self.extra, given.added, given.extra, given.channels, *given.tensors)
        yield from (tensor for tensor in others if tensor is not None)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last modulated and gated by the timestep."""

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Projected | None) -> None:
        super().__init__()
        self.eps = dims.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, dims.dim))
        self.self_attn = SelfAttention(dims, attention, in_8_bits)
        self.norm3 = nn.LayerNorm(dims.dim, dims.eps)
        self.cross_attn = ImageCrossAttention(dims, attention) if dims.image_dim else CrossAttention(dims, attention)
        self.ffn = FeedForward(nn.Linear(dims.dim, dims.ffn_dim), nn.GELU("tanh"), nn.Linear(dims.ffn_dim, dims.dim))

    def forward(
        self, x: Tensor, y: Tokens, table: Tensor, split: int, context: Context, keys_values: KeysValues, in_8_bits: bool
    ) -> Tensor:
        """One block but for its last addition, which is one pass with the norm that follows.

        Args:
            x: [B, L, D] fp32, the residual stream, changed in place.
            y: [B, L, D] in the compute dtype or in 8 bits: x, normed and modulated for this block.
            table: [B, R, 6, D] fp32 modulation of this block.
            split, context: as in `WanDiT.forward`.
            keys_values: of this block.
            in_8_bits: as in `WanDiT.forward`.

        Returns:
            [B, L, D] in the compute dtype: what is to be added to x, times the table's last row.
        """
        _, _, gate1, shift2, scale2, _ = table.unbind(2)
        weight, bias = (t.expand(x.shape[0], 1, -1) for t in (self.norm3.weight, self.norm3.bias))
        own: dict[str, Any] = {"split": split, "eps": self.eps}
        y = self.self_attn(y, context, in_8_bits)
        y = added_and_modulated(x, y, gate1, bias, weight, takes(self.cross_attn.q), affine=True, **own)
        y = self.cross_attn(y, keys_values)
        y = added_and_modulated(x, y, None, shift2, scale2, takes(self.ffn[0]), **own)
        return self.ffn(y)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear."""

    def forward(self, x: Tokens) -> Tensor:
        return self[2](activated(self[0], x, takes(self[2])))


class RMSNorm(nn.Module):
    """Over the full width, all heads together, in place."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        qk_norm_rope(x[:, :, None], self.weight[None], None, heads=1, eps=self.eps)
        return x


class SelfAttention(nn.Module):
    """Over the video's tokens. q, k and v are one projection, and q's and k's norms one parameter; a state dict has them
    apart, under their native names, and either form is loaded."""

    def __init__(self, dims: DiTDims, attention: Attention, in_8_bits: Projected | None = None) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.eps = dims.eps
        self.attention = of_projection(attention)
        self.in_8_bits = in_8_bits
        self.qkv = nn.Linear(dims.dim, 3 * dims.dim)
        self.norm_qk = nn.Parameter(torch.empty(2 * dims.dim))
        self.o = nn.Linear(dims.dim, dims.dim)
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: fuse(state, prefix))
        self.register_state_dict_post_hook(lambda module, state, prefix, _: unfuse(state, prefix))

    def forward(self, x: Tokens, context: Context, in_8_bits: bool = False) -> Tensor:
        """[B, L, D], as `qkv` takes it, -> [B, L, D] in the compute dtype."""
        qkv = self.qkv(x).unflatten(-1, (3, -1))  # [B, L, 3, D]
        attention = self.in_8_bits if in_8_bits and self.in_8_bits else self.attention
        weight, heads = self.norm_qk.view(2, -1), self.heads[0]
        return self.o(attention(qkv, weight, context.table, grid=context.grid, heads=heads, eps=self.eps).flatten(2))


_FUSED = {
    "qkv.weight": ("q.weight", "k.weight", "v.weight"),
    "qkv.bias": ("q.bias", "k.bias", "v.bias"),
    "qkv.weight_scale": ("q.weight_scale", "k.weight_scale", "v.weight_scale"),
    "norm_qk": ("norm_q.weight", "norm_k.weight"),
    "linear1_kv.weight": ("linear1_k.weight", "linear1_v.weight"),
    "linear1_kv.bias": ("linear1_k.bias", "linear1_v.bias"),
}


def fuse(state: MutableMapping[str, Any], prefix: str) -> None:
    """Join, where they are all there, the tensors of the attention under `prefix` that one parameter holds."""
    for fused, parts in _FUSED.items():
        names = [prefix + part for part in parts]
        if all(name in state for name in names):
            state[prefix + fused] = torch.cat([state.pop(name) for name in names])


def unfuse(state: MutableMapping[str, Any], prefix: str) -> None:
    """The reverse of `fuse`; the tensors are views of the joint one."""
    for fused, parts in _FUSED.items():
        joint = state.get(prefix + fused)
        if joint is None or joint.shape[0] % len(parts):  # there are no such scales, or blocks of 128 that reach across
            continue
        views = state.pop(prefix + fused).chunk(len(parts))
        state.update(zip([prefix + part for part in parts], views, strict=True))


class CrossAttention(nn.Module):
    """Over the text's tokens, whose keys and values are computed once per generation."""

    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__()
        self.heads = (dims.num_heads, dims.head_dim)
        self.attention = attention
        self.q, self.k, self.v, self.o = (nn.Linear(dims.dim, dims.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dims.dim, dims.eps), RMSNorm(dims.dim, dims.eps)

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text tokens [B, S, D]: the same at every step."""
        tokens = shared(text, self.k, self.v)
        return self.norm_k(self.k(tokens)).unflatten(-1, self.heads), self.v(tokens).unflatten(-1, self.heads)

    def forward(self, x: Tokens, keys_values: KeysValues) -> Tensor:
        """[B, L, D], as `q` takes it, -> [B, L, D] in the compute dtype."""
        q = self.norm_q(self.q(x)).unflatten(-1, self.heads)
        text, *others = keys_values
        y = self.attention(q, *text)
        for pair in others:  # a softmax of its own
            y = y + self.attention(q, *pair)
        return self.o(y.flatten(2))


class ImageCrossAttention(CrossAttention):
    """Also over the tokens of pictures, with the same queries."""

    def __init__(self, dims: DiTDims, attention: Attention) -> None:
        super().__init__(dims, attention)
        self.k_img, self.v_img = (nn.Linear(dims.dim, dims.dim) for _ in range(2))
        self.norm_k_img = RMSNorm(dims.dim, dims.eps)

    def project_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens of pictures [B, S, D]: the same at every step and for every text."""
        tokens = shared(image, self.k_img, self.v_img)
        return self.norm_k_img(self.k_img(tokens)).unflatten(-1, self.heads), self.v_img(tokens).unflatten(-1, self.heads)


def add_gated_(x: Tensor, y: Tensor, gate: Tensor, split: int) -> None:
    """x += gate y, in place, of x [B, L, D] fp32 and y [B, L, D], with rows of gate [B, R, D] as in `WanDiT.forward`."""
    if gate.shape[1] == 1:
        x.addcmul_(y, gate)
    else:
        x[:, :split].addcmul_(y[:, :split], gate[:, :1])
        x[:, split:].addcmul_(y[:, split:], gate[:, 1:])
