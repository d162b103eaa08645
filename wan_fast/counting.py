"""How many operations and bytes the work of a run is, by class of kernel, counted on meta tensors: it costs the run nothing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_fast.attention import Attention8bit
from wan_fast.dit import WanDiT, grid_of
from wan_fast.engine import Engine
from wan_fast.inputs import Inputs
from wan_fast.kernels import KERNELS, guidance_step
from wan_fast.kernels.causal_conv3d import output_shape
from wan_fast.kernels.qk_norm_rope_quantized import sampled
from wan_fast.manifest import VaeDims
from wan_fast.planning import Plan
from wan_fast.quantize import forms_of, swap
from wan_fast.vae import WanVAE

# the first pattern that a kernel's or an operator's name matches
_CLASSES = (
    ("convolution", "causal_conv3d"),
    ("matrix product", "gemm_8bit"),
    ("attention", "attention_8bit"),
    ("wan_fast kernel", "|".join(["wan_fast", *KERNELS])),
    ("attention", r"scaled_dot_product|flash|fmha|sdpa|attention"),
    ("convolution", r"conv|fprop|dgrad|implicit"),
    ("matrix product", r"gemm|mm\b|mm_|nvjet|cutlass|cublas|linear|matmul|splitK"),
    ("copy and layout", r"copy|memcpy|memset|cat\b|CatArray|pad|clone|contiguous|fill|zero|upsample|index|gather"),
    ("norm", r"norm"),
    ("elementwise", r"elementwise|mul|add|sub|div|gelu|silu|sigmoid|clamp|exp|pow|sqrt|sin|cos|where|reduce|softmax|mean|sum"),
)


def kind_of(name: str) -> str:
    """The class of a kernel or operator, by its name."""
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes of a class."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: int) -> Work:
        return Work(self.flops * count, self.bytes * count)


def count_work(engine: Engine, todo: Plan) -> dict[tuple[str, str], Work]:
    """(stage, class) -> work of denoising and decoding; what the text encoder does is not counted."""
    work: dict[tuple[str, str], Work] = {}
    forwards = Counter((step.expert, step.attention == "8-bit") for step in todo.steps for _ in range(step.forwards))
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
        for (expert, in_8_bits), count in forwards.items():
            loaded = engine.models[expert]
            assert isinstance(loaded, WanDiT)
            empty = WanDiT(loaded.dims)
            swap(empty, forms_of(loaded))
            model = _on_meta(loaded, empty)
            for block, source in zip(model.blocks, loaded.blocks, strict=True):
                ours = source.self_attn.in_8_bits
                # another project's is counted as an exact one
                block.self_attn.in_8_bits = ours if isinstance(ours, Attention8bit) else None
            latents, timestep = torch.empty(1, *todo.latent_shape), torch.empty(1, 1)
            inputs = Inputs.blank(model.dims, todo.latent_shape)
            context = model.prepare([torch.empty(1, model.dims.text_dim)], grid_of(latents.shape), inputs)
            for kind, done in counted(partial(model, latents, timestep, context, in_8_bits=in_8_bits)).items():
                work["denoise", kind] = work.get(("denoise", kind), Work()) + done * count
        clip = torch.empty(todo.latent_shape)
        noise = None if todo.steps[0].noise is None else clip
        guided = partial(guidance_step, clip, clip, clip, clip, clip, clip, torch.empty(11), None, noise)
        stepped = counted(guided)["wan_fast kernel"]
        work["denoise", "wan_fast kernel"] = work.get(("denoise", "wan_fast kernel"), Work()) + stepped * len(todo.steps)
        shapes = {name: tuple(t.shape) for name, t in engine.models["vae"].state_dict().items()}
        vae = _on_meta(engine.models["vae"], WanVAE(VaeDims.of_shapes(shapes)))
        cut = {"chunk": todo.memory.decode_chunk, "piece": todo.memory.decode_piece, "tiles": todo.memory.decode_tiles}
        own = clip[:, todo.framing.leading :]
        decoded = counted(lambda: [*vae.decode_stream(own, **cut)])
        work |= {("decode", kind): done for kind, done in decoded.items()}
    return work


def counted(call: Callable[[], object]) -> dict[str, Work]:
    """The work of a call on meta tensors, by class; under no_grad: in inference mode linears would pass before they are
    products."""
    with _Count() as count, _CountAttention(count):
        call()
    return dict(count.work)


@contextmanager
def flops_so_far() -> Iterator[Callable[[], float]]:
    """Counts as `counted` does; yields what has been counted in the block so far."""
    with _Count() as count, _CountAttention(count):
        yield lambda: sum(done.flops for done in count.work.values())


def operations(op: Any, args: Sequence[Any]) -> float:
    """Operations of those of our operators that are more than a pass over their arguments."""
    if op is KERNELS["attention_8bit"].op:
        q, k = args[0], args[2]
        return 4.0 * q.numel() * k.shape[1]
    return convolving(op, args) + multiplying(op, args)


def convolving(op: Any, args: Sequence[Any]) -> float:
    """Operations of `causal_conv3d`; a lone frame behind zeros takes one of the three taps over time."""
    if op not in (KERNELS["causal_conv3d"].op, KERNELS["causal_conv3d_add"].op):
        return 0
    x, past, weight = args[1:4] if op is KERNELS["causal_conv3d_add"].op else args[:3]
    form = args[-1]
    frames, _, H, W = output_shape(x, weight, (*form[:3], 0, 0, 0))
    taps = weight[0].numel() // (weight.shape[2] if past is None and len(x) == 1 else 1)
    return 2.0 * frames * H * W * weight.shape[0] * taps


def multiplying(op: Any, args: Sequence[Any]) -> float:
    """Operations of the products of kernels/gemm_8bit.py."""
    if op not in [KERNELS[name].op for name in ("gemm_8bit", "gemm_8bit_add", "gemm_8bit_gelu")]:
        return 0
    a, _, b = args[1:4] if op is KERNELS["gemm_8bit_add"].op else args[:3]
    return 2.0 * a.numel() * b.shape[0]


def not_touched(op: Any, args: Sequence[Any]) -> float:
    """Bytes of the arguments, as read and as written, that an operator leaves alone."""
    if op is KERNELS["qk_norm_rope"].op:
        x, weight = args[:2]
        return 2 * x.nbytes * (1 - weight.shape[0] / x.shape[2])
    if op is KERNELS["qk_norm_rope_quantized"].op:
        return args[0].nbytes * (1 - 2 / args[0].shape[2])
    if op is KERNELS["keys_center"].op:
        x, _, table, grid = args[:4]
        L, M = x.shape[1:3]
        rows = 0 if table is None or grid else table.nbytes * (1 - len(sampled(L)) / L)
        return x.nbytes * (1 - len(sampled(L)) / (L * M)) + rows
    return -args[0].nbytes if op is KERNELS["quantize_values"].op else 0  # read twice


class _Count(TorchDispatchMode):
    """Adds up the operations and bytes of every operator that runs in the block, by class."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else operations(func, args)
            self.add(str(func._schema.name), flops, (args, kwargs, out), less=not_touched(func, args))
            if out is None:  # what it changed it has written
                written = [a for a, is_ in zip(args, func._schema.arguments, strict=False) if is_.is_write]
                self.add(str(func._schema.name), 0, written)
        return out

    def add(self, name: str, flops: float, touched: Any, less: float = 0) -> None:
        tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, Tensor)]
        # a broadcast tensor is read from what it really holds
        moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        self.work[kind_of(name)] += Work(flops, moved - less)


class _CountAttention(TorchFunctionMode):
    """Counts attention as one operator: on meta PyTorch would spell it out, scores and all."""

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) >= 3 else [kwargs[name] for name in ("query", "key", "value")]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.count.add("attention", 4 * prod(q.shape) * k.shape[-2], (q, k, v, out))
        return out


def _on_meta(model: nn.Module, empty: Any) -> Any:
    """`empty`, a model of the same kind, with the shapes and dtypes of `model` and no values."""
    empty.load_state_dict({n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()}, assign=True)
    return empty.requires_grad_(False).eval()
