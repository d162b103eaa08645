"""Names, shapes and dtypes of the tensors in a file, from its header alone. Standard library only; reads no weight."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

from wan_fast.config import WanFastError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def read_safetensors_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a safetensors file, whose length is checked against its header.

    Raises:
        WanFastError: the file is truncated or not safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100_000_000):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        for name, (dtype, shape) in tensors.items():
            start, stop = header[name]["data_offsets"]
            if dtype in DTYPE_BYTES and stop - start != prod(shape) * DTYPE_BYTES[dtype]:
                raise ValueError(f"tensor {name} occupies {stop - start} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OSError) as error:
        raise WanFastError(f"{str(file)!r} is not a whole safetensors file ({error}); download it again") from error
    if size != 8 + length + end:
        raise WanFastError(
            f"{str(file)!r} is truncated: {size:,} bytes, its header promises {8 + length + end:,}; download it again"
        )
    return tensors


_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip


class _HeaderUnpickler(pickle.Unpickler):
    """Reads the skeleton of a state dict; any other object in the pickle is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, *rest: (storage, tuple(shape))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")

    def persistent_load(self, reference: Any) -> str:
        return reference[1]  # ("storage", dtype, key, location, length)


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
        return {str(name): (value[0], value[1]) for name, value in content.items()}
    except pickle.UnpicklingError as error:
        raise WanFastError(f"{str(file)!r} is refused: {error}; take a file with tensors only") from error
    except (zipfile.BadZipFile, StopIteration, OSError, EOFError) as error:
        raise WanFastError(f"{str(file)!r} is truncated or no PyTorch file ({error}); download it again") from error
    except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise WanFastError(f"{str(file)!r} is no state dict ({error}); take the released file") from error
