"""The Wan diffusion transformer (arXiv 2503.20314), after Peebles & Xie (arXiv 2212.09748), for inference.

A block is its matrix products, attention, and the fused operators of `wan_fast.kernels` between them; what these compute
is their references', in plain PyTorch. Parameter names in a state dict are the native ones. B batch, C channels, T H W
latent frames/height/width, L video tokens, S text tokens, D width, N heads, K head width, R modulation rows.

Precision follows the official autocast: the residual stream, norms, modulation, time embedding and head are fp32; the
other linears and attention run in the compute dtype, which is that of their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_fast.adapters import Adapter, adapter_of
from wan_fast.attention import Attention, Projected, sdpa
from wan_fast.blocks import Block, Context, Given, Grid, ImageCrossAttention, KeysValues, add_gated_
from wan_fast.inputs import Inputs
from wan_fast.kernels import patchify, rope_table, rope_table_of, unpatchify
from wan_fast.manifest import DiTDims
from wan_fast.quantize import added_and_modulated, modulated, takes
from wan_fast.tasks import PATCH


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 of a noisy latent clip.

    Args:
        dims: its sizes.
        attention: exact, of video to video and to text.
        in_8_bits: of the video's tokens, in forwards that ask for it; None where there is none.
        keep: blocks at either end whose attention is always exact.
    """

    def __init__(self, dims: DiTDims, attention: Attention = sdpa, in_8_bits: Projected | None = None, keep: int = 0) -> None:
        super().__init__()
        D = dims.dim
        self.dims = dims
        self.patch_embedding = nn.Conv3d(dims.in_dim, D, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(dims.text_dim, D), nn.GELU("tanh"), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(dims.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        narrow = [in_8_bits if keep <= i < dims.num_layers - keep else None for i in range(dims.num_layers)]
        self.blocks: Iterable[Block] = nn.ModuleList(Block(dims, attention, form) for form in narrow)  # type: ignore[assignment]
        self.head = Head(dims)
        self.img_emb = ImageEmbedding(dims) if dims.image_dim else None
        self.adapter: Adapter | None = adapter_of(dims, attention, narrow)
        for name, module in self.adapter.modules.items() if self.adapter else ():
            self.add_module(name, module)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        *,
        split: int = 0,
        in_8_bits: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Velocity of a noisy clip.

        Args:
            latents: [B, C, T, H, W] fp32, H and W even.
            timestep: [B, R] fp32, in 0 .. 1000, with R of 1 or 2.
            context: what `prepare` returned for this text and grid.
            split: tokens before it take timestep row 0, the rest row 1, where R is 2.
            in_8_bits: self-attention is in 8 bits in the blocks that have it.
            residual: [B, L, D] in any float dtype, becomes the block stack's output less its input, for `resume`.

        Returns:
            [B, C, T, H, W] fp32.
        """
        x = self.embed(latents, context)  # [B, L, D]
        L = x.shape[1]
        if context.extra is not None:
            x = torch.cat([x, context.extra], dim=1)
        time = self.time_embedding(sinusoid(timestep, self.dims.freq_dim))  # [B, R, D]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, R, 6, D]
        tables = torch.stack([block.modulation for block in self.blocks])[:, None] + modulation  # [blocks, B, R, 6, D]
        # each block ends with the norm that the next one, or the head, begins with
        heads_own = self.head.modulated_by(time)
        following = [*(tuple(table[:, :, :2].unbind(2)) for table in tables[1:]), heads_own]
        own: dict[str, Any] = {"split": split, "eps": self.dims.eps}
        first, *others = (takes(block.self_attn.qkv) for block in self.blocks)
        shift, scale = tables[0, :, :, :2].unbind(2)
        # one name for all that follows: what it held before is wanted as memory
        y: Any = modulated(x, shift, scale, first, **own)
        adapter = self.adapter if self.adapter and self.adapter.layers else None
        after = adapter.begin(x, modulation, context, split, in_8_bits) if adapter else None
        for i, (block, table, keys_values, then, to) in enumerate(
            zip(self.blocks, tables, context.keys_values, following, [*others, torch.float32], strict=True)
        ):
            y, gate = block(x, y, table, split, context, keys_values, in_8_bits), table[:, :, 5]
            shift, scale = then
            if after and adapter and i in adapter.layers:
                add_gated_(x, y, gate, split)
                y, gate = after(i, x), None
            y = modulated(x, shift, scale, to, **own) if y is None else added_and_modulated(x, y, gate, shift, scale, to, **own)
        if residual is not None:  # embedding again is cheaper than keeping a copy through the blocks
            torch.sub(x[:, :L], self.embed(latents, context), out=residual)
        T, H, W = latents.shape[2:]
        return unpatchify(self.head.head(y[:, :L]), (T, H, W))

    def resume(self, latents: Tensor, timestep: Tensor, residual: Tensor, context: Context, *, split: int = 0) -> Tensor:
        """Velocity of a noisy clip, with what the block stack added in an earlier forward in the place of the blocks.

        Args:
            latents, timestep, context, split: as in `forward`.
            residual: [B, L, D] that a forward left.

        Returns:
            [B, C, T, H, W] fp32.
        """
        x = self.embed(latents, context)
        shift, scale = self.head.modulated_by(self.time_embedding(sinusoid(timestep, self.dims.freq_dim)))
        y = added_and_modulated(x, residual, None, shift, scale, torch.float32, split=split, eps=self.dims.eps)
        T, H, W = latents.shape[2:]
        return unpatchify(self.head.head(y), (T, H, W))

    def prepare(
        self, text: Sequence[Tensor], grid: Grid, inputs: Inputs | None = None, *, like: Context | None = None
    ) -> Context:
        """Project what does not depend on the step, once for all steps of a generation.

        Args:
            text: B tensors [S_i, text_dim], unpadded; the model was trained on zeros up to `text_len`, and attends to them.
            grid: (T, H/2, W/2) patches of the clip.
            inputs: beside the text; the same for the whole batch. None: those of `like`, or none.
            like: a context of the same clip with another text, from which is taken what depends on inputs that are the same
                objects there.

        Raises:
            ValueError: a text is longer than the model takes, or the inputs are not the model's.
        """
        if max(t.shape[0] for t in text) > self.dims.text_len:
            raise ValueError(f"the model takes {self.dims.text_len} text tokens, got {[t.shape[0] for t in text]}")
        inputs = inputs or (like.inputs if like is not None else Inputs())
        self._check(inputs, grid)
        B, dtype = len(text), self.patch_embedding.weight.dtype
        padded = torch.stack([F.pad(t, (0, 0, 0, self.dims.text_len - t.shape[0])) for t in text])
        text_tokens = self.text_embedding(padded.to(dtype))  # [B, S, D]
        keys_values: list[KeysValues] = [(block.cross_attn.project(text_tokens),) for block in self.blocks]
        if inputs.image is not None:
            keys_values = [(*own, pair) for own, pair in zip(keys_values, self._of_image(inputs.image, B, like), strict=True)]
        given = self.adapter.prepare(inputs, text_tokens, grid, like) if self.adapter else Given()
        channels = None
        if (own := inputs.channels) is not None:
            if like is not None and like.inputs.channels is own and like.given.channels is given.channels:
                channels = like.channels
            else:
                own = own if given.channels is None else own + given.channels
                channels = patchify(own[None], dtype=dtype).expand(B, -1, -1)
        extra, whole = given.extra, grid
        if inputs.reference is not None:  # latent frames behind the clip's
            reference = self.embed(inputs.reference[None])
            reference = (reference if given.of_reference is None else reference + given.of_reference).expand(B, -1, -1)
            extra = reference if extra is None else torch.cat([reference, extra], dim=1)
            whole = (grid[0] + inputs.reference.shape[1], *grid[1:])
        device, head_dim = padded.device, self.dims.head_dim
        table = rope_table(max(whole), head_dim, device) if given.places is None else _table_with(grid, given.places, head_dim)
        return Context(
            inputs=inputs,
            keys_values=tuple(keys_values),
            grid=whole if given.places is None else None,
            table=table,
            channels=channels,
            extra=extra,
            given=given,
        )

    def _of_image(self, image: Tensor, B: int, like: Context | None) -> Iterable[tuple[Tensor, Tensor]]:
        """Keys and values of tokens of pictures [I, S, image_dim], per block."""
        if like is not None and like.inputs.image is image:
            return [pairs[1] for pairs in like.keys_values]
        assert self.img_emb is not None
        tokens = self.img_emb(image).to(self.patch_embedding.weight.dtype).expand(B, -1, -1)
        layers = [block.cross_attn for block in self.blocks]
        return [layer.project_image(tokens) for layer in layers if isinstance(layer, ImageCrossAttention)]

    def embed(self, latents: Tensor, context: Context | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, L, D] fp32: one token per 1x2x2 patch, w fastest; with what a context has of channels behind
        theirs, and of tokens to be added."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        tokens = patchify(latents, dtype=weight.dtype)
        if context is not None and context.channels is not None:
            tokens = torch.cat([tokens, context.channels], dim=-1)
        x = F.linear(tokens, weight.flatten(1), bias).float()
        return x if context is None or context.given.added is None else x.add_(context.given.added)

    def _check(self, inputs: Inputs, grid: Grid) -> None:
        dims, (T, H, W) = self.dims, grid
        expected = {
            "channels": (dims.condition_dim, T, 2 * H, 2 * W) if dims.condition_dim else None,
            "control": (dims.vace_dim, T, 2 * H, 2 * W) if dims.vace_layers else None,
        }
        given = {name: getattr(inputs, name) for name in expected}
        for name, tensor in given.items():
            shape = None if tensor is None else tuple(tensor.shape)
            if shape != expected[name]:
                raise ValueError(f"the model takes {name} {expected[name] or 'not at all'} with this clip, got {shape}")
        count = None if inputs.image is None else inputs.image.shape[:2].numel()
        if (count is None) == bool(dims.image_dim) or dims.image_positions not in (0, count):
            wanted = (dims.image_positions or "some") if dims.image_dim else "no"
            raise ValueError(f"the model takes {wanted} tokens of pictures, got {count}")
        able = {"channels", "image", "reference", *(self.adapter.takes if self.adapter else ())}
        if surplus := [name for name, _ in inputs.tensors() if name not in able]:
            raise ValueError(f"the model does not take {', '.join(surplus)}")


class ImageEmbedding(nn.Module):
    """Tokens of pictures, as the blocks attend to them: norm, two linears, norm; the model of two pictures tells them apart by
    learned positions."""

    def __init__(self, dims: DiTDims) -> None:
        super().__init__()
        C, D = dims.image_dim, dims.dim
        # the norms are torch's own, with its default eps
        self.proj = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU(), nn.Linear(C, D), nn.LayerNorm(D))
        self.emb_pos = nn.Parameter(torch.empty(1, dims.image_positions, C)) if dims.image_positions else None

    def forward(self, image: Tensor) -> Tensor:
        """[I, S, image_dim] -> [1, I S, D] fp32."""
        tokens = image.float().flatten(0, 1)[None]
        if self.emb_pos is not None:
            tokens = tokens + self.emb_pos
        first, up, gelu, down, last = self.proj
        return last(down(gelu(up(first(tokens).to(up.weight.dtype)))).float())


class Head(nn.Module):
    """Projection to pixels of a patch, in fp32; the last block ends with its modulated norm."""

    def __init__(self, dims: DiTDims) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, dims.dim))
        self.head = nn.Linear(dims.dim, 4 * dims.out_dim)

    def modulated_by(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale [B, R, D] of its norm, from the time embedding [B, R, D]."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return shift, scale


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B, R] -> [B, R, dim] fp32: cosines first, then sines, of t 10000^(-2j/dim)."""
    half = dim // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def grid_of(shape: Sequence[int]) -> Grid:
    """(T, H/2, W/2) patches of latents [..., T, H, W]."""
    T, H, W = shape[-3:]
    return T // PATCH[0], H // PATCH[1], W // PATCH[2]


def _table_with(grid: Grid, places: Tensor, head_dim: int) -> Tensor:
    """Of `rope_table_of` for the tokens of a grid and those at `places` [E, 3] behind them."""
    own = torch.cartesian_prod(*(torch.arange(size, device=places.device) for size in grid))
    return rope_table_of(torch.cat([own, places]), head_dim, device=places.device)
