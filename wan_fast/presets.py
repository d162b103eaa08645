"""Which sampler preset a run takes: as asked for, or as a LoRA or the checkpoint is named after."""

from __future__ import annotations

from dataclasses import replace

from wan_fast import few_steps
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import Request, WanFastError
from wan_fast.resolving import of_preset
from wan_fast.setup import Setup


def named_preset(request: Request, setup: Setup) -> tuple[Request, str, list[str]]:
    """The request with the sampler preset that a LoRA or the checkpoint is named after, unless it says something else itself;
    in words what was taken, and warnings."""
    opened, spec = setup.checkpoint, setup.config.spec
    found, one_sided = _named_by_loras(setup)
    if opened and (said := opened.defaults.get("preset")):
        found["the checkpoint says"] = said
    elif opened and (name := few_steps.named(_name_of(opened))):
        found["the checkpoint is named"] = name
    if request.preset is not None:
        asked, _ = few_steps.parse_preset(request.preset)
        known = {few_steps.parse_preset(name)[0].replace("-ode", "") for name in found.values()}
        if asked == few_steps.OFF:
            return request, "", []
        unknown = f"--preset {asked} is for models distilled for it, and neither the checkpoint nor a LoRA is named as one"
        return request, f"{request.preset}, as asked for", [] if asked.replace("-ode", "") in known else [unknown]
    for why, name in found.items():
        try:
            of_preset(spec, request, name)
        except WanFastError as error:
            reason = str(error).partition(";")[0].removeprefix("--preset ")
            return request, "", [f"the preset {name} is not taken, though {why} so: {reason}"]
        if name != few_steps.OFF:
            return replace(request, preset=name), f"{name}, as {why}", []
        break
    return request, "", one_sided


def _named_by_loras(setup: Setup) -> tuple[dict[str, str], list[str]]:
    """Presets that LoRAs are named after, by why, if every expert has one; else what there is to say of that."""
    by_expert: dict[str, dict[str, str]] = {}
    for expert, files in setup.loras.items():
        for file in files:
            # a file of a general name is called as its folder is
            general = file.path.stem in ("high_noise_model", "low_noise_model", "adapter_model", "pytorch_lora_weights")
            name = few_steps.named(file.path.resolve().parent.name if general else file.path.name)
            if name and file.lora.strength:
                by_expert.setdefault(expert, {})[f"LoRA {file.path.name} is named"] = name
    if by_expert and len(by_expert) < len(setup.loras):
        (expert, named), *_ = by_expert.items()
        why, name = next(iter(named.items()))
        return {}, [f"the preset {name} is not taken, though {why} so: it is in {expert} alone; give the other expert's too"]
    return {why: name for named in by_expert.values() for why, name in named.items()}, []


def _name_of(opened: Checkpoint) -> str:
    """What a checkpoint is called: its folder, in the hub's cache its repository, and the files of its models."""
    parts = opened.path.parts
    repository = parts[-3] if parts[-2:-1] == ("snapshots",) else ""
    files = {info.file.name for part in opened.experts.values() for info in part.tensors.values()}
    return " ".join((repository, parts[-1], *sorted(files)))
