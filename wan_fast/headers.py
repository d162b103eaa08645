"""Names, shapes and dtypes of the tensors in a file, from its header alone. Standard library only; reads no weight.

GGUF as in ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from wan_fast.config import WanFastError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# ggml's block types: elements and bytes of a block
BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
_GGML_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: its native name, the name in the file, shape, dtype and file.

    The dtype is spelled as in safetensors, or is one of ggml's block types: "Q4_K".
    """

    name: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """What a file tells of itself: per tensor dtype and shape, and for safetensors and GGUF the byte it begins at; texts
    are metadata, and tensors that hold JSON; `unscaled` are static input scales of exactly 1, which say that there is none."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    texts: Mapping[str, str] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    unscaled: frozenset[str] = frozenset()


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as stored."""
    elements, size = BLOCKS.get(dtype, (1, DTYPE_BYTES.get(dtype, 1)))
    return prod(shape) * size // elements


def read_header(file: Path) -> Header:
    """The header of a .safetensors, .gguf or .pth file.

    Raises:
        WanFastError: the file is truncated, of another format, or holds other objects than tensors.
    """
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_gguf(file) if file.suffix == ".gguf" else Header(read_pth_header(file))


def read_safetensors_header(file: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a safetensors file, whose length is checked against its header.

    Raises:
        WanFastError: the file is truncated or not safetensors.
    """
    return _read_safetensors(file).tensors


def _read_safetensors(file: Path) -> Header:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100_000_000):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
            texts = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
            unscaled = set()
            offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
            for name, (dtype, shape) in tensors.items():
                start, stop = header[name]["data_offsets"]
                if dtype in DTYPE_BYTES and stop - start != prod(shape) * DTYPE_BYTES[dtype]:
                    raise ValueError(f"tensor {name} occupies {stop - start} bytes")
                if name.endswith(".comfy_quant") and stop - start < 10_000:
                    stream.seek(offsets[name])
                    texts[name] = stream.read(stop - start).decode()
                if name.endswith((".input_scale", ".scale_input")) and prod(shape) == 1:
                    stream.seek(offsets[name])
                    if stream.read(stop - start) == _ONE.get(dtype):
                        unscaled.add(name)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise WanFastError(f"{str(file)!r} is not a whole safetensors file ({error}); download it again") from error
    if size != 8 + length + end:
        raise WanFastError(
            f"{str(file)!r} is truncated: {size:,} bytes, its header promises {8 + length + end:,}; download it again"
        )
    return Header(tensors, texts, offsets, frozenset(unscaled))


_ONE = {"F32": struct.pack("<f", 1), "F16": struct.pack("<e", 1), "BF16": struct.pack("<f", 1)[2:]}
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
_UNTYPED = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


class _HeaderUnpickler(pickle.Unpickler):
    """Reads the skeleton of a state dict; any other object in the pickle is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, *rest: (storage, tuple(shape))
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):  # fp8: the storage has no dtype
            return lambda storage, offset, shape, stride, grad, hooks, dtype, *rest: (dtype, tuple(shape))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _UNTYPED:
            return _UNTYPED[name]
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return "U8"
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")

    def persistent_load(self, reference: Any) -> str:
        return reference[1]  # ("storage", dtype, key, location, length)


def state_dict_in(content: Any) -> Any:
    """What torch.save was given, less the dict that training code wraps the state dict in."""
    inner = next((content[key] for key in ("state_dict", "model_state") if key in content), None)
    return inner if isinstance(inner, dict) else content


def read_pth_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a torch.save'd state dict, without running anything that the pickle asks for.

    Raises:
        WanFastError: the file is truncated, not a state dict, or holds other objects than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(member) as stream:
                content = _HeaderUnpickler(stream).load()
        return {str(name): (value[0], value[1]) for name, value in state_dict_in(content).items()}
    except pickle.UnpicklingError as error:
        raise WanFastError(f"{str(file)!r} is refused: {error}; take a file with tensors only") from error
    except (zipfile.BadZipFile, StopIteration, OSError, EOFError) as error:
        raise WanFastError(f"{str(file)!r} is truncated or no PyTorch file ({error}); download it again") from error
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise WanFastError(f"{str(file)!r} is no state dict ({error}); take the released file") from error


# by GGUF's number of a value's type; 8 is a string, 9 an array
_GGUF_VALUES = {
    number: struct.Struct(f"<{code}")
    for number, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.items()
}


def _read_gguf(file: Path) -> Header:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            magic, version, num_tensors, num_values = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            values = dict(_gguf_value(stream) for _ in range(num_values))
            listed = [_gguf_tensor(stream) for _ in range(num_tensors)]
            alignment = int(values.get("general.alignment", 32))
            if alignment < 1:
                raise ValueError(f"alignment of {alignment} bytes")
            start = -(-stream.tell() // alignment) * alignment
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError, struct.error, OSError) as error:
        raise WanFastError(f"{str(file)!r} is not a whole GGUF file ({error}); download it again") from error
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape, kind, offset in listed:
        if kind not in _GGML_TYPES:
            raise WanFastError(
                f"{str(file)!r} holds {name} in ggml type {kind}, which this version does not read; take one of "
                f"{' '.join(BLOCKS)}"
            )
        end = start + offset + num_bytes(_GGML_TYPES[kind], shape)
        if end > size:
            raise WanFastError(f"{str(file)!r} is truncated: {size:,} bytes, {name} ends at {end:,}; download it again")
        original = tuple(values.get(f"comfy.gguf.orig_shape.{name}", shape))
        if prod(original) != prod(shape):
            raise WanFastError(f"{str(file)!r} tells two shapes of {name}: {shape} and {original}; take another conversion")
        tensors[name] = (_GGML_TYPES[kind], original)
    return Header(tensors, offsets={name: start + offset for name, _, _, offset in listed})


def _gguf_value(stream: BinaryIO) -> tuple[str, Any]:
    """Key and value at the stream's position; of an array only a short one of numbers is kept."""
    key = _gguf_string(stream).decode()
    (kind,) = struct.unpack("<I", stream.read(4))
    if kind == 8:
        return key, _gguf_string(stream)
    if kind != 9:
        return key, _GGUF_VALUES[kind].unpack(stream.read(_GGUF_VALUES[kind].size))[0]
    kind, count = struct.unpack("<IQ", stream.read(12))
    if kind == 8:
        for _ in range(count):
            _gguf_string(stream)
        return key, None
    number = _GGUF_VALUES[kind]
    if count > 16:
        stream.seek(count * number.size, 1)
        return key, None
    return key, [number.unpack(stream.read(number.size))[0] for _ in range(count)]


def _gguf_tensor(stream: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (slowest axis first, as in torch), type and offset of the tensor listed at the stream's position."""
    name = _gguf_string(stream).decode()
    (rank,) = struct.unpack("<I", stream.read(4))
    if rank > 8:
        raise ValueError(f"{name} has {rank} dimensions")
    *shape, kind, offset = struct.unpack(f"<{rank}QIQ", stream.read(8 * rank + 12))
    return name, tuple(reversed(shape)), kind, offset


def _gguf_string(stream: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 100_000_000:
        raise ValueError(f"string of {length} bytes")
    text = stream.read(length)
    if len(text) != length:
        raise ValueError("it ends within a string")
    return text
