"""A checkpoint with its DiT's linears in 8 bits, written from one that has them in 16 or 32; `run` loads it back.

Weights are read, quantised and written one after the other; memory holds one and the shard that is being filled. What must be
known of the tokens beforehand, their scale or what smooths them (arXiv 2211.10438), NVIDIA ModelOpt measures on prompts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from io import StringIO
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import wan_fast
from wan_fast import manifest, schemes
from wan_fast.checkpoint import Checkpoint, Part, check, locate, open_checkpoint, read_tensors, tasks_of
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.memory import GIB
from wan_fast.parsing import flag_of, option
from wan_fast.planning import plan
from wan_fast.schemes import Form
from wan_fast.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4 * 10**9
FORMAT_VERSION = 1
DEFAULT_STEPS = 8
# how far outliers move from the tokens into the weights: the paper's choice
SMOOTHING = 0.5
_STEM = "diffusion_pytorch_model"
# smaller files are copied: whoever edits one means that one
_LINKED_BYTES = 2**20
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How linears are brought to 8 bits.

    Raises:
        WanFastError: a value is not allowed, or two do not go together.
    """

    scheme: Literal["fp8", "int8"] = option(..., "8-bit format: fp8 is e4m3", "--scheme")
    scaling: Literal["row", "tensor", "block"] = option(
        "row",
        "scales; row: one per token and output channel; tensor: a calibrated one for all tokens; block: one per 128 values",
        "--scaling",
    )
    keep_blocks: int | None = option(
        None, "blocks at either end that stay as they are; default: 3 of 40, in proportion", "--keep_blocks", unit="N"
    )
    calibrate: str | None = option(
        None, "prompts to measure tokens on, one per line; for --scaling tensor and --smooth", "--calibrate", unit="FILE"
    )
    smooth: bool = option(False, "move outliers of the tokens into the weights; needs --calibrate", "--smooth")
    steps: int | None = option(
        None, f"denoising steps per prompt of --calibrate; default: {DEFAULT_STEPS}", "--steps", unit="N"
    )
    task: str | None = option(None, "task of the checkpoint; default: the first that it fits", "--task", unit="TASK")

    def __post_init__(self) -> None:
        for name, allowed in (("scheme", ("fp8", "int8")), ("scaling", ("row", "tensor", "block"))):
            if getattr(self, name) not in allowed:
                raise WanFastError(f"--{name} must be one of {' '.join(allowed)}, got {getattr(self, name)!r}")
        if self.keep_blocks is not None and self.keep_blocks < 0:
            raise WanFastError(f"--keep_blocks must be 0 or more, got {self.keep_blocks}")
        if self.scheme == "int8" and self.scaling == "tensor":
            raise WanFastError("--scaling tensor is for fp8: an integer's scale is that of its token; take --scaling row")
        measured = "--smooth" if self.smooth else "--scaling tensor" if self.scaling == "tensor" else None
        if measured and self.calibrate is None:
            raise WanFastError(f"{measured} is measured on prompts; add --calibrate PROMPTS.txt, with one prompt per line")
        if self.calibrate is not None and not measured:
            raise WanFastError(
                f"--calibrate has nothing to measure: with --scaling {self.scaling} tokens are scaled as they come; leave it "
                "out, or add --smooth" + (" or --scaling tensor" if self.scheme == "fp8" else "")
            )
        if self.steps is not None and self.calibrate is None:
            raise WanFastError("--steps is for --calibrate; leave it out")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise WanFastError(f"--steps must be from 1 to 1000, got {self.steps}")


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that has been written: where, for which task, bytes of all tensors before and after, what computes how."""

    path: Path
    task: str
    bytes_before: int
    bytes_after: int
    linears: str


@dataclass(frozen=True, eq=False)
class Measured:
    """What the tokens of one linear need: input_scale [] and smooth [K], fp32."""

    input_scale: Tensor | None
    smooth: Tensor | None


# expert -> linear, as the model has it, -> what was measured
Calibration = Mapping[str, Mapping[str, Measured]]


def write_quantized(name: str, out: str | Path, recipe: Recipe, *, on_progress: Progress | None = None) -> Written:
    """Write a whole checkpoint with the DiT's linears in 8 bits, in the layout of the one it is made from.

    Args:
        name: the checkpoint to read: folder, hub id in the local cache, or "tiny".
        out: folder to write, which is empty or does not exist.
        recipe: how.
        on_progress: called with (stage, done, total): "load" and "quantize" count bytes, "calibrate" steps.

    Raises:
        WanFastError: it cannot be done, or not be written; no file is left.
    """
    out, report = Path(out), on_progress or _silent
    opened = _open(name)
    task = _task(opened, recipe)
    forms = {expert: _forms(part, recipe) for expert, part in opened.experts.items()}
    _check_out(out, opened)
    requests = _requests(recipe)
    config = _calibrating(opened, task, requests) if requests else None
    with _whole_folder(out) as scratch:
        measured = _measure(config, requests, forms, recipe, report) if config else {}
        _copy_others(opened, scratch)
        reported, total = 0, sum(info.num_bytes for part in opened.experts.values() for info in part.tensors.values())

        def read(count: int) -> None:
            nonlocal reported
            reported += count
            report("quantize", reported, total)

        for expert, part in opened.experts.items():
            folder = scratch / part.path.relative_to(opened.path)
            tensors = _tensors(part, forms[expert], measured.get(expert, {}), read)
            _write_shards(tensors, folder, _metadata(part, forms[expert], recipe, len(requests)))
            if not (folder / "config.json").exists():  # some files of other names come without
                sizes = {"_class_name": "WanModel", **asdict(_dims(part))}
                (folder / "config.json").write_text(json.dumps(sizes, indent=1))
        written = open_checkpoint(scratch)
    said = {schemes.described(forms[expert], part.shapes) for expert, part in opened.experts.items()}
    return Written(out, task, opened.num_bytes, written.num_bytes, "; ".join(sorted(said)))


# --- what is to be done, and whether it can be ----------------------------------------------------------------------------


def _open(name: str) -> Checkpoint:
    path = locate(name, TASKS["ti2v-5B"], download=False)
    if path is None:
        raise WanFastError(f"{name} is neither a folder nor in the hub cache; download it first")
    opened = open_checkpoint(path)
    for part in opened.experts.values():
        if any(info.dtype in ("F8_E4M3", "F8_E5M2", "I8") for info in part.tensors.values()):
            raise WanFastError(
                f"{str(part.path)!r} is in 8 bits already ({part.quantisation}), and would lose twice; give the checkpoint it "
                "was made from"
            )
    return opened


def _task(opened: Checkpoint, recipe: Recipe) -> str:
    """The task asked for, else the first that fits, of the model's own size where there is one; a whole checkpoint of it."""
    if recipe.task is not None:
        EngineConfig(task=recipe.task)  # which says what is wrong with a name
    dim = next(iter(opened.experts.values())).shapes["patch_embedding.weight"][0]
    fits = sorted(tasks_of(opened), key=lambda name: TASKS[name].dim != dim)
    task = recipe.task or next(iter(fits), None)
    if task is None:
        raise WanFastError(f"the checkpoint {str(opened.path)!r} fits no task of this version; see wan-fast inspect")
    if (own := TASKS[task].own_file) is not None and own[0] == "dit":
        raise WanFastError(
            f"--task {task}: its DiT is the file of {flag_of(EngineConfig, own[0], -1)}, not the checkpoint's; give run that "
            "file and --precision, which quantises as it loads"
        )
    check(opened, TASKS[task])
    return task


def _dims(part: Part) -> manifest.DiTDims:
    return manifest.DiTDims.of_shapes(part.shapes, part.config)


def _keep(part: Part, recipe: Recipe) -> int:
    return schemes.default_keep(_dims(part).num_layers) if recipe.keep_blocks is None else recipe.keep_blocks


def _forms(part: Part, recipe: Recipe) -> dict[str, Form]:
    """Linear, as the model has it, -> how it will compute."""
    layers, keep = _dims(part).num_layers, _keep(part, recipe)
    if 2 * keep >= layers:
        raise WanFastError(f"--keep_blocks {keep} at either end leaves none of {layers} blocks; take a smaller number")
    forms = schemes.quantized_at_load(part.shapes, recipe.scheme, "block" if recipe.scaling == "block" else "row", keep)
    dim = part.shapes["blocks.0.self_attn.q.weight"][0]
    if recipe.scaling == "block" and dim % schemes.GROUP:
        raise WanFastError(
            f"--scaling block has scales per {schemes.GROUP} x {schemes.GROUP}, and the DiT is {dim} wide: those of q would "
            "reach into k; take --scaling row"
        )
    return {linear: replace(form, input=recipe.scaling, smooth=recipe.smooth) for linear, form in forms.items()}


def _check_out(out: Path, opened: Checkpoint) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise WanFastError(f"the folder to write, {str(out)!r}, {what}; give one that is empty or does not exist")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise WanFastError(f"the folder to write, {str(out)!r}, lies in {str(parent)!r}, which does not exist; create it first")
    if opened.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise WanFastError(f"the folder to write, {str(out)!r}, lies in the checkpoint's own; choose another place")
    # a byte for every value, and scales
    need = sum(prod(shape) for part in opened.experts.values() for shape in part.shapes.values())
    if (free := shutil.disk_usage(parent).free) < need:
        raise WanFastError(
            f"{str(out)!r} needs at least {need / GIB:.1f} GiB, {free / GIB:.1f} are free there; choose another place"
        )


def _requests(recipe: Recipe) -> list[Request]:
    """A video for every line of the file of prompts, each from another noise."""
    if recipe.calibrate is None:
        return []
    try:
        lines = Path(recipe.calibrate).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WanFastError(f"--calibrate {recipe.calibrate!r} cannot be read ({error}); give a text file in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise WanFastError(f"--calibrate {recipe.calibrate!r} has no prompt; write one per line")
    steps = recipe.steps or DEFAULT_STEPS
    return [Request(prompt=prompt, num_steps=steps, seed=seed) for seed, prompt in enumerate(prompts)]


def _calibrating(opened: Checkpoint, task: str, requests: Sequence[Request]) -> EngineConfig:
    """The engine to calibrate with; what would hinder it is said now."""
    if TASKS[task].kind not in ("text", "text_image"):
        raise WanFastError(
            f"--calibrate makes clips of prompts alone, and {task} takes pictures or videos besides, whose tokens would be "
            "missed; leave it out, with --scaling row or block and without --smooth"
        )
    if find_spec("modelopt") is None:
        raise WanFastError("--calibrate needs nvidia-modelopt, which is not installed; pip install 'wan-fast[modelopt]'")
    config = EngineConfig(task=task, checkpoint=str(opened.path), precision="bf16")
    run = {step.expert for step in plan(config, requests[0]).steps}
    if idle := [expert for expert in opened.experts if expert not in run]:
        raise WanFastError(f"in {requests[0].num_steps} steps the {idle[0]} expert does not run; take more --steps")
    return config


# --- calibration ----------------------------------------------------------------------------------------------------------


class _Sampled(Exception):
    """A clip is denoised; it need not be decoded."""


def _measure(
    config: EngineConfig, requests: Sequence[Request], forms: Mapping[str, Mapping[str, Form]], recipe: Recipe, report: Progress
) -> Calibration:
    """Denoise every request, with ModelOpt's quantisers, which only look on, at the inputs of the linears."""
    from torch import Tensor, inference_mode, nn

    from wan_fast.engine import Engine
    from wan_fast.steps import Step

    engine = Engine(config, request=requests[0], on_progress=report)
    places = [(expert, name) for expert in forms for name in forms[expert]]
    linears: list[Any] = [engine.models[expert].get_submodule(name) for expert, name in places]
    total, largest = len(requests) * (requests[0].num_steps or 0), list[Tensor]()

    def denoise(_: nn.Module) -> None:
        done = 0

        def count(step: Step) -> None:
            nonlocal done
            done += 1
            report("calibrate", done, total)
            if step.index + 1 == step.total:
                raise _Sampled

        for request in requests:
            with suppress(_Sampled):
                engine.generate(request, on_step=count)
        for linear in linears:
            quantizer = linear.input_quantizer
            quantizer.load_calib_amax()
            quantizer.to(linear.weight.device)  # that of an offloaded model is not where its tokens were
            largest.append(quantizer.amax.float().cpu().reshape(-1))

    with _hushed():
        import modelopt.torch.quantization as mtq

        # a container of these linears alone, which are the DiT's own: nothing else of it is touched
        inside = nn.ModuleList(linears)
        if recipe.smooth:  # which ModelOpt has for integers; its vectors are the same for both
            algorithm = {"method": "smoothquant", "alpha": SMOOTHING}
            scheme = {**mtq.INT8_SMOOTHQUANT_CFG, "algorithm": algorithm}
        else:
            scheme = {**mtq.FP8_DEFAULT_CFG, "algorithm": "max"}
        with inference_mode():
            mtq.quantize(inside, scheme, denoise)
    measured: dict[str, dict[str, Measured]] = {expert: {} for expert in forms}
    for (expert, name), linear, most in zip(places, linears, largest, strict=True):
        smoothing = linear.input_quantizer.pre_quant_scale if recipe.smooth else None
        measured[expert][name] = _measured(most, smoothing, forms[expert][name])
    return measured


def _measured(largest: Tensor, smoothing: Tensor | None, form: Form) -> Measured:
    """Of the largest |value| of the tokens, in all or by channel, and ModelOpt's vector, what the linear needs."""
    from torch import finfo, float8_e4m3fn

    smooth = None
    if smoothing is not None:
        smooth = smoothing.float().cpu().reshape(-1)
        # outliers are damped, and no channel raised above the middle one: what was all but zero on these prompts, and gets a
        # factor of hundreds, is not on others. `tiny` in int8, two steps: an error of 0.61 without, see tests/test_export.py
        smooth = smooth.clamp(max=smooth.median())
        largest = largest * smooth
    scale = largest.max().clamp(min=1e-30) / finfo(float8_e4m3fn).max
    return Measured(scale if form.input == "tensor" else None, smooth)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what ModelOpt, and what it imports, say of themselves from the terminal."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


# --- writing --------------------------------------------------------------------------------------------------------------


def _tensors(
    part: Part, forms: Mapping[str, Form], measured: Mapping[str, Measured], report: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    """The tensors to write, by the names of the checkpoint's layout; those of a quantised weight together."""
    import torch

    from wan_fast.quantize import quantize_weight

    for name, tensor in read_tensors(part):
        assert isinstance(tensor, torch.Tensor)
        info = part.tensors[name]
        linear = schemes.linear_of(name) or ""
        if linear not in forms:
            # GGUF's come in fp32, which holds them exactly, and so does what they were
            kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(info.dtype, tensor.dtype)
            yield {info.stored_name: tensor.to(kept).contiguous()}
        else:
            known = measured.get(linear, Measured(None, None))
            weight = tensor if known.smooth is None else tensor.float() / known.smooth
            values, scale = quantize_weight(weight, forms[linear])
            if not scale.isfinite().all():
                raise WanFastError(f"{str(info.file)!r} has NaN or infinity in {info.stored_name}; download it again")
            scales = {"weight_scale": scale, "input_scale": known.input_scale, "pre_quant_scale": known.smooth}
            module = info.stored_name.removesuffix(".weight")
            # q, k and v have the same ones, which a file holds once each
            own = {f"{module}.{kind}": scale.clone() for kind, scale in scales.items() if scale is not None}
            yield {info.stored_name: values, **own}
        report(info.num_bytes)


def _in_shards(groups: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of groups in as few dicts as hold `SHARD_BYTES` each; a dict is emptied when the next one is asked for."""
    shard: dict[str, Tensor] = {}
    held = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group.values())
        if shard and held + size > SHARD_BYTES:
            yield shard
            shard.clear()
            held = 0
        shard.update(group)
        held += size
    yield shard


def _write_shards(groups: Iterable[dict[str, Tensor]], folder: Path, metadata: dict[str, str]) -> None:
    """One file, or shards and their index, under the names of both layouts."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    inside, total = list[list[str]](), 0
    for shard in _in_shards(groups):
        save_file(shard, folder / f"{_STEM}-{len(inside)}", metadata)
        inside.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    count = len(inside)
    numbers = ("" if count == 1 else f"-{i + 1:05d}-of-{count:05d}" for i in range(count))
    files = [f"{_STEM}{number}.safetensors" for number in numbers]
    for i, file in enumerate(files):
        written = (folder / f"{_STEM}-{i}").rename(folder / file)
        written.chmod(folder.stat().st_mode & 0o666)  # which safetensors leaves to its owner alone
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in zip(files, inside, strict=True) for name in names},
        }
        (folder / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _metadata(part: Part, forms: Mapping[str, Form], recipe: Recipe, num_prompts: int) -> dict[str, str]:
    """What a file of the DiT says of itself."""
    quantised = [info.stored_name for name, info in part.tensors.items() if schemes.linear_of(name) in forms]
    said = {
        "version": FORMAT_VERSION,
        "scheme": recipe.scheme,
        "scaling": recipe.scaling,
        "keep_blocks": _keep(part, recipe),
        "linears": [name.removesuffix(".weight") for name in quantised],
        "calibration": {"prompts": num_prompts, "steps": recipe.steps or DEFAULT_STEPS, "smooth": recipe.smooth}
        if num_prompts
        else None,
        "wan_fast": wan_fast.__version__,
    }
    return {"format": "pt", "wan_fast_quantization": json.dumps(said)}


def _copy_others(opened: Checkpoint, to: Path) -> None:
    """Everything of the checkpoint but the DiT's weights, large files as hard links where that can be; no hidden files."""
    dits = {info.file for part in opened.experts.values() for info in part.tensors.values()}
    folders = {part.path for part in opened.experts.values()}

    def walk(folder: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry, target / entry.name)
            elif entry not in dits and not (folder in folders and entry.name.startswith(_STEM)):
                _place(entry.resolve(), target / entry.name)  # the hub's cache is made of links

    walk(opened.path, to)


def _place(file: Path, target: Path) -> None:
    if file.stat().st_size >= _LINKED_BYTES:
        with suppress(OSError):
            os.link(file, target)
            return
    shutil.copyfile(file, target)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out`, renamed to it when the block ends well and removed when it does not."""
    target = out.resolve()
    scratch = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        scratch.mkdir()
        yield scratch
        os.replace(scratch, target)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise WanFastError(
                f"{str(out)!r} cannot be written or the checkpoint not read ({error}); free space, or choose another place"
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _silent(stage: str, done: int, total: int) -> None:
    pass
