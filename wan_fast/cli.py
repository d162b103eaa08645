"""The command line. What is wrong is said in one line on standard error, with exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wan_fast
from wan_fast import processes
from wan_fast.config import INPUTS, EngineConfig, Output, Request, WanFastError
from wan_fast.examples import example
from wan_fast.flags import Parser, add_options, add_tts, build, refuse_tts
from wan_fast.parsing import flag_of
from wan_fast.prompt_extension import PromptExtension, check, described, extend
from wan_fast.resolving import with_seed
from wan_fast.steps import LETTERS
from wan_fast.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from wan_fast.engine import Engine, Video
    from wan_fast.planning import Plan
    from wan_fast.profiling import Profile

_EXAMPLE = 'wan-fast run --task ti2v-5B --ckpt_dir tiny --prompt "a red ball bounces" --save_file ball.mp4'


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 the request cannot be carried out, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(words)(words[1:])
    except WanFastError as error:
        line = " ".join(str(error).split())
        if processes.speaks():
            print(f"wan-fast: error: {line}", file=sys.stderr)
        else:
            processes.let_the_first_speak()
        return 2
    except BrokenPipeError:  # the reader of our output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nwan-fast: interrupted; no half-written file is left", file=sys.stderr)
        return 130


_COMMANDS = {
    "run": "make one video (or picture) and write it",
    "plan": "say what run would do, with the same flags, and do nothing",
    "quantize": "write a checkpoint with its linears in 8 bits, which run loads back",
    "calibrate": "record what step caches must know of a model, on a few prompts; run then finds it",
    "doctor": "say what this machine has, and what each operation would use",
    "inspect": "say what a checkpoint is, and what it lacks",
}


def _command(words: list[str]) -> Callable[[Sequence[str]], int]:
    """The function of the command named first; without one, the help."""
    commands = {
        "run": _run,
        "plan": _plan,
        "quantize": _quantize,
        "calibrate": _calibrate,
        "doctor": _doctor,
        "inspect": _inspect,
    }
    if words and words[0] in commands:
        return commands[words[0]]
    if words and not words[0].startswith("-"):
        close = get_close_matches(words[0], commands, 1)
        raise WanFastError(f"unknown command {words[0]!r}; " + (f"did you mean {close[0]}?" if close else "see --help"))
    top = Parser("wan-fast", "Wan 2.1 and 2.2 video generation.", f"Try: {_EXAMPLE}")
    top.add_argument("--version", action="version", version=f"wan-fast {wan_fast.__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, text in _COMMANDS.items():
        subparsers.add_parser(name, help=text)
    top.parse_args(words or ["--help"])
    raise WanFastError("no command given; see wan-fast --help")


def _parser(name: str, epilog: str = "") -> Parser:
    return Parser(f"wan-fast {name}", _COMMANDS[name].capitalize() + ".", epilog)


# --- run and plan -----------------------------------------------------------------------------------------------------


def _run_parser(name: str) -> Parser:
    parser = _parser(name, f"Example: {_EXAMPLE}")
    for cls in (EngineConfig, Request, PromptExtension, Output):
        add_options(parser, cls)
    add_tts(parser)
    return parser


def _options(parsed: argparse.Namespace) -> tuple[EngineConfig, Request, PromptExtension, Output]:
    config = build(EngineConfig, parsed)
    processes.check(config)
    refuse_tts(parsed)
    request = build(Request, parsed)
    if _nothing_asked(parsed):
        request = replace(request, **example(config.spec))
    return config, with_seed(request), build(PromptExtension, parsed), build(Output, parsed)


def _planned(config: EngineConfig, request: Request, extension: PromptExtension, on: str | None = None) -> Plan:
    """The plan; a prompt that is still to be written may be empty."""
    check(extension, bool(_pictures(request)))
    if not extension.use_prompt_extend or (request.prompt or "").strip() or not _pictures(request):
        return wan_fast.plan(config, request, on=on)
    todo = wan_fast.plan(config, replace(request, prompt="one that is not written yet"), on=on)
    return replace(todo, request=replace(todo.request, prompt=""))


def _pictures(request: Request) -> list[Path]:
    """What a language model that extends the prompt is shown."""
    return [Path(file) for name in ("image", "first_frame", "last_frame") for file in request.given(name)]


def _extended(config: EngineConfig, request: Request, extension: PromptExtension, quiet: bool) -> Request:
    if not extension.use_prompt_extend:
        return request
    from wan_fast.media import read_image

    pictures = [read_image(file) for file in _pictures(request)]
    assert request.seed is not None
    extended = extend(extension, request.prompt, pictures, seed=request.seed, device=config.device, quiet=quiet)
    print(f"warning     {extended.note}" if extended.note else f"prompt      {extended.prompt}", flush=True)
    return replace(request, prompt=extended.prompt)


def _nothing_asked(parsed: argparse.Namespace) -> bool:
    """Whether no prompt, not even an empty one, and no picture or video is given; the official code has an example then."""
    return not any(hasattr(parsed, name) for name in ("prompt", *INPUTS))


def _run(words: Sequence[str]) -> int:
    parser = _run_parser("run")
    parsed = parser.parse_args(words)
    config, request, extension, output = _options(parsed)
    _check_folders(output)
    if output.profile:  # else torch's profiler reports its own comings and goings; read when torch is imported
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    todo = _planned(config, request, extension)
    target = _check_outputs(output, todo)
    _say_plan(todo, is_example=_nothing_asked(parsed))
    if todo.framing.sound is not None and target.suffix.lower() == ".gif":
        print(f"warning     {target} is a GIF, which has no sound; take .mp4 or .webm to hear {todo.framing.sound.name}")
    _say_extension(request, extension)
    _say_attention(todo)
    _say_schedule(todo)
    request = _extended(config, request, extension, output.quiet)
    print("starting    PyTorch and transformers", flush=True)

    from safetensors.torch import save_file

    from wan_fast import video

    if todo.checkpoint is None:
        _download(config)
    with _Bars(output.quiet) as bars, ExitStack() as files:
        engine = wan_fast.Engine(config, request=request, on_progress=bars)
        settled = engine.plan(request)
        if settled.kernels != todo.kernels:
            _say_attention(settled)
        if settled.steps != todo.steps:  # the checkpoint was not here before
            _say_schedule(settled)
        frames = _FloatFrames(todo) if output.save_frames else None
        # what could not be written of the video must not cost the other files
        unwritten: list[WanFastError] = []

        def generate() -> Video:
            # the file begins while frames are still decoded, and appears under its name when all is well
            add = files.enter_context(video.writing(target, todo.request.fps, todo.framing.sound))

            def write(pixels: Tensor) -> None:
                if not unwritten:
                    with _collected(unwritten):
                        add(pixels)

            return engine.generate(request, on_progress=bars, on_frames=frames, on_pixels=write)

        profile = _profile(engine, request, generate) if output.profile else None
        result = profile.result if profile else generate()
        with _collected(unwritten):
            files.close()
        if frames and output.save_frames:
            with video.whole(Path(output.save_frames)) as scratch:
                save_file({"frames": frames.tensor}, scratch)
        if output.save_latents:
            with video.whole(Path(output.save_latents)) as scratch:
                save_file({"latents": result.latents.contiguous()}, scratch)
        if output.stats:
            with video.whole(Path(output.stats)) as scratch:
                scratch.write_text(json.dumps(result.stats, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    if unwritten:
        raise unwritten[0]
    if profile:
        profile.write_trace(trace := target.with_suffix(".trace.json"))
        print("\n".join([*profile.table(), f"trace       {trace}; open it in ui.perfetto.dev"]))
    stats = result.stats
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in stats["seconds"].items())
    cached = "; text from the cache" if stats["text"]["from_cache"] == stats["text"]["texts"] else ""
    if stats["graphs"]:
        print("graphs      " + ", ".join(f"{what}: {count}" for what, count in stats["graphs"].items()))
    print(f"done        {seconds}{cached}; peak {_gib(stats['peak_bytes'])}")
    print(target)
    return 0


def _profile(engine: Engine, request: Request, generate: Callable[[], Video]) -> Profile[Video]:
    from wan_fast.profiling import Profile

    return Profile(engine, engine.plan(request), generate)


@contextmanager
def _collected(errors: list[WanFastError]) -> Iterator[None]:
    try:
        yield
    except WanFastError as error:
        errors.append(error)


class _FloatFrames:
    """Collects the decoded chunks [3, f, H, W] in one tensor [3, F, H, W] fp32."""

    def __init__(self, todo: Plan) -> None:
        import torch

        width, height = todo.request.size
        self.tensor = torch.empty(3, todo.request.num_frames, height, width)
        self.done = 0

    def __call__(self, chunk: Tensor) -> None:
        self.tensor[:, self.done : self.done + chunk.shape[1]] = chunk
        self.done += chunk.shape[1]


def _plan(words: Sequence[str]) -> int:
    parser = _run_parser("plan")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--on", metavar="GPU", help="plan for this card, which need not be here: h200, h100, 5090, 4090, ...")
    parsed = parser.parse_args(words)
    config, request, extension, output = _options(parsed)
    if parsed.on is not None and config.device != "auto":
        raise WanFastError(f"--on {parsed.on} and --device {config.device} name two devices; give one of them")
    todo = _planned(config, request, extension, parsed.on)
    _check_outputs(output, todo)
    if parsed.json:
        print(json.dumps(todo.to_dict(), indent=1, ensure_ascii=False, default=str))
        return 0
    _say_plan(todo, is_example=_nothing_asked(parsed))
    _say_extension(request, extension)
    _say_attention(todo)
    _say_schedule(todo, always=True)
    memory = todo.memory
    print("weights     " + ", ".join(f"{name} {_gib(count)}" for name, count in memory.weights.items()))
    for stage, peak in memory.peak.items():
        print(f"peak        {stage:8s} {_gib(peak)}, of it working memory {_gib(memory.working[stage])}")
    chunk, piece = _count(memory.decode_chunk, "latent frame"), _count(memory.decode_piece, "frame")
    tiles = "whole frames" if memory.decode_tiles == 1 else f"in {memory.decode_tiles} strips"
    captured = f"of steps{' and of chunks' * memory.decode_graphs}, {memory.graphs} after a clip"
    print(f"decode      {chunk} at a time, {piece} of these in the upper levels, {tiles}; VAE in {todo.vae_dtype}")
    if "image" in memory.peak:
        print(f"pictures    image encoder in {todo.image_dtype}")
    print(f"graphs      {'off' if memory.graphs == 'off' else captured}")
    for (backend, why), kernels in groupby(todo.kernels, lambda kernel: (kernel.backend, kernel.why)):
        print(f"kernel      {', '.join(kernel.op for kernel in kernels)}: {backend} ({why})")
    print("work        " + ", ".join(f"{stage} {count / 1e12:,.1f} TFLOP" for stage, count in todo.flops.items()))
    if todo.seconds_at_least is None:
        print("time        not predicted: the peak of this device is not on record; --on h200, say, predicts for another")
    else:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in todo.seconds_by_stage.items())
        print(f"time        at least {todo.seconds_at_least:.1f} s at {todo.device.model}'s peaks: {stages}")
    print("step  timestep     sigma  expert      guidance  conditional  unconditional  attention")
    for step in todo.steps:
        print(
            f"{step.index:4d}  {step.timestep:8.0f}  {step.sigma:8.6f}  {step.expert:10s}  {step.guidance_scale:8g}  "
            f"{step.conditional:11s}  {step.unconditional:13s}  {step.attention}"
        )
    return 0


def _clips(todo: Plan) -> str:
    """Of how many clips the video is made, and what of it the file has."""
    framing, request = todo.framing, todo.request
    clips = f" in {_count(len(framing.clips), 'clip')}" * bool(framing.segments)
    shown = framing.shown or request.num_frames
    return clips + f", of which the file has {shown}, as long as the sound" * (shown < request.num_frames)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _say_plan(todo: Plan, *, is_example: bool) -> None:
    """The few lines a person wants to see before it starts."""
    config, request, opened = todo.config, todo.request, todo.checkpoint
    if is_example:
        shown = " ".join(Path(path).name for name in INPUTS for path in request.given(name))
        print(f"example     nothing was asked for, so the task's own: {shown}{': ' * bool(shown)}{request.prompt}")
    if opened is None:
        print(f"checkpoint  {config.checkpoint or config.spec.hub_id}, to be downloaded; planned with the released sizes")
    elif not config.parts:
        dtypes = next(iter(opened.experts.values())).dtypes
        print(f"checkpoint  {opened.path} ({opened.layout}, {dtypes})")
        if opened.note:
            print(f"note        {opened.note}")
    if config.parts:
        _say_parts(todo)
    print(f"device      {todo.device.name}: {todo.device.model}, {todo.dtype}, {_gib(todo.memory.budget)} to use")
    scale = ",".join(f"{value:g}" for value in dict.fromkeys(request.guidance_scale))
    if request.image_guidance_scale is not None:
        scale += f" and {request.image_guidance_scale:g} by the pictures"
    print(
        f"video       {request.size[0]}x{request.size[1]}, {request.num_frames} frames at {request.fps:g} fps{_clips(todo)}; "
        f"{request.num_steps} steps of {request.solver}, shift {request.shift:g}, guidance {scale}, "
        + (f"noise from {request.noise}" if request.noise else f"seed {request.seed}")
    )
    worst = max(todo.memory.peak, key=lambda stage: todo.memory.peak[stage])
    placing = "one model at a time on the device" if todo.memory.offload else "all models resident"
    print(f"linears     {todo.linears}")
    for lora in todo.loras:
        print(f"lora        {lora}")
    if todo.preset:
        print(f"preset      {todo.preset}")
    print(f"plan        {todo.tokens:,} tokens, peak {_gib(todo.memory.peak[worst])} in {worst}, {placing}")
    for warning in todo.warnings:
        print(f"warning     {warning}")


def _say_parts(todo: Plan) -> None:
    """Which file each model comes from; where the checkpoint is not here yet, of those given by themselves."""
    opened, parts = todo.checkpoint, dict[str, Any](todo.config.parts)
    if opened is not None:
        others = {name: getattr(opened, name) for name in ("vae", "text_encoder", "image_encoder", "tokenizer")}
        if not todo.config.spec.image_tokens:
            del others["image_encoder"]
        parts = {**opened.experts, **others}
    names = {"model": "DiT", "high_noise": "DiT high", "low_noise": "DiT low", "vae": "VAE"}
    names |= {"text_encoder": "text", "image_encoder": "image"}
    for name, part in parts.items():
        told = part if isinstance(part, (str, Path)) else f"{part.path} ({part.dtypes})"
        print(f"{names.get(name, name):11s} {told}")


def _say_extension(request: Request, extension: PromptExtension) -> None:
    if extension.use_prompt_extend:
        print(f"prompt      {described(extension, bool(_pictures(request)))}", flush=True)


_WORDS = {"#": "computed", ".": "reused", "~": "reconstructed", "0": "predicts nothing", "-": "none"}


def _say_schedule(todo: Plan, *, always: bool = False) -> None:
    """A character per step and branch, and how many passes are left out; nothing where all are computed, but for `always`."""
    rows = {name: "".join(LETTERS[getattr(step, name)] for step in todo.steps) for name in ("conditional", "unconditional")}
    if todo.request.two_scales:
        rows["unprompted"] = rows["unconditional"]
    if todo.quality:
        print(f"quality     {todo.quality}")
    if {*"".join(rows.values())} == {"#"} and not always:
        return
    if todo.step_cache:
        print(f"step cache  {todo.step_cache}")
    used = ", ".join(f"{letter} {word}" for letter, word in _WORDS.items() if letter in "".join(rows.values()))
    print(f"schedule    {rows['conditional']}  conditional ({used})")
    for name in [*rows][1:]:
        print(f"            {rows[name]}  {name}")
    if len({step.expert for step in todo.steps}) > 1:
        print("            " + "".join(step.expert[0].upper() for step in todo.steps) + "  expert (H high noise, L low noise)")
    fewer = todo.forwards_uncached / todo.forwards
    print(f"forwards    {todo.forwards} of {todo.forwards_uncached}" + (f", {fewer:.2f} times fewer" if fewer > 1 else ""))


def _say_attention(todo: Plan) -> None:
    from wan_fast.backends import IN_8_BITS

    for choice in todo.kernels[:2]:
        if choice.op == "attention":
            print(f"attention   {choice.backend} ({choice.why})")
        elif choice.op == IN_8_BITS:
            steps = sum(step.attention == "8-bit" for step in todo.steps)
            kept = f", without {todo.config.keep_blocks} blocks at either end" if todo.config.keep_blocks else ""
            print(f"in 8 bits   {choice.backend}, in {steps} of {len(todo.steps)} steps{kept} ({choice.why})")


def _check_outputs(output: Output, todo: Plan) -> Path:
    """The file to write; its folder and suffix are checked."""
    from wan_fast import video

    request, spec = todo.request, todo.config.spec
    if output.save_file is not None:
        target = Path(output.save_file)
    else:
        words = "".join(c if c.isalnum() else "_" for c in request.prompt.strip())[:50]
        suffix = ".png" if spec.image_only else ".mp4"
        target = Path(f"{spec.name}_{request.size[0]}x{request.size[1]}_{words}_{time.strftime('%Y%m%d_%H%M%S')}{suffix}")
    video.check_output(target, request.num_frames, spec.image_only)
    if output.profile:
        video.check_folder(target.with_suffix(".trace.json"), "--profile")
    return target


def _check_folders(output: Output) -> None:
    from wan_fast import video

    flags = {"save_file": "--save_file", "save_latents": "--save-latents", "save_frames": "--save-frames", "stats": "--stats"}
    for name, flag in flags.items():
        if (path := getattr(output, name)) is not None:
            video.check_folder(Path(path), flag)


def _download(config: EngineConfig) -> None:
    """Fetch the weights. The hub's threads outlive a KeyboardInterrupt until their files end, so Ctrl-C leaves at once."""
    from wan_fast.single_files import located

    def leave(*_: object) -> None:
        os.write(2, b"\nwan-fast: interrupted; the next run goes on with the download\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        located(config)
    finally:
        signal.signal(signal.SIGINT, before)


class _Bars:
    """One progress bar per stage, with the time left."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.stage = ""
        self.bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if stage != self.stage:
            from tqdm import tqdm

            self.__exit__()
            unit = {"load": "B", "quantize": "B", "denoise": "step", "calibrate": "step", "decode": "frame"}.get(stage, "it")
            self.bar = tqdm(total=total, desc=f"{stage:8s}", unit=unit, unit_scale=unit == "B", dynamic_ncols=True)
            self.stage = stage
        self.bar.update(done - self.bar.n)


# --- quantize ---------------------------------------------------------------------------------------------------------


def _quantize(words: Sequence[str]) -> int:
    from wan_fast.export import Recipe, write_quantized

    parser = _parser("quantize", "Example: wan-fast quantize Wan2.2-TI2V-5B Wan2.2-TI2V-5B-fp8 --scheme fp8")
    parser.add_argument("checkpoint", metavar="CKPT", help="folder, hub id in the local cache, or tiny")
    parser.add_argument("out", metavar="OUT", help="folder to write, empty or not there yet")
    add_options(parser, Recipe)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parsed = parser.parse_args(words)
    recipe = build(Recipe, parsed)
    with _Bars(parsed.quiet) as bars:
        written = write_quantized(parsed.checkpoint, parsed.out, recipe, on_progress=bars)
    print(f"linears     {written.linears}; all else is as it was")
    print(f"size        {_size(written.bytes_before)} before, {_size(written.bytes_after)} now")
    print(f'next        {_next(written.task, str(written.path))} --prompt "..."')
    print(written.path)
    return 0


# --- calibrate --------------------------------------------------------------------------------------------------------


def _calibrate(words: Sequence[str]) -> int:
    parser = _parser("calibrate", "Example: wan-fast calibrate Wan2.2-TI2V-5B --sample_steps 30 --search")
    parser.add_argument("checkpoint", metavar="CKPT", help="folder, hub id, or tiny")
    parser.add_argument("--task", default=None, metavar="TASK", help="task of the checkpoint; default: the first that it fits")
    caches = ("quality", "step_cache", "cfg_cache", "cfg_zero", "calibration", "cuda_graphs")
    parts = ("dit", "vae", "text_encoder", "image_encoder")
    several = ("ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp")
    from wan_fast.recording import Recording

    add_options(parser, Recording)
    add_options(parser, EngineConfig, less=("task", "checkpoint", *parts, *caches, *several))
    add_options(parser, Request, less=("prompt", "seed", "noise"))
    parsed = parser.parse_args(words)
    recording = build(Recording, parsed)
    parsed.task = parsed.task or _task_of(parsed.checkpoint)
    config, request = build(EngineConfig, parsed), build(Request, parsed)
    from wan_fast.calibrate import calibrate

    with _Bars(recording.quiet) as bars:
        file, found, points = calibrate(config, request, recording, on_progress=bars)
    print(f"recorded    {_count(found.prompts or 0, 'prompt')}, {found.num_steps} steps at shift {found.shift:g}")
    for point in points:
        print(f"curve       {point.name:12s} {point.forwards:4d} passes  {point.psnr:5.1f} dB")
    for row in found.masks:
        print(f"mask        {row['mask']}  {row['mask'].count('#')} steps computed, {row['psnr']:.1f} dB")
    run = f"{_next(parsed.task, parsed.checkpoint)} --sample_steps {found.num_steps}"
    given = f" --calibration {shlex.quote(recording.out)}" if recording.out else ""
    given += "".join(f" --lora {shlex.quote(lora)}" for lora in config.lora)
    given += f" --unianimate_ckpt {shlex.quote(config.unianimate)}" if config.unianimate else ""
    print(f'next        {run}{given} --step-cache auto --prompt "..."')
    print(file)
    return 0


def _next(task: str, checkpoint: str) -> str:
    """A command that runs a checkpoint, but for the prompt."""
    spec = TASKS[task]
    given = [flag_of(Request, name) for name in sorted(spec.needs - {"prompt"})]
    given += [] if spec.own_file is None else [flag_of(EngineConfig, spec.own_file[0], -1)]
    inputs = "".join(f" {flag} {'FOLDER' if flag == '--src_root_path' else 'FILE'}" for flag in given)
    return f"wan-fast run --task {task} --ckpt_dir {shlex.quote(checkpoint)}{inputs}"


def _task_of(checkpoint: str) -> str:
    """The first task of this version that a checkpoint fits."""
    from wan_fast import checkpoint as checkpoints

    path = checkpoints.locate(checkpoint, TASKS["ti2v-5B"], download=False)
    if path is None:
        raise WanFastError(f"{checkpoint} is neither a folder nor in the hub cache; download it, or say its --task")
    opened = checkpoints.open_checkpoint(path)
    fits = checkpoints.tasks_of(opened)
    if not fits:
        raise WanFastError(f"{str(path)!r} ({checkpoints.kind_of(opened)}) fits no task; give another checkpoint")
    return fits[0]


# --- doctor and inspect -------------------------------------------------------------------------------------------------


def _doctor(words: Sequence[str]) -> int:
    parser = _parser("doctor")
    parser.add_argument("--json", action="store_true", help="for machines")
    parsed = parser.parse_args(words)
    from wan_fast.doctor import report

    facts = report()
    if parsed.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    for title, rows in facts.items():
        for name, value in rows.items():
            print(f"{title:11s} {name}: {value}")
    return 0


def _inspect(words: Sequence[str]) -> int:
    parser = _parser("inspect")
    parser.add_argument("checkpoint", metavar="CKPT", help="folder, hub id in the local cache, tiny, or the file of one model")
    parser.add_argument("--json", action="store_true", help="for machines")
    parsed = parser.parse_args(words)
    from wan_fast import checkpoint as checkpoints

    file = Path(parsed.checkpoint).expanduser()
    path = file if file.is_file() else checkpoints.locate(parsed.checkpoint, TASKS["ti2v-5B"], download=False)
    if path is None:
        raise WanFastError(f"{parsed.checkpoint} is neither a folder nor in the hub cache; download it first")
    facts = checkpoints.describe_file(path) if path.is_file() else checkpoints.describe(checkpoints.open_checkpoint(path))
    if parsed.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    for name, value in facts.items():
        if name == "parts":
            for part, about in value.items():
                print(f"{part}")
                for key, item in about.items():
                    print(f"    {key}: {item}")
        else:
            print(f"{name}: {' '.join(value) if isinstance(value, list) else value}")
    return 0


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _size(count: float) -> str:
    return _gib(count) if count >= 2**30 else f"{count / 2**20:.1f} MiB"
