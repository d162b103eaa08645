"""The checkpoint of a configuration: a folder, models given by themselves, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from wan_fast.checkpoint import Checkpoint, Part, check, locate, open_checkpoint, open_part, tokenizer_of
from wan_fast.config import EngineConfig, WanFastError

_ENCODERS = {"vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder"}


def needs_folder(config: EngineConfig) -> bool:
    """Whether a folder or a hub id comes in: one is given, or not every part of the task is given by itself."""
    spec = config.spec
    parts = {*spec.experts, "vae", "text_encoder", *(["image_encoder"] if spec.image_tokens else [])}
    return config.checkpoint is not None or not parts <= set(config.parts)


def located(config: EngineConfig) -> EngineConfig:
    """The configuration with its checkpoint as a folder, downloaded where it has to be; as it is where none is needed.

    Raises:
        WanFastError: there is no such folder, or it cannot be downloaded.
    """
    return replace(config, checkpoint=str(locate(config.checkpoint, config.spec))) if needs_folder(config) else config


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
