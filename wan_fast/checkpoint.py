"""Checkpoints on disk: found, described and checked from their file headers.

Two layouts, told apart by content. Native: config.json and diffusion_pytorch_model*.safetensors at the top (A14B: in
high_noise_model/ and low_noise_model/), Wan2.x_VAE.pth, models_t5_*.pth, google/umt5-xxl/. Diffusers: model_index.json
and a folder per part. Where a DiT or a text encoder is not under its usual name, the one file that holds such a model is
taken. `open_checkpoint` needs neither torch nor a GPU and reads no weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_fast import dialects, manifest
from wan_fast.config import Request, WanFastError
from wan_fast.headers import TensorInfo, read_header
from wan_fast.names import VAE21_NAMES, VAE22_NAMES, Rules, native_name, rules_for
from wan_fast.tasks import TASKS, VAES, TaskSpec
from wan_fast.weights import Packed, Part, read_tensors

__all__ = [
    "Checkpoint",
    "Packed",
    "Part",
    "TensorInfo",
    "check",
    "check_tensors",
    "describe",
    "kind_of",
    "locate",
    "open_checkpoint",
    "open_dit",
    "read_tensors",
    "tasks_of",
]


@dataclass(frozen=True)
class Checkpoint:
    """Everything known of a checkpoint without reading a weight.

    `experts` maps "model", or "high_noise" and "low_noise", to a DiT; `defaults` are the sampling settings the
    checkpoint brings along in generation_config.json, `note` its one line about itself.
    """

    path: Path
    layout: str
    experts: Mapping[str, Part]
    vae: Part | None
    text_encoder: Part | None
    tokenizer: Path | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        parts = (*self.experts.values(), self.vae, self.text_encoder)
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
            raise WanFastError(f"checkpoint folder {name!r} {what}; give a folder, a hub id such as {spec.hub_id}, or tiny")
        return folder
    return _from_hub(name or spec.hub_id, download)


def _from_hub(repo: str, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.pth", "google/*", "*spiece.model"]
    try:
        cached = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        opened = open_checkpoint(cached)
        if opened.vae and opened.text_encoder and opened.tokenizer:
            return cached
    except (OSError, ValueError):
        pass  # not in the cache, or a download that stopped half-way
    if not download:
        return None
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # whatever the transport raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise WanFastError(
            f"checkpoint {repo} is neither a folder nor in the hub cache, and cannot be downloaded ({reason}); "
            "give --ckpt_dir a folder, or try again online"
        ) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Describe the checkpoint in a folder from its headers.

    Raises:
        WanFastError: the folder is not a Wan checkpoint, or a file of it is missing, truncated or unsafe.
    """
    if (path / "model_index.json").is_file():
        return _open_diffusers(path)
    known = [path / name for name in ("config.json", "high_noise_model", "low_noise_model")]
    if any(file.exists() for file in known) or _find(path, "DiT"):
        return _open_native(path)
    seen = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise WanFastError(
        f"{str(path)!r} holds no Wan checkpoint: neither model_index.json nor config.json (it holds: {seen}); "
        "give the folder these files lie in"
    )


def check(checkpoint: Checkpoint, spec: TaskSpec) -> None:
    """Hold a checkpoint against the task it is to serve: kind, parts, and every tensor's name and shape.

    Raises:
        WanFastError: they disagree, or tensors are missing, surplus or of a wrong shape.
    """
    fits = tasks_of(checkpoint)
    if spec.name not in fits:
        what = f"fits {' '.join(fits)}" if fits else "fits no task of this version"
        raise WanFastError(
            f"task {spec.name} does not fit the checkpoint {str(checkpoint.path)!r}, which {what} ({kind_of(checkpoint)}); "
            "change --task or --ckpt_dir"
        )
    for name, part in checkpoint.experts.items():
        check_tensors(part, manifest.dit_shapes(_dims(part)), "DiT" if name == "model" else f"{name} DiT")
    if checkpoint.vae is None or checkpoint.text_encoder is None or checkpoint.tokenizer is None:
        missing = [n for n in ("vae", "text_encoder", "tokenizer") if getattr(checkpoint, n) is None]
        want = {
            "vae": spec.vae_spec.file if checkpoint.layout == "native" else "vae/",
            "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth" if checkpoint.layout == "native" else "text_encoder/",
            "tokenizer": "google/umt5-xxl/tokenizer.json" if checkpoint.layout == "native" else "tokenizer/tokenizer.json",
        }
        raise WanFastError(f"checkpoint {str(checkpoint.path)!r} has no {want[missing[0]]}; download the whole repository")
    with _described(checkpoint.vae):
        vae_dims = manifest.VaeDims.of_shapes(checkpoint.vae.shapes)
    if vae_dims.version != spec.vae or vae_dims.channels != spec.vae_spec.channels:
        raise WanFastError(
            f"task {spec.name} needs the Wan {spec.vae} VAE, {str(checkpoint.vae.path)!r} is a {vae_dims.version} one with "
            f"{vae_dims.channels} channels; take the file that came with the model"
        )
    check_tensors(checkpoint.vae, manifest.vae_shapes(vae_dims), "VAE")
    with _described(checkpoint.text_encoder):
        text = manifest.text_shapes_like(checkpoint.text_encoder.shapes, checkpoint.text_encoder.config)
    check_tensors(checkpoint.text_encoder, text, "text encoder")
    width = text["token_embedding.weight"][1]
    for part in checkpoint.experts.values():
        if _dims(part).text_dim != width:
            raise WanFastError(
                f"text encoder {str(checkpoint.text_encoder.path)!r} is {width} wide, the DiT takes {_dims(part).text_dim}; "
                "take the parts of one model"
            )


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
        ("first-last-frame", "img_emb.emb_pos"),
        ("image", "img_emb.proj.1.weight"),
    )
    return next((word for word, name in extras if name in part.tensors), "plain")


def _kind(spec: TaskSpec) -> str:
    words = {"first_last": "first-last-frame", "vace": "vace", "speech": "speech", "animate": "animate"}
    branch = words.get(spec.kind, "image" if spec.image_tokens else "plain")
    return f"{branch} DiT {spec.in_dim}->{spec.out_dim}, {len(spec.experts)} expert(s)"


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `wan-fast inspect` tells: layout, fitting tasks, and per part sizes, dtypes, and tensors missing or surplus."""
    parts: dict[str, Any] = {}
    named = {("DiT" if n == "model" else f"DiT {n}"): p for n, p in checkpoint.experts.items()}
    for name, part in {**named, "VAE": checkpoint.vae, "text encoder": checkpoint.text_encoder}.items():
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
        else:
            dims = _dims(part)
            expected = manifest.dit_shapes(dims)
            if _branch(part) != "plain":
                about["checked"] = f"no: this version has no table of the {_branch(part)} model's tensors"
                expected = dict(part.shapes)
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


def _open_native(path: Path) -> Checkpoint:
    folders = {name: path / f"{name}_model" for name in ("high_noise", "low_noise")}
    if (path / "config.json").is_file() or not any(folder.is_dir() for folder in folders.values()):
        folders = {"model": path}
    for folder in folders.values():
        if not folder.is_dir():
            raise WanFastError(f"checkpoint {str(path)!r} has one expert but no {folder.name}/; download the whole repository")
    experts = {name: open_dit(folder) for name, folder in folders.items()}
    vae = next((path / spec.file for spec in VAES.values() if (path / spec.file).is_file()), None)
    text = next(iter(sorted(path.glob("models_t5_*.pth"))), None) or _find(path, "text encoder")
    tokenizer = path / "google" / "umt5-xxl"
    return Checkpoint(
        path=path,
        layout="native",
        experts=experts,
        vae=_part([vae], vae, {}, {}) if vae else None,
        text_encoder=_part([text], text, {}) if text else _text_encoder(path / "text_encoder"),
        tokenizer=tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
        **_generation_config(path),
    )


def _open_diffusers(path: Path) -> Checkpoint:
    index = _json(path / "model_index.json")
    second = index.get("transformer_2")
    two = isinstance(second, list) and second[:1] not in ([], [None])
    folders = {"high_noise": "transformer", "low_noise": "transformer_2"} if two else {"model": "transformer"}
    for folder in folders.values():
        if not (path / folder).is_dir():
            raise WanFastError(f"checkpoint {str(path)!r} has no {folder}/, which its model_index.json names; download it")
    vae, tokenizer = path / "vae", path / "tokenizer"
    vae_part = None
    if vae.is_dir():
        config = _json(vae / "config.json")
        names = VAE22_NAMES if config.get("is_residual", False) else VAE21_NAMES
        vae_part = _part(_files_of(vae, "diffusion_pytorch_model"), vae, config, names)
    return Checkpoint(
        path=path,
        layout="diffusers",
        experts={name: open_dit(path / folder) for name, folder in folders.items()},
        vae=vae_part,
        text_encoder=_text_encoder(path / "text_encoder"),
        tokenizer=tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
        **_generation_config(path),
    )


def open_dit(folder: Path) -> Part:
    """One transformer in a folder of its own, in either layout and any dialect."""
    return _transformer(folder, "diffusion_pytorch_model", "DiT")


def _text_encoder(folder: Path) -> Part | None:
    return _transformer(folder, "model", "text encoder") if folder.is_dir() else None


def _transformer(folder: Path, stem: str, what: str) -> Part:
    found, config = _files_of(folder, stem, what), folder / "config.json"
    # a file of another name may come without a config: the sizes are then those of its tensors
    required = found[0].name.startswith(stem)
    return _part(found, folder, _json(config) if required or config.is_file() else {}, computes=what == "DiT")


def _generation_config(path: Path) -> dict[str, Any]:
    if not (path / "generation_config.json").is_file():
        return {}
    config = _json(path / "generation_config.json")
    note = config.pop("note", "")
    # files of this name exist for other purposes: only what a request has is taken
    known = {f.name for f in fields(Request)}
    return {"defaults": {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}, "note": note}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WanFastError(f"{str(path)!r} does not exist; download the whole repository") from None
    except (OSError, ValueError) as error:
        raise WanFastError(f"{str(path)!r} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise WanFastError(f"{str(path)!r} holds no JSON object; download it again")
    return content


def _files_of(folder: Path, stem: str, what: str | None = None) -> list[Path]:
    """`stem`.safetensors, or the shards its index lists, or the one other file with such a model: "DiT", "text encoder"."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WanFastError(f"{str(index)!r} has no weight_map from tensors to files; download it again")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise WanFastError(f"shard {shard.name} of {len(shards)} is missing from {str(folder)!r}; download it")
        return shards
    if what and (other := _find(folder, what)):
        return [other]
    instead = f", nor another file with a {what}" if what else ""
    raise WanFastError(f"{str(folder)!r} holds neither {single.name} nor {index.name}{instead}; download the whole repository")


# a tensor that only such a model has
_SIGNS = {"DiT": "blocks.0.self_attn.q.", "text encoder": "blocks.0.attn.q."}


def _find(folder: Path, what: str) -> Path | None:
    """The one file in a folder that holds such a model, whatever it is called.

    Raises:
        WanFastError: there are several, or none and one that cannot be read.
    """
    found, unreadable = [], None
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in (".safetensors", ".gguf", ".pth") and file.is_file():
            try:
                stored = read_header(file).tensors
            except WanFastError as error:
                unreadable = unreadable or error
                continue
            prefix = dialects.prefix_of(stored)
            names = [name.removeprefix(prefix) for name in stored]
            rules = rules_for(names)
            if any((native_name(name, rules) or "").startswith(_SIGNS[what]) for name in names):
                found.append(file)
    if len(found) > 1:
        raise WanFastError(
            f"{str(folder)!r} holds several files with a {what}: {', '.join(file.name for file in found)}; keep one"
            + (", or the two of an A14B model in high_noise_model/ and low_noise_model/" if what == "DiT" else "")
        )
    if not found and unreadable is not None and what == "DiT":
        raise unreadable
    return found[0] if found else None


def _part(
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
