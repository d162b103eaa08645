"""The checkpoint of a configuration: a folder, models given by themselves, or both; and a file that adds tensors to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wan_fast.checkpoint import Checkpoint, Part, check, locate, open_checkpoint, open_part, tokenizer_of
from wan_fast.config import EngineConfig, WanFastError
from wan_fast.headers import TensorInfo, read_header
from wan_fast.manifest.pose import POSE_TENSORS
from wan_fast.parsing import flag_of

_ENCODERS = {"vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder"}


def needs_folder(config: EngineConfig) -> bool:
    """Whether a folder or a hub id comes in: one is given, or not every part of the task is given by itself."""
    spec = config.spec
    parts = {*spec.experts, "vae", "text_encoder", *(["image_encoder"] if spec.image_tokens else [])}
    # no flag gives the audio encoder by itself
    return config.checkpoint is not None or not parts <= set(config.parts) or spec.audio_encoder


def located(config: EngineConfig) -> EngineConfig:
    """The configuration with its checkpoint as a folder, downloaded where it has to be; as it is where none is needed.

    Raises:
        WanFastError: there is no such folder, or it cannot be downloaded, or what the task needs beside it is not given.
    """
    if to_be_given(config) and not _at_hand(config):
        raise WanFastError(to_be_given(config))
    return replace(config, checkpoint=str(locate(config.checkpoint, config.spec))) if needs_folder(config) else config


def to_be_given(config: EngineConfig) -> str:
    """What to do about a file that the task needs beside the checkpoint of `hub_id`, and that is not given; empty for none."""
    if config.spec.own_file is None or getattr(config, config.spec.own_file[0]) is not None:
        return ""
    name, repository = config.spec.own_file
    flag = flag_of(EngineConfig, name, -1)
    return f"task {config.task} needs {flag}, got none; add {flag} FILE, which is in {repository} on the hub"


def _at_hand(config: EngineConfig) -> bool:
    return config.checkpoint is not None or bool(config.parts)


def open_configured(config: EngineConfig) -> Checkpoint | None:
    """The checkpoint of a configuration, checked against its task; None where its folder is still to be downloaded, what is
    given by itself being checked all the same.

    A model given by itself takes the place of the folder's, which need not have one. The tokenizer is the folder's where it has
    a tokenizer.json, so that an official folder needs no other package; else the one beside or in the text encoder's file. With
    another DiT the folder's sampling settings and its note go: they were of its own; `path` is then that DiT's.

    Raises:
        WanFastError: a file cannot be read, holds another model than it was given as, or does not fit the task or the others.
    """
    spec = config.spec
    if to_be_given(config) and not _at_hand(config):
        return None
    parts = {name: open_part(Path(path), _ENCODERS.get(name, "DiT")) for name, path in config.parts.items()}
    experts = {name: part for name, part in parts.items() if name in spec.experts}
    other_dit = len(experts) == len(spec.experts)
    path, layout = next((Path(path) for path in config.parts.values()), Path()), "files"
    opened = Checkpoint(path, layout, {}, vae=None, text_encoder=None, tokenizer=None)
    folder = locate(config.checkpoint, spec, download=False) if needs_folder(config) else None
    if folder is not None:
        # whatever experts the folder has
        less = {*parts, "model", "high_noise", "low_noise"} if other_dit else set(parts)
        opened = open_checkpoint(folder, less)
    opened = _with_parts(opened, parts, experts)
    has_poses = any(POSE_TENSORS.match(name) for part in opened.experts.values() for name in part.tensors)
    if config.unianimate is not None:
        if has_poses:
            raise WanFastError(
                f"--unianimate_ckpt {config.unianimate!r}: the DiT has encoders of poses already; leave the file out"
            )
        poses = _poses_in(Path(config.unianimate))
        both = {name: replace(part, tensors={**part.tensors, **poses}) for name, part in opened.experts.items()}
        opened = replace(opened, experts=both)
    elif to_be_given(config) and not has_poses:
        raise WanFastError(to_be_given(config))
    if folder is None and needs_folder(config):
        check(opened, spec, whole=False)
        return None
    if missing := [name for name in spec.experts if experts and name not in opened.experts]:
        raise WanFastError(f"checkpoint {str(folder)!r} has no {missing[0]} DiT; give --dit high=FILE,low=FILE")
    check(opened, spec)
    if other_dit:
        first = next(iter(experts.values()))
        opened = replace(opened, path=first.path, defaults={}, note="")
    return opened


def _with_parts(opened: Checkpoint, parts: Mapping[str, Part], experts: Mapping[str, Part]) -> Checkpoint:
    """The checkpoint with these parts in the place of its own."""
    text = parts.get("text_encoder", opened.text_encoder)
    return replace(
        opened,
        # high noise first, as the task has them
        experts=dict(sorted({**opened.experts, **experts}.items())),
        vae=parts.get("vae", opened.vae),
        text_encoder=text,
        image_encoder=parts.get("image_encoder", opened.image_encoder),
        tokenizer=opened.tokenizer or (tokenizer_of(text) if text else None),
    )


def _poses_in(file: Path) -> dict[str, TensorInfo]:
    """The encoders of poses in UniAnimate's file, by native name.

    Raises:
        WanFastError: it holds none, or cannot be read.
    """
    found: dict[str, TensorInfo] = {}
    for stored, (dtype, shape) in read_header(file).tensors.items():
        if match := POSE_TENSORS.search(stored):
            name = stored[match.start() :]
            found[name] = TensorInfo(name, stored, shape, dtype, file)
    if not found:
        raise WanFastError(
            f"--unianimate_ckpt {str(file)!r} holds no encoders of poses; take UniAnimate-Wan2.1-14B-Lora-12000.ckpt, and give "
            "a LoRA as --lora"
        )
    return found
