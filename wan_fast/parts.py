"""One model of a checkpoint by itself: which file or shards it lies in, of which kind it is, and its tensors by native name.

Nothing here needs torch or a GPU, or reads a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_fast import dialects
from wan_fast.dialects import TOKENIZER
from wan_fast.errors import WanFastError
from wan_fast.headers import TensorInfo, read_header
from wan_fast.names import CLIP_NAMES, Rules, model_of
from wan_fast.weights import Part

# where a tokenizer lies in a native checkpoint
UMT5 = "google/umt5-xxl"
# where the audio encoder lies in a native checkpoint
WAV2VEC2 = "wav2vec2-large-xlsr-53-english"


def open_dit(folder: Path) -> Part:
    """One transformer in a folder of its own, in either layout and any dialect."""
    return part_in(folder, "diffusion_pytorch_model", "DiT")


def open_part(path: Path, what: str) -> Part:
    """One model by itself: a file with it, or a folder, in any dialect and with native names, Diffusers' or transformers'.

    Args:
        path: a .safetensors, .pth or .gguf file; a folder with one, or with shards.
        what: "DiT", "VAE", "text encoder", "image encoder" or "audio encoder".

    Raises:
        WanFastError: it holds another model or none, or cannot be read.
    """
    stem = "model" if what.endswith("encoder") else "diffusion_pytorch_model"
    if not path.is_dir() and re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise WanFastError(f"{str(path)!r} is one of several shards; give the folder that they lie in")
    found = files_of(path, stem, what) if path.is_dir() else [path]
    seen = model_in(found)
    if seen != what:
        raise WanFastError(f"{_FLAGS[what]} {str(path)!r} {looks(found, seen)}")
    if what == "image encoder":
        return image_encoder_in(found, path)
    config = found[0].parent / "config.json"
    # beside a file of another name it may be another model's
    described = found[0].name.startswith(stem) and config.is_file()
    return part_of(found, path, read_json(config) if described else {}, computes=what == "DiT")


_FLAGS = {
    "DiT": "--dit",
    "VAE": "--vae",
    "text encoder": "--text_encoder",
    "image encoder": "--image_encoder",
    "audio encoder": f"{WAV2VEC2}/ in --ckpt_dir",
    "LoRA": "--lora",
    "UniAnimate file": "--unianimate_ckpt",
}


def _a(what: str) -> str:
    return f"{'an' if what.startswith(('image', 'audio')) else 'a'} {what}"


def model_in(found: Sequence[Path]) -> str | None:
    """Which model these files hold, as `names.model_of` tells."""
    stored = [name for file in found for name in read_header(file).tensors]
    prefix = dialects.prefix_of(stored)
    return model_of([name.removeprefix(prefix) for name in stored])


def looks(found: Sequence[Path], seen: str | None) -> str:
    """What is in these files instead of what was asked for, and what to do."""
    if seen:
        return f"looks like {_a(seen)}; give it as {_FLAGS[seen]}"
    stored = sorted({name for file in found for name in read_header(file).tensors})
    named = f"tensors such as {', '.join(stored[:: max(1, len(stored) // 3)][:3])}" if stored else "no tensors"
    return f"holds no model that this version knows: it has {named}; take the file of one DiT, VAE or encoder"


def tokenizer_of(text_encoder: Part) -> Path | None:
    """The tokenizer that comes with a text encoder: the folder of a tokenizer.json where either layout has it beside the
    encoder, else the encoder's file if it holds one."""
    path = text_encoder.path
    beside = path.parent / "tokenizer" if path.is_dir() else path.parent / UMT5
    if (beside / "tokenizer.json").is_file():
        return beside
    found = dict.fromkeys(info.file for info in text_encoder.tensors.values() if info.file.suffix == ".safetensors")
    return next((file for file in found if TOKENIZER in read_header(file).tensors), None)


def read_tokenizer(where: Path) -> bytes:
    """A tokenizer.json, or the SentencePiece model in a text encoder's file: `Checkpoint.tokenizer` is one or the other.

    Raises:
        WanFastError: it cannot be read.
    """
    try:
        if where.is_dir():
            return (where / "tokenizer.json").read_bytes()
        header = read_header(where)
        dtype, shape = header.tensors[TOKENIZER]
        if dtype not in ("U8", "I8") or len(shape) != 1:
            raise WanFastError(f"{TOKENIZER} in {str(where)!r} is {dtype} {list(shape)}, not bytes; take another file")
        with where.open("rb") as stream:
            stream.seek(header.offsets[TOKENIZER])
            return stream.read(shape[0])
    except OSError as error:
        raise WanFastError(f"the tokenizer in {str(where)!r} cannot be read ({error}); download it again") from error


def text_encoder_in(folder: Path) -> Part | None:
    return part_in(folder, "model", "text encoder") if folder.is_dir() else None


def image_encoder_in(found: Sequence[Path], path: Path) -> Part:
    """CLIP's image tower up to the layer whose tokens are taken, without the axes of length 1 that some files have."""
    part = part_of(found, path, {}, CLIP_NAMES)
    layers = [int(match[1]) for name in part.tensors if (match := re.match(r"visual\.transformer\.(\d+)\.", name))]
    last = f"visual.transformer.{max(layers, default=-1)}."
    axes = {"visual.cls_embedding": 1, "visual.pos_embedding": 2}
    tensors = {
        name: replace(info, shape=info.shape[-axes.get(name, len(info.shape)) :])
        for name, info in part.tensors.items()
        if not name.startswith(last)
    }
    return replace(part, tensors=tensors, scales={name: kinds for name, kinds in part.scales.items() if name in tensors})


def audio_encoder_in(folder: Path) -> Part | None:
    """wav2vec2 in a folder of a checkpoint: under its usual name, or the one whose config.json says so.

    Raises:
        WanFastError: there are several, or it cannot be read.
    """
    found = [folder / WAV2VEC2] if (folder / WAV2VEC2).is_dir() else []
    for config in () if found else sorted(folder.glob("*/config.json")):
        if read_json(config).get("model_type") == "wav2vec2":
            found.append(config.parent)
    if len(found) > 1:
        named = ", ".join(f"{path.name}/" for path in found)
        raise WanFastError(f"{str(folder)!r} holds several folders with an audio encoder: {named}; keep one")
    return part_in(found[0], "model", "audio encoder") if found else None


def part_in(folder: Path, stem: str, what: str) -> Part:
    found, config = files_of(folder, stem, what), folder / "config.json"
    # a file of another name may come without a config: the sizes are then those of its tensors
    required = found[0].name.startswith(stem)
    return part_of(found, folder, read_json(config) if required or config.is_file() else {}, computes=what == "DiT")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WanFastError(f"{str(path)!r} does not exist; download the whole repository") from None
    except (OSError, ValueError) as error:
        raise WanFastError(f"{str(path)!r} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WanFastError(f"{str(path)!r} holds no JSON object; download it again")
    return content


def files_of(folder: Path, stem: str, what: str) -> list[Path]:
    """`stem`.safetensors, or the shards its index lists, or the one other file with such a model."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WanFastError(f"{str(index)!r} has no weight_map from tensors to files; download it again")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise WanFastError(f"shard {shard.name} of {len(shards)} is missing from {str(folder)!r}; download it")
        return shards
    # Phantom's is of another name, beside a model of another size
    others = sorted(folder.glob("*.safetensors.index.json")) if what == "DiT" else []
    if len(others) == 1 and index.name not in others[0].name:
        return files_of(folder, others[0].name.removesuffix(".safetensors.index.json"), what)
    if other := find_model(folder, what):
        return [other]
    raise WanFastError(
        f"{str(folder)!r} holds neither {single.name} nor {index.name}, nor another file with {_a(what)}; "
        "download the whole repository"
    )


def find_model(folder: Path, what: str) -> Path | None:
    """The one file in a folder that holds such a model, whatever it is called.

    Raises:
        WanFastError: there are several, or none and one that cannot be read.
    """
    found, unreadable = [], None
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in (".safetensors", ".gguf", ".pth") and file.is_file():
            try:
                if model_in([file]) == what:
                    found.append(file)
            except WanFastError as error:
                unreadable = unreadable or error
    if len(found) > 1:
        raise WanFastError(
            f"{str(folder)!r} holds several files with {_a(what)}: {', '.join(file.name for file in found)}; keep one"
            + (", or the two of an A14B model in high_noise_model/ and low_noise_model/" if what == "DiT" else "")
        )
    if not found and unreadable is not None and what == "DiT":
        raise unreadable
    return found[0] if found else None


def part_of(
    found: Sequence[Path], path: Path, config: Mapping[str, Any], names: Rules | None = None, *, computes: bool = False
) -> Part:
    """The model in these files; `names` maps stored to native names, None: told from them; `computes`: in 8 bits if it can."""
    stored: list[TensorInfo] = []
    texts: dict[str, str] = {}
    for file in found:
        if file.suffix == ".gguf" and find_spec("gguf") is None:
            raise WanFastError(f"{str(file)!r} needs the package gguf, which is not installed; pip install 'wan-fast[gguf]'")
        header = read_header(file)
        texts |= header.texts
        stored += [
            TensorInfo(name, name, shape, dtype, file)
            for name, (dtype, shape) in header.tensors.items()
            if name not in header.unscaled
        ]
    contents = dialects.split(stored, texts, config, names)
    stored_8bit = contents.stored_8bit if computes else {}
    return Part(path, config, contents.tensors, contents.dialect, contents.scales, stored_8bit)
