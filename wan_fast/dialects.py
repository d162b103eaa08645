"""Quantised files in the dialects they are published in, told apart by content. Standard library only; reads no weight.

W is the stored weight times its scale in every dialect, whose names are:
  plain         16 or 32 bits, and nothing else
  raw fp8       weights cast to fp8, no scales
  scaled_fp8    `M.scale_weight`, marked by the tensor `scaled_fp8`: ComfyUI until 2025, kijai, musubi-tuner
  comfy_quant   `M.weight_scale`, and a format per layer in JSON: ComfyUI's QUANTIZATION.md
  weight_scale  `M.weight_scale`, often [out, 1]: LightX2V
  modelopt      `M.weight_scale`, and `quantization_config` in config.json: NVIDIA ModelOpt's Hugging Face export
  turbodiffusion  `M.int8_weight` and `M.scale` per 128 x 128: thu-ml/TurboDiffusion
  gguf          ggml's blocks
  wan-fast      `M.weight_scale` per row or 128 x 128, as this project writes them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from wan_fast.config import WanFastError
from wan_fast.headers import BLOCKS, TensorInfo
from wan_fast.names import Rules, native_name, rules_for

BLOCK = 128
# (weight dtype) -> what it is called where it is computed with as it is
FORMATS = {"F8_E4M3": "fp8", "I8": "int8"}

_PREFIXES = ("model.diffusion_model.", "model.", "net.")
# no weights: they stand beside the model, with or without its prefix
_MARKER, TOKENIZER = "scaled_fp8", "spiece_model"
_SCALES = {
    ".weight_scale": "weight_scale",
    ".scale_weight": "weight_scale",
    ".input_scale": "input_scale",
    ".scale_input": "input_scale",
    ".pre_quant_scale": "pre_quant_scale",
}
_COMFY_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8", "int8_blockwise": "I8"}
_MODELOPT_FORMATS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL", "W8A16", "MIXED_PRECISION")
# tensors that only 4-bit formats have
_NVFP4 = ("weight_scale_2", "global_scale", "input_absmax", "svdquant_lora_a", "svdquant_lora_b")
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Contents:
    """The tensors of a model by native name, apart from the scales of its quantised weights.

    `scales` maps a weight to its "weight_scale", "input_scale" and "pre_quant_scale"; `stored_8bit` maps those weights that
    can be computed with as they are to "fp8" (e4m3) or "int8".
    """

    dialect: str
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, Mapping[str, TensorInfo]]
    stored_8bit: Mapping[str, str]


@dataclass(frozen=True)
class _Declared:
    """What a file says of its formats beside the tensors: the dialect if that settles it, the dtype of weights by module,
    and the modules to be computed in high precision ("" for all)."""

    dialect: str | None
    dtypes: Mapping[str, str]
    high_precision: frozenset[str]


def split(stored: Iterable[TensorInfo], texts: Mapping[str, str], config: Mapping[str, Any], rules: Rules | None) -> Contents:
    """Tell weights from scales, by native name.

    Args:
        stored: every tensor of the model's files, under its stored name.
        texts: the files' metadata, and their tensors that hold JSON.
        config: the model's config.json.
        rules: from stored to native names; None: told from the names.

    Raises:
        WanFastError: a format is not supported, or weights and scales do not match.
    """
    stored = list(stored)
    where = str(stored[0].file) if stored else "the file"
    prefix = prefix_of(info.stored_name for info in stored)
    by_name: dict[str, TensorInfo] = {}
    for info in stored:
        name = info.stored_name.removeprefix(prefix)
        _add(by_name, f"{name[:-12]}.weight" if name.endswith(".int8_weight") else name, info)
    texts = {name.removeprefix(prefix): text for name, text in texts.items()}
    declared = _declared(where, by_name, texts, config, prefix)
    weights, scales = _sort(where, by_name)
    rules = rules_for(weights) if rules is None else rules
    native = {name: native_name(name, rules) for name in weights}
    tensors: dict[str, TensorInfo] = {}
    for name, info in weights.items():
        if (short := native[name]) is not None:
            module = name.removesuffix(".weight")
            _add(tensors, short, replace(info, name=short, dtype=declared.dtypes.get(module, info.dtype)))
    named = {str(native[name]): kinds for name, kinds in scales.items() if native[name] is not None}
    dialect = declared.dialect or _dialect(by_name, tensors, named)
    _check_scales(where, tensors, named, dialect)
    high = {str(native.get(f"{module}.weight")) for module in declared.high_precision}
    if "" in declared.high_precision:
        high = set(tensors)
    tensors = {name: _native_shape(info) for name, info in tensors.items()}
    if dialect == "gguf" and "blocks.0.self_attn.q.weight" in tensors and "patch_embedding.weight" not in tensors:
        raise WanFastError(
            f"{where!r} has no patch_embedding.weight: it has five dimensions, and its converter knew only four; "
            "take another conversion of the model"
        )
    return Contents(dialect, tensors, named, _as_stored(tensors, named, high))


def prefix_of(stored: Iterable[str]) -> str:
    """What every name begins with and no native name does."""
    names = [name for name in stored if name not in (_MARKER, TOKENIZER)]
    return next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), "")


def granularity(scale: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    """What has a scale of its own, from the shapes: the "tensor", each "row", each "block" of 128 x 128; a "square" of another
    size, a "group" within a row; None where the shapes do not match."""
    rows, *rest = weight or (1,)
    if prod(scale) == 1:
        return "tensor"
    if scale[:1] == (rows,) and prod(scale) == rows:
        return "row"
    if len(weight) != 2:
        return None
    (columns,) = rest
    if scale == (-(-rows // BLOCK), -(-columns // BLOCK)):
        return "block"
    if len(scale) == 3 and scale[0] == rows and scale[2] == 1 and scale[1] > 0 and columns % scale[1] == 0:
        return "group"
    if len(scale) == 2 and 0 not in scale and rows % scale[0] == columns % scale[1] == 0:
        return "square" if rows // scale[0] == columns // scale[1] else None
    return None


def _add(to: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    if name in to:
        raise WanFastError(
            f"tensor {name} stands twice in {str(info.file.parent)!r}: as {to[name].stored_name} and as {info.stored_name}; "
            "download the files again into an empty folder"
        )
    to[name] = info


def _sort(where: str, by_name: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, dict[str, TensorInfo]]]:
    """The weights, and for each that has any its scales; every scale belongs to a weight."""
    weights, scales = dict[str, TensorInfo](), dict[str, dict[str, TensorInfo]]()
    for name, info in by_name.items():
        module, dot, last = name.rpartition(".")
        kind = _SCALES.get(dot + last)
        if last == "scale" and by_name.get(f"{module}.weight", info).stored_name.endswith(".int8_weight"):
            kind = "weight_scale"
        if ".proj_l." in name:
            raise WanFastError(
                f"{where!r} was trained with sparse-linear attention ({name}), which this version does not compute; "
                "take a checkpoint with dense attention"
            )
        if last.endswith(_NVFP4):
            raise _refused(where, "nvfp4", name)
        if kind is None:
            if last != "comfy_quant" and name not in (_MARKER, TOKENIZER):
                weights[name] = info
        elif f"{module}.weight" not in by_name:
            raise WanFastError(f"{where!r} has a scale {name} without {module}.weight; download it again")
        else:
            _add(scales.setdefault(f"{module}.weight", {}), kind, info)
    return weights, scales


def _dialect(
    by_name: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo], scales: Mapping[str, Mapping[str, TensorInfo]]
) -> str:
    """The dialect where nothing but the tensors tells it."""
    if any(info.stored_name.endswith(".int8_weight") for info in by_name.values()):
        return "turbodiffusion"
    if any(info.stored_name.endswith((".scale_weight", ".scale_input")) for info in by_name.values()):
        return "scaled_fp8"
    if scales:
        return "weight_scale"
    if any(info.file.suffix == ".gguf" for info in tensors.values()):
        return "gguf"
    return "raw fp8" if any(info.dtype.startswith("F8_") for info in tensors.values()) else "plain"


# --- what files say of themselves -----------------------------------------------------------------------------------


def _declared(
    where: str, by_name: Mapping[str, TensorInfo], texts: Mapping[str, str], config: Mapping[str, Any], prefix: str
) -> _Declared:
    if "wan_fast_quantization" in texts:
        return _Declared("wan-fast", {}, frozenset())
    quantization = config.get("quantization_config") or _parsed(where, texts, "quantization_config")
    if quantization:
        return _modelopt(where, quantization)
    layers = _object(where, "_quantization_metadata", _parsed(where, texts, "_quantization_metadata").get("layers", {}))
    layers = {name.removeprefix(prefix): layer for name, layer in layers.items()}
    for name in texts:
        if name.endswith(".comfy_quant"):
            layers[name.removesuffix(".comfy_quant")] = _parsed(where, texts, name)
    if layers:
        return _comfy_quant(where, by_name, layers)
    if (marker := by_name.get(_MARKER)) is not None:
        return _Declared("scaled_fp8", {}, frozenset({""} if prod(marker.shape) == 2 else ()))
    return _Declared(None, {}, frozenset())


def _comfy_quant(where: str, by_name: Mapping[str, TensorInfo], layers: Mapping[str, Mapping[str, Any]]) -> _Declared:
    dtypes, high = {}, set()
    for module, layer in layers.items():
        layer = _object(where, f"what it declares of {module}", layer)
        form = layer.get("format")
        if form not in _COMFY_FORMATS or any(value for key, value in layer.items() if key.startswith("convrot")):
            raise _refused(where, f"{form} with convrot" if form in _COMFY_FORMATS else str(form), module)
        weight = by_name.get(f"{module}.weight")
        if weight is None or weight.dtype not in (_COMFY_FORMATS[form], "U8" if form.startswith("float8") else ""):
            seen = "is missing" if weight is None else f"is {weight.dtype}"
            raise WanFastError(f"{where!r} declares {module}.weight as {form}, but it {seen}; download it again")
        dtypes[module] = _COMFY_FORMATS[form]
        if layer.get("full_precision_matrix_mult"):
            high.add(module)
    return _Declared("comfy_quant", dtypes, frozenset(high))


def _modelopt(where: str, config: Any) -> _Declared:
    method = config.get("quant_method", "modelopt") if isinstance(config, dict) else config
    if method != "modelopt":
        raise _refused(where, str(method))
    layers = {"": config.get("quant_algo")}
    if layers[""] == "MIXED_PRECISION":
        listed = _object(where, "quantized_layers", config.get("quantized_layers") or {})
        layers |= {name: _object(where, name, layer).get("quant_algo") for name, layer in listed.items()}
    for module, algo in layers.items():
        if algo not in _MODELOPT_FORMATS:
            raise _refused(where, f"ModelOpt's {algo}", module)
    # 8 bits for weights, 16 for activations
    return _Declared("modelopt", {}, frozenset(module for module, algo in layers.items() if algo == "W8A16"))


def _parsed(where: str, texts: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        content = json.loads(texts.get(key, "{}"))
    except ValueError as error:
        raise WanFastError(f"{where!r} holds no JSON in {key} ({error}); download it again") from error
    return _object(where, key, content)


def _object(where: str, key: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise WanFastError(f"{where!r} holds no JSON object in {key}: {str(content)[:80]!r}; download it again")
    return content


def _refused(where: str, form: str, name: str = "") -> WanFastError:
    return WanFastError(
        f"{where!r} holds weights in the format {form}{f' ({name})' if name else ''}, which this version does not read; "
        "take the model in bf16, fp8 (e4m3 or e5m2), int8 or GGUF"
    )


# --- weights and their scales ----------------------------------------------------------------------------------------


def _check_scales(
    where: str, tensors: Mapping[str, TensorInfo], scales: Mapping[str, Mapping[str, TensorInfo]], dialect: str
) -> None:
    for name, info in tensors.items():
        kinds = scales.get(name, {})
        if name.endswith(".weight") and info.dtype not in (*_FLOATS, *FORMATS, *BLOCKS, "F8_E5M2"):
            raise _refused(where, f"{info.dtype} (mxfp8, nvfp4 or another packed one)", name)
        needs = info.dtype == "I8" or (info.dtype.startswith("F8_") and len(info.shape) > 1 and name.endswith(".weight"))
        if needs and "weight_scale" not in kinds and not (dialect == "raw fp8" and info.dtype != "I8"):
            raise WanFastError(f"{where!r} has no scale for {info.stored_name}, which is {info.dtype}; download it again")
        if kinds and not (info.dtype in FORMATS or info.dtype == "F8_E5M2"):
            surplus = next(iter(kinds.values())).stored_name
            raise WanFastError(f"{where!r} has a scale {surplus} for a weight that is {info.dtype}; download it again")
        for kind, scale in kinds.items():
            if scale.dtype not in _FLOATS:
                raise _refused(where, "mxfp8" if scale.dtype in ("U8", "F8_E8M0") else "nvfp4", scale.stored_name)
            fits = {
                "weight_scale": granularity(scale.shape, info.shape) is not None,
                "input_scale": prod(scale.shape) == 1,
                "pre_quant_scale": len(info.shape) == 2 and scale.shape in (info.shape[1:], (1, *info.shape[1:])),
            }
            if not fits[kind]:
                raise WanFastError(
                    f"{where!r} has {scale.stored_name} of shape {list(scale.shape)}, which fits no part of "
                    f"{info.stored_name} {list(info.shape)}; download it again"
                )


def _native_shape(info: TensorInfo) -> TensorInfo:
    """TurboDiffusion keeps the patch embedding as a linear layer over (channel, 1, 2, 2), Diffusers the biases of Animate's
    motion encoder without the axes that they are added along."""
    if info.name == "patch_embedding.weight" and len(info.shape) == 2 and info.shape[1] % 4 == 0:
        return replace(info, shape=(info.shape[0], info.shape[1] // 4, 1, 2, 2))
    if ".net_app." in info.name and len(info.shape) == 1:
        return replace(info, shape=(1, *info.shape, 1, 1))
    return info


def _as_stored(
    tensors: Mapping[str, TensorInfo], scales: Mapping[str, Mapping[str, TensorInfo]], high_precision: set[str]
) -> dict[str, str]:
    formats = {}
    for name, info in tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in FORMATS and name not in high_precision:
            scale = scales.get(name, {}).get("weight_scale")
            if scale is None or granularity(scale.shape, info.shape) in ("tensor", "row", "block"):
                formats[name] = FORMATS[info.dtype]
    return formats
