"""Checkpoints on disk: found, described and checked from their file headers.

Two layouts, told apart by content. Native: config.json and diffusion_pytorch_model*.safetensors at the top (A14B: in
high_noise_model/ and low_noise_model/), Wan2.x_VAE.pth, models_t5_*.pth, google/umt5-xxl/. Diffusers: model_index.json
and a folder per part. Where a model is not under its usual name, the one file that holds such a model is taken. A model may
also be a file anywhere: `open_part`. Nothing here needs torch or a GPU, or reads a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_fast import manifest
from wan_fast.config import Request, WanFastError
from wan_fast.dialects import TOKENIZER
from wan_fast.headers import TensorInfo
from wan_fast.manifest import AudioDims, audio_shapes
from wan_fast.parts import (
    UMT5,
    WAV2VEC2,
    audio_encoder_in,
    files_of,
    find_model,
    image_encoder_in,
    looks,
    model_in,
    open_dit,
    open_part,
    part_in,
    part_of,
    read_json,
    read_tokenizer,
    text_encoder_in,
    tokenizer_of,
)
from wan_fast.tasks import TASKS, VAES, TaskSpec
from wan_fast.weights import Packed, Part, read_tensors

__all__ = [
    "RELIGHTING",
    "Checkpoint",
    "Packed",
    "Part",
    "TensorInfo",
    "check",
    "check_tensors",
    "describe",
    "describe_file",
    "kind_of",
    "locate",
    "open_checkpoint",
    "open_dit",
    "open_part",
    "read_tensors",
    "read_tokenizer",
    "tasks_of",
    "tokenizer_of",
]

# of a DiT's experts; in the Diffusers layout these have names of their own
_EXPERTS = ("model", "high_noise", "low_noise")
# a LoRA that comes with Animate
RELIGHTING = "relighting_lora.ckpt"
_DIFFUSERS = {"model": "transformer", "high_noise": "transformer", "low_noise": "transformer_2"}


@dataclass(frozen=True)
class Checkpoint:
    """Everything known of a checkpoint without reading a weight.

    `experts` maps "model", or "high_noise" and "low_noise", to a DiT; `tokenizer` is the folder of a tokenizer.json, or the
    text encoder's file where that holds one; `defaults` are the sampling settings the checkpoint brings along in
    generation_config.json, `note` its one line about itself.
    """

    path: Path
    layout: str
    experts: Mapping[str, Part]
    vae: Part | None
    text_encoder: Part | None
    tokenizer: Path | None
    image_encoder: Part | None = None
    audio_encoder: Part | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        parts = (*self.experts.values(), self.vae, self.text_encoder, self.image_encoder, self.audio_encoder)
        return sum(part.num_bytes for part in parts if part is not None)


def locate(name: str | None, spec: TaskSpec, *, download: bool = True) -> Path | None:
    """The folder of a checkpoint given as a folder, a hub id, 'tiny', or None for the task's official hub id.

    A hub id is looked up in the local hub cache first, then downloaded with a progress bar; without `download` the
    answer is None where it would have to be.

    Raises:
        WanFastError: there is no such folder, or it cannot be downloaded.
    """
    if name == "tiny":
        return Path(str(files("wan_fast") / "assets" / "tiny"))
    name = None if name is None else str(name)
    # a hub id looks like a relative path of two parts; where the first part is a folder here, it is one
    hub_id = name is None or (re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name.split("/")[0]).exists())
    if name is not None and not hub_id:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            give = "give a file as --dit, --vae, --text_encoder or --image_encoder" if folder.exists() else "give a folder"
            raise WanFastError(f"checkpoint folder {name!r} {what}; {give}, a hub id such as {spec.hub_id}, or tiny")
        return folder
    encoders = {"image_encoder": spec.image_tokens > 0, "audio_encoder": spec.audio_encoder}
    return _from_hub(name or spec.hub_id, download, [encoder for encoder, needed in encoders.items() if needed])


def _from_hub(repo: str, download: bool, encoders: Collection[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    # what the preprocessing of Animate needs is no part of the model
    patterns: dict[str, Any] = {
        "allow_patterns": ["*.json", "*.safetensors", "*.pth", "google/*", "*spiece.model", RELIGHTING],
        "ignore_patterns": ["process_checkpoint/*"],
    }
    try:
        cached = Path(snapshot_download(repo, **patterns, local_files_only=True))
        opened = open_checkpoint(cached)
        if all(getattr(opened, part) for part in ("vae", "text_encoder", "tokenizer", *encoders)):
            return cached
    except (OSError, ValueError):
        pass  # not in the cache, or a download that stopped half-way
    if not download:
        return None
    try:
        return Path(snapshot_download(repo, **patterns))
    except Exception as error:  # whatever the transport raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise WanFastError(
            f"checkpoint {repo} is neither a folder nor in the hub cache, and cannot be downloaded ({reason}); "
            "give --ckpt_dir a folder, or try again online"
        ) from error


def open_checkpoint(path: Path, less: Collection[str] = ()) -> Checkpoint:
    """Describe the checkpoint in a folder from its headers.

    Args:
        path: the folder.
        less: what not to look for: experts, "vae", "text_encoder", "image_encoder", "audio_encoder".

    Raises:
        WanFastError: the folder is not a Wan checkpoint, or a file of it is missing, truncated or unsafe.
    """
    if (path / "model_index.json").is_file():
        return _open_diffusers(path, less)
    known = [path / name for name in ("config.json", "high_noise_model", "low_noise_model")]
    if set(_EXPERTS) <= set(less):
        opened = _open_native(path, less)
        if opened.vae or opened.text_encoder or opened.image_encoder or opened.audio_encoder or opened.tokenizer:
            return opened
    elif any(file.exists() for file in known) or find_model(path, "DiT"):
        return _open_native(path, less)
    seen = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise WanFastError(
        f"{str(path)!r} holds no Wan checkpoint: neither model_index.json nor config.json (it holds: {seen}); "
        "give the folder these files lie in"
    )


def check(checkpoint: Checkpoint, spec: TaskSpec, *, whole: bool = True) -> None:
    """Hold a checkpoint against the task it is to serve: kind, parts, and every tensor's name and shape.

    Args:
        checkpoint: what is there, from file headers.
        spec: the task.
        whole: no part may be missing.

    Raises:
        WanFastError: they disagree, or tensors are missing, surplus or of a wrong shape.
    """
    if whole or len(checkpoint.experts) == len(spec.experts):
        _check_kind(checkpoint, spec)
    for name, part in checkpoint.experts.items():
        with _described(part):
            dims = _dims(part)
        check_tensors(part, manifest.dit_shapes(dims), "DiT" if name == "model" else f"{name} DiT")
    if whole:
        _check_whole(checkpoint, spec)
    if checkpoint.vae is not None:
        _check_vae(checkpoint.vae, spec)
    if checkpoint.text_encoder is not None:
        _check_text_encoder(checkpoint.text_encoder, checkpoint)
    if checkpoint.image_encoder is not None and spec.image_tokens:
        _check_image_encoder(checkpoint.image_encoder, checkpoint, spec)
    if checkpoint.audio_encoder is not None and spec.audio_encoder:
        _check_audio_encoder(checkpoint.audio_encoder, checkpoint)
    if checkpoint.tokenizer is not None and checkpoint.tokenizer.is_file() and find_spec("sentencepiece") is None:
        raise WanFastError(
            f"the tokenizer in {str(checkpoint.tokenizer)!r} needs the package sentencepiece, which is not installed; "
            "pip install 'wan-fast[sentencepiece]'"
        )


def _check_kind(checkpoint: Checkpoint, spec: TaskSpec) -> None:
    fits = tasks_of(checkpoint)
    if spec.name in fits:
        return
    what = f"fits {' '.join(fits)}" if fits else "fits no task of this version"
    where, first = checkpoint.path, next(iter(checkpoint.experts.values())).path
    raise WanFastError(
        f"task {spec.name} does not fit the checkpoint {str(where if first.is_relative_to(where) else first)!r}, which {what} "
        f"({kind_of(checkpoint)}); change --task, --ckpt_dir or --dit"
    )


def _check_whole(checkpoint: Checkpoint, spec: TaskSpec) -> None:
    native, where = checkpoint.layout == "native", str(checkpoint.path)
    # part -> what it is called in the folder
    want = {
        "vae": spec.vae_spec.file if native else "vae/",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth" if native else "text_encoder/",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth" if native else "image_encoder/",
    }
    if not spec.image_tokens:
        del want["image_encoder"]
    for name, called in want.items():
        if getattr(checkpoint, name) is None:
            raise WanFastError(f"checkpoint {where!r} has no {called}; download the whole repository, or give --{name} FILE")
    if spec.audio_encoder and checkpoint.audio_encoder is None:
        called = WAV2VEC2 if native else "audio_encoder"
        raise WanFastError(f"checkpoint {where!r} has no {called}/; download the whole repository")
    text = checkpoint.text_encoder
    if checkpoint.tokenizer is None and text is not None and not text.path.is_relative_to(checkpoint.path):
        raise WanFastError(
            f"text encoder {str(text.path)!r} comes without a tokenizer; give --ckpt_dir a folder with {UMT5}/tokenizer.json, "
            f"or take a .safetensors file that holds the tensor {TOKENIZER}"
        )
    if checkpoint.tokenizer is None:
        called = f"{UMT5 if native else 'tokenizer'}/tokenizer.json"
        raise WanFastError(f"checkpoint {where!r} has no {called}; download the whole repository")


def _check_vae(part: Part, spec: TaskSpec) -> None:
    with _described(part):
        dims = manifest.VaeDims.of_shapes(part.shapes)
    if dims.version != spec.vae or dims.channels != spec.vae_spec.channels:
        raise WanFastError(
            f"task {spec.name} needs the Wan {spec.vae} VAE, {str(part.path)!r} is a {dims.version} one with "
            f"{dims.channels} channels; take the file that came with the model"
        )
    check_tensors(part, manifest.vae_shapes(dims), "VAE")


def _check_text_encoder(part: Part, checkpoint: Checkpoint) -> None:
    with _described(part):
        shapes = manifest.text_shapes_like(part.shapes, part.config)
    check_tensors(part, shapes, "text encoder")
    width = shapes["token_embedding.weight"][1]
    for expert in checkpoint.experts.values():
        if _dims(expert).text_dim != width:
            raise WanFastError(
                f"text encoder {str(part.path)!r} is {width} wide, the DiT takes {_dims(expert).text_dim}; "
                "take the parts of one model"
            )


def _check_image_encoder(part: Part, checkpoint: Checkpoint, spec: TaskSpec) -> None:
    with _described(part):
        clip = manifest.ClipDims.of_shapes(part.shapes)
    check_tensors(part, manifest.clip_shapes(clip, joint=_joint(part)), "image encoder")
    for expert in checkpoint.experts.values():
        dims = _dims(expert)
        if dims.image_dim != clip.dim:
            raise WanFastError(
                f"image encoder {str(part.path)!r} is {clip.dim} wide, the DiT takes {dims.image_dim}; "
                "take the parts of one model"
            )
        pictures = 2 if spec.kind == "first_last" else 1
        if dims.image_positions not in (0, pictures * clip.tokens):
            raise WanFastError(
                f"image encoder {str(part.path)!r} makes {clip.tokens} tokens of a picture, the DiT has {dims.image_positions} "
                f"positions for {pictures}; take the parts of one model"
            )


def _check_audio_encoder(part: Part, checkpoint: Checkpoint) -> None:
    with _described(part):
        audio = AudioDims.of_config(part.config)
    check_tensors(part, audio_shapes(audio), "audio encoder")
    for expert in checkpoint.experts.values():
        speech = _dims(expert).speech
        if speech and (speech.audio_layers, speech.audio_dim) != (audio.num_layers + 1, audio.dim):
            raise WanFastError(
                f"audio encoder {str(part.path)!r} makes {audio.num_layers + 1} states, {audio.dim} wide, the DiT takes "
                f"{speech.audio_layers} of {speech.audio_dim}; take the parts of one model"
            )


def _joint(part: Part) -> bool:
    """Whether q, k and v of an image encoder are one tensor."""
    return any(".to_qkv." in name for name in part.tensors)


def check_tensors(part: Part, expected: manifest.Shapes, what: str) -> None:
    """Raise unless `part` has exactly the tensors in `expected`, with their shapes."""
    missing = [name for name in expected if name not in part.tensors]
    surplus = [name for name in part.tensors if name not in expected]
    wrong = [name for name in expected if name in part.tensors and part.shapes[name] != tuple(expected[name])]
    problems = [
        f"{len(names)} {title}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for title, names in (("missing", missing), ("surplus", surplus))
        if names
    ]
    if wrong:
        name = wrong[0]
        problems.append(
            f"{len(wrong)} of a wrong shape: {name} is {list(part.shapes[name])}, expected {list(expected[name])}"
            + (", ..." if len(wrong) > 1 else "")
        )
    if problems:
        raise WanFastError(
            f"{what} {str(part.path)!r} does not have the tensors of its architecture: {'; '.join(problems)}; "
            "download the file again, or give the checkpoint it belongs to"
        )


def tasks_of(checkpoint: Checkpoint) -> list[str]:
    """Names of the tasks a checkpoint's kind fits: channels, branches and number of experts, whatever its width."""
    kind = kind_of(checkpoint)
    return [name for name, spec in TASKS.items() if _kind(spec) == kind]


def kind_of(checkpoint: Checkpoint) -> str:
    """The kind of model in a word or two, from its tensors.

    Raises:
        WanFastError: two experts are of different kinds.
    """
    kinds = {f"{_branch(part)} DiT {_channels(part)}" for part in checkpoint.experts.values()}
    if len(kinds) > 1:
        raise WanFastError(
            f"the experts of {str(checkpoint.path)!r} are of different kinds ({', '.join(sorted(kinds))}); download them again"
        )
    return f"{kinds.pop()}, {len(checkpoint.experts)} expert(s)"


def _channels(part: Part) -> str:
    with _described(part):
        dims = _dims(part)
    return f"{dims.in_dim}->{dims.out_dim}"


def _branch(part: Part) -> str:
    extras = (
        ("vace", "vace_patch_embedding.weight"),
        ("speech", "casual_audio_encoder.weights"),
        ("animate", "pose_patch_embedding.weight"),
        ("pose", "dwpose_embedding.0.weight"),
        ("first-last-frame", "img_emb.emb_pos"),
        ("image", "img_emb.proj.1.weight"),
    )
    return next((word for word, name in extras if name in part.tensors), "plain")


def _kind(spec: TaskSpec) -> str:
    words = {"first_last": "first-last-frame", "vace": "vace", "speech": "speech", "animate": "animate", "poses": "pose"}
    branch = words.get(spec.kind, "image" if spec.image_tokens else "plain")
    return f"{branch} DiT {spec.in_dim}->{spec.out_dim}, {len(spec.experts)} expert(s)"


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `wan-fast inspect` tells: layout, fitting tasks, and per part sizes, dtypes, and tensors missing or surplus."""
    parts: dict[str, Any] = {}
    named = {("DiT" if n == "model" else f"DiT {n}"): p for n, p in checkpoint.experts.items()}
    others = {"VAE": checkpoint.vae, "text encoder": checkpoint.text_encoder}
    if checkpoint.image_encoder or any(_dims(part).image_dim for part in checkpoint.experts.values()):
        others["image encoder"] = checkpoint.image_encoder
    if checkpoint.audio_encoder or any(_branch(part) == "speech" for part in checkpoint.experts.values()):
        others["audio encoder"] = checkpoint.audio_encoder
    for name, part in {**named, **others}.items():
        parts[name] = {"missing": "the whole part"} if part is None else _describe_part(name, part)
    return {
        "checkpoint": str(checkpoint.path),
        "layout": checkpoint.layout,
        "kind": kind_of(checkpoint),
        "fits": tasks_of(checkpoint) or ["no task of this version"],
        "tokenizer": str(checkpoint.tokenizer) if checkpoint.tokenizer else "missing",
        "note": checkpoint.note or "none",
        "parts": parts,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """What `wan-fast inspect` tells of a single file.

    Raises:
        WanFastError: it holds no model that this version knows.
    """
    what = model_in([path])
    if what in (None, "LoRA", "UniAnimate file"):
        raise WanFastError(f"{str(path)!r} {looks([path], what)}")
    part = open_part(path, what)
    if what == "VAE":
        with _described(part):
            version = manifest.VaeDims.of_shapes(part.shapes).version
        fits = [name for name, spec in TASKS.items() if spec.vae == version]
    elif what == "DiT":
        kind = f"{_branch(part)} DiT {_channels(part)}"
        fits = [name for name, spec in TASKS.items() if _kind(spec).partition(",")[0] == kind]
    elif what == "audio encoder":
        fits = [name for name, spec in TASKS.items() if spec.audio_encoder]
    else:
        fits = [name for name, spec in TASKS.items() if spec.image_tokens or what == "text encoder"]
    told: dict[str, Any] = {"file": str(path), "kind": what, "fits": fits or ["no task of this version"]}
    if what == "text encoder":
        told["tokenizer"] = str(tokenizer_of(part) or "missing")
    return {**told, "parts": {what: _describe_part(what, part)}}


def _describe_part(name: str, part: Part) -> dict[str, Any]:
    about: dict[str, Any] = {
        "file": str(part.path),
        "parameters": f"{manifest.num_parameters(part.shapes):,}",
        "dtype": part.dtypes,
        "quantisation": part.quantisation,
        "tensors": len(part.tensors),
    }
    with _described(part):
        if name == "VAE":
            dims: Any = manifest.VaeDims.of_shapes(part.shapes)
            expected = manifest.vae_shapes(dims)
        elif name == "text encoder":
            expected = manifest.text_shapes_like(part.shapes, part.config)
            dims = {"dim": expected["token_embedding.weight"][1], "vocab": expected["token_embedding.weight"][0]}
        elif name == "image encoder":
            dims = manifest.ClipDims.of_shapes(part.shapes)
            expected = manifest.clip_shapes(dims, joint=_joint(part))
        elif name == "audio encoder":
            dims = AudioDims.of_config(part.config)
            expected = audio_shapes(dims)
        else:
            dims = _dims(part)
            expected = manifest.dit_shapes(dims)
    sizes = dims if isinstance(dims, dict) else asdict(dims)
    about["sizes"] = ", ".join(f"{key} {value}" for key, value in sizes.items())
    about["missing"] = [n for n in expected if n not in part.tensors] or "none"
    about["surplus"] = [n for n in part.tensors if n not in expected] or "none"
    about["wrong shape"] = [n for n in expected if part.shapes.get(n, expected[n]) != expected[n]] or "none"
    return about


def _dims(part: Part) -> manifest.DiTDims:
    return manifest.DiTDims.of_shapes(part.shapes, part.config)


@contextmanager
def _described(part: Part) -> Iterator[None]:
    """Say which file it is where a part lacks even the tensors its sizes are read from."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        problem = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
        raise WanFastError(f"{str(part.path)!r} is no part of a Wan checkpoint: {problem}; download it again") from error


# --- layouts --------------------------------------------------------------------------------------------------------


def _open_native(path: Path, less: Collection[str]) -> Checkpoint:
    folders = {name: path / f"{name}_model" for name in ("high_noise", "low_noise")}
    if (path / "config.json").is_file() or not any(folder.is_dir() for folder in folders.values()):
        folders = {"model": path}
    folders = {name: folder for name, folder in folders.items() if name not in less}
    for folder in folders.values():
        if not folder.is_dir():
            raise WanFastError(f"checkpoint {str(path)!r} has one expert but no {folder.name}/; download the whole repository")
    experts = {name: open_dit(folder) for name, folder in folders.items()}
    vae = text = image = None
    if "vae" not in less:
        usual = (path / spec.file for spec in VAES.values())
        vae = next((file for file in usual if file.is_file()), None) or find_model(path, "VAE")
    if "text_encoder" not in less:
        text = next(iter(sorted(path.glob("models_t5_*.pth"))), None) or find_model(path, "text encoder")
    if "image_encoder" not in less:
        image = next(iter(sorted(path.glob("models_clip_*.pth"))), None) or find_model(path, "image encoder")
    encoder = part_of([text], text, {}) if text else None if "text_encoder" in less else text_encoder_in(path / "text_encoder")
    tokenizer = path / UMT5 if (path / UMT5 / "tokenizer.json").is_file() else None
    return Checkpoint(
        path=path,
        layout="native",
        experts=experts,
        vae=part_of([vae], vae, {}) if vae else None,
        text_encoder=encoder,
        image_encoder=image_encoder_in([image], image) if image else None,
        audio_encoder=None if "audio_encoder" in less else audio_encoder_in(path),
        tokenizer=tokenizer or (tokenizer_of(encoder) if encoder else None),
        **_generation_config(path),
    )


def _open_diffusers(path: Path, less: Collection[str]) -> Checkpoint:
    index = read_json(path / "model_index.json")
    second = index.get("transformer_2")
    two = isinstance(second, list) and second[:1] not in ([], [None])
    experts = [name for name in (_EXPERTS[1:] if two else _EXPERTS[:1]) if name not in less]
    folders = {name: _DIFFUSERS[name] for name in experts}
    for folder in folders.values():
        if not (path / folder).is_dir():
            raise WanFastError(f"checkpoint {str(path)!r} has no {folder}/, which its model_index.json names; download it")
    vae, tokenizer, image = path / "vae", path / "tokenizer", path / "image_encoder"
    has_vae, has_image = vae.is_dir() and "vae" not in less, image.is_dir() and "image_encoder" not in less
    encoder = None if "text_encoder" in less else text_encoder_in(path / "text_encoder")
    return Checkpoint(
        path=path,
        layout="diffusers",
        experts={name: open_dit(path / folder) for name, folder in folders.items()},
        vae=part_in(vae, "diffusion_pytorch_model", "VAE") if has_vae else None,
        text_encoder=encoder,
        image_encoder=image_encoder_in(files_of(image, "model", "image encoder"), image) if has_image else None,
        audio_encoder=None if "audio_encoder" in less else audio_encoder_in(path),
        tokenizer=tokenizer if (tokenizer / "tokenizer.json").is_file() else tokenizer_of(encoder) if encoder else None,
        **_generation_config(path),
    )


def _generation_config(path: Path) -> dict[str, Any]:
    if not (path / "generation_config.json").is_file():
        return {}
    config = read_json(path / "generation_config.json")
    note = config.pop("note", "")
    # files of this name exist for other purposes: only what a request has is taken
    known = {f.name for f in fields(Request)}
    return {"defaults": {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}, "note": note}
