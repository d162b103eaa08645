"""The tensors of one model: described by its files' headers, then read one after the other, quantised ones too.

W = values * scale, in fp32. What a file holds in e4m3 or int8 with a scale per tensor, row or 128 x 128 block is read as it is;
all else that is quantised comes as plain fp32. Describing needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_fast.config import WanFastError
from wan_fast.dialects import BLOCK, granularity
from wan_fast.headers import BLOCKS, TensorInfo, num_bytes, read_header, state_dict_in

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One model of a checkpoint (a DiT, the VAE, the text encoder): its config and its tensors by native name.

    `scales` maps the name of a quantised weight to its "weight_scale", "input_scale" and "pre_quant_scale", those it has;
    `stored_8bit` maps the weights that can be computed with as they are to "fp8" (e4m3) or "int8".
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    dialect: str = "plain"
    scales: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    stored_8bit: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors as stored, scales among them."""
        scales = (info for kinds in self.scales.values() for info in kinds.values())
        return sum(num_bytes(info.dtype, info.shape) for info in (*self.tensors.values(), *scales))

    @property
    def dtypes(self) -> str:
        return "+".join(sorted({info.dtype.lower() for info in self.tensors.values()}))

    @property
    def quantisation(self) -> str:
        """In a line: the dialect, how many weights are in which format, what has a scale of its own, what is computed with."""
        packed = {n: i for n, i in self.tensors.items() if i.dtype in (*BLOCKS, "F8_E4M3", "F8_E5M2", "I8")}
        if not packed:
            return "none"
        formats = Counter(
            info.dtype.lower() for name, info in packed.items() if name.endswith(".weight") and len(info.shape) == 2
        )
        told = [" ".join(f"{count} {dtype}" for dtype, count in sorted(formats.items())) + " linears"]
        weights = {name: kinds["weight_scale"] for name, kinds in self.scales.items() if "weight_scale" in kinds}
        if weights:
            spans = {str(granularity(info.shape, self.shapes[name])) for name, info in weights.items()}
            told.append(f"a scale per {' or '.join(sorted(spans))}")
            static = any("input_scale" in kinds for kinds in self.scales.values())
            told.append(f"static input scales {'yes' if static else 'no'}")
        return f"{self.dialect}: {', '.join(told)}; {len(self.stored_8bit)} can be computed with as stored"


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in 8 bits, W = values * scale * smooth.

    values: [N, K] float8_e4m3fn or int8. scale: [N] or [ceil(N / 128), ceil(K / 128)] fp32. input_scale: [] fp32, the static
    scale of the activation. smooth: [K] fp32, what the activation is multiplied by before it is quantised.
    """

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None = None
    smooth: Tensor | None = None

    def dequantized(self) -> Tensor:
        """[N, K] fp32, the weight for an activation that is not smoothed."""
        weight = scaled(self.values, self.scale)
        return weight if self.smooth is None else weight * self.smooth


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale in fp32.

    Args:
        values: [N, ...] of any dtype.
        scale: fp32, of a shape that `granularity` knows: per tensor, row, block, square or group.
    """
    weight, span = values.float(), granularity(tuple(scale.shape), tuple(values.shape))
    if span == "tensor":
        return weight * scale.reshape(())
    if span == "row":
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    rows, columns = weight.shape
    if span == "group":
        return (weight.view(rows, scale.shape[1], -1) * scale).view(rows, columns)
    size = BLOCK if span == "block" else rows // scale.shape[0]
    return weight * scale.repeat_interleave(size, 0)[:rows].repeat_interleave(size, 1)[:, :columns]


def read_tensors(part: Part) -> Iterator[tuple[str, Tensor | Packed]]:
    """(native name, tensor on the CPU) one after the other; files are mapped, not read whole.

    The weights in `part.stored_8bit` come as Packed, other quantised ones as fp32.

    Raises:
        WanFastError: a scale is not finite and positive; before the first tensor.
    """
    import torch

    scales = _read_scales(part)
    for info, tensor in _read(part.tensors.values()):
        kinds = scales.get(info.name, {})
        if info.name in part.stored_8bit:
            yield info.name, _packed(tensor, kinds)
        elif info.dtype in ("F8_E4M3", "F8_E5M2", "I8"):
            scale, smooth = kinds.get("weight_scale", torch.ones(())), kinds.get("pre_quant_scale")
            weight = scaled(tensor, scale)
            yield info.name, weight if smooth is None else weight * smooth.reshape(-1)
        else:
            yield info.name, tensor


def _packed(values: Tensor, kinds: Mapping[str, Tensor]) -> Packed:
    import torch

    scale, smooth = kinds.get("weight_scale", torch.ones(())), kinds.get("pre_quant_scale")
    span = granularity(tuple(scale.shape), tuple(values.shape))
    if span != "block":
        scale = scale.reshape(-1).expand(values.shape[0]).contiguous()
    return Packed(values, scale, kinds.get("input_scale"), None if smooth is None else smooth.reshape(-1))


def _read_scales(part: Part) -> dict[str, dict[str, Tensor]]:
    """The scales of every quantised weight in fp32, checked."""
    wanted = {
        (info.file, info.stored_name): (name, kind) for name, kinds in part.scales.items() for kind, info in kinds.items()
    }
    scales: dict[str, dict[str, Tensor]] = {}
    for info, tensor in _read(info for kinds in part.scales.values() for info in kinds.values()):
        scale = tensor.float()
        low, high = (bound.item() for bound in scale.aminmax())
        if not (low > 0 and isfinite(high)):
            value = low if not low > 0 else high
            raise WanFastError(
                f"{str(info.file)!r} has {value:g} in {info.stored_name}, where every scale is a positive number; "
                "download it again"
            )
        name, kind = wanted[info.file, info.stored_name]
        if kind == "input_scale":
            scale = scale.reshape(())
        scales.setdefault(name, {})[kind] = scale
    return scales


# --- files ------------------------------------------------------------------------------------------------------------


def _read(infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """Each tensor in its native shape, file after file; ggml's blocks in fp32."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        by_file.setdefault(info.file, []).append(info)
    for file, inside in by_file.items():
        with _opened(file) as read:
            for info in inside:
                tensor = read(info)
                yield info, tensor if tuple(tensor.shape) == info.shape else tensor.reshape(info.shape)


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[TensorInfo], Tensor]]:
    import torch

    if file.suffix == ".gguf":
        offsets = read_header(file).offsets
        yield lambda info: _from_blocks(info, offsets[info.stored_name])
    elif file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            yield lambda info: _as_fp8(opened.get_tensor(info.stored_name), info.dtype)
    else:
        state = state_dict_in(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        yield lambda info: state.pop(info.stored_name)


def _as_fp8(tensor: Tensor, dtype: str) -> Tensor:
    """fp8 from the bytes that some files keep it as."""
    import torch

    if tensor.dtype is not torch.uint8 or not dtype.startswith("F8_"):
        return tensor
    return tensor.view(torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.float8_e5m2)


def _from_blocks(info: TensorInfo, offset: int) -> Tensor:
    """A tensor of a GGUF file in fp32, by ggml's own library."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.memmap(info.file, np.uint8, "r", offset, (num_bytes(info.dtype, info.shape),))
    # whole rows of blocks where there are any, which is what the library works on
    elements, _ = BLOCKS.get(info.dtype, (1, 1))
    rows = info.shape[0] if info.shape and prod(info.shape[1:]) % elements == 0 else 1
    # a copy: fp32 is passed through, and the file is mapped read-only
    return torch.from_numpy(np.array(dequantize(data.reshape(rows, -1), GGMLQuantizationType[info.dtype]))).view(info.shape)
