"""Where the time of a run goes: by stage and by class of kernel, against the measured roofs, with a trace to look into.

Times come from torch.profiler: kernels on a GPU, operators on a CPU. The work of a class (operations, bytes) is counted
on meta tensors, so that counting costs the run nothing. A class's "% of roof" is the time its operations and bytes would
take at the device's best rates, over the time it took; a stage's counts its idle time as well.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_fast import roofs
from wan_fast.dit import WanDiT, grid_of
from wan_fast.engine import Engine
from wan_fast.kernels import KERNELS, frames_to_uint8
from wan_fast.manifest import VaeDims
from wan_fast.planning import Plan
from wan_fast.vae import WanVAE
from wan_fast.video import whole

R = TypeVar("R")
STAGES = ("prepare", "denoise", "decode")
# the first pattern that a kernel's or an operator's name matches
_CLASSES = (
    ("wan_fast kernel", "|".join(["wan_fast", *KERNELS])),
    ("attention", r"scaled_dot_product|flash|fmha|sdpa|attention"),
    ("convolution", r"conv|fprop|dgrad|implicit"),
    ("matrix product", r"gemm|mm\b|mm_|nvjet|cutlass|cublas|linear|matmul|splitK"),
    ("copy and layout", r"copy|memcpy|memset|cat\b|CatArray|pad|clone|contiguous|fill|zero|upsample|index|gather"),
    ("norm", r"norm"),
    ("elementwise", r"elementwise|mul|add|sub|div|gelu|silu|sigmoid|clamp|exp|pow|sqrt|sin|cos|where|reduce|softmax|mean|sum"),
)
# calls in which the host waits for a GPU; on a CPU, where nothing is waited for, those that would be such
_SYNCS = {
    True: ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    False: ("aten::_local_scalar_dense",),
}


def kind_of(name: str) -> str:
    """The class of a kernel or operator, by its name."""
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds, calls and, where the work is known, the share of the roof of one class in one stage."""

    kind: str
    seconds: float
    calls: int
    of_roof: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: wall seconds, seconds in which the device did nothing, waits of the host for it, and its classes."""

    name: str
    seconds: float
    idle: float
    syncs: int
    of_roof: float | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes of a class."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, count: int) -> Work:
        return Work(self.flops * count, self.bytes * count)


class Profile(Generic[R]):
    """A profiled call: `result`, `stages`, and the trace."""

    def __init__(self, engine: Engine, todo: Plan, call: Callable[[], R]) -> None:
        self.roofs = dict(
            roofs.measured(engine.device, ("bf16", "tf32", "fp32") if engine.device.type == "cuda" else ("fp32",))
        )
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if engine.device.type == "cuda" else [])]
        with profile(activities=activities) as self._profiler:
            self.result = call()
        work = count_work(engine, todo)
        events = self._profiler.events() or []
        self.stages = tuple(_stages(events, work, self._rates(engine), on_gpu=engine.device.type == "cuda"))

    def _rates(self, engine: Engine) -> Mapping[str, float]:
        """Operations per second by class, and bytes per second as "copy"."""
        if engine.device.type == "cuda":
            used = (
                {"": "bf16", "convolution": "tf32"} if engine.dtype == torch.bfloat16 else {"": "fp32", "convolution": "fp32"}
            )
        else:
            # a CPU's bf16 is for memory's sake: few have faster products in it
            used = {"": "fp32", "convolution": "fp32"}
        # without a rate nothing is held against it
        return {kind: self.roofs.get(roof, inf) for kind, roof in {**used, "copy": "copy"}.items()}

    def table(self) -> Iterator[str]:
        """The findings as lines of text."""
        known = ", ".join(
            f"{name} {rate / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}" for name, rate in self.roofs.items()
        )
        yield f"profile     roofs of this machine, measured: {known}"
        yield f"            {'stage':8s} {'class':16s} {'seconds':>9s} {'share':>6s} {'roof':>6s} {'calls':>8s}"
        for stage in self.stages:
            whole_stage = f"{stage.name:8s} {'all':16s} {stage.seconds:9.3f} {'100 %':>6s} {_percent(stage.of_roof):>6s}"
            idle = f"idle {_percent(stage.idle / stage.seconds)}, host waited for the device {stage.syncs}x"
            yield f"            {whole_stage}   {idle}"
            for row in stage.rows:
                share, roof = _percent(row.seconds / stage.seconds), _percent(row.of_roof)
                yield f"            {'':8s} {row.kind:16s} {row.seconds:9.3f} {share:>6s} {roof:>6s} {row.calls:8d}"

    def write_trace(self, path: Path) -> None:
        """Write the trace as JSON that chrome://tracing and ui.perfetto.dev open."""
        with whole(path) as scratch:
            self._profiler.export_chrome_trace(str(scratch))


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.0f} %"


def _stages(
    events: Iterable[Any], work: Mapping[tuple[str, str], Work], rates: Mapping[str, float], *, on_gpu: bool
) -> Iterator[Stage]:
    events = list(events)
    for name in STAGES:
        marks = [e for e in events if e.name == name and e.device_type == DeviceType.CPU]
        if not marks:
            continue
        begin, end = marks[0].time_range.start, marks[0].time_range.end
        inside = [e for e in events if begin <= e.time_range.start < end and e.name not in STAGES]
        seconds: defaultdict[str, float] = defaultdict(float)
        calls = Counter[str]()
        for event, taken in _busy(inside, on_gpu):
            seconds[kind_of(event.name)] += taken / 1e6
            calls[kind_of(event.name)] += 1
        busy = _covered(e.time_range for e, _ in _busy(inside, on_gpu)) / 1e6
        wall = (end - begin) / 1e6
        rows = [
            Row(kind, spent, calls[kind], _of_roof(work.get((name, kind)), kind, rates, spent))
            for kind, spent in sorted(seconds.items(), key=lambda item: -item[1])
        ]
        least = [_least(done, kind, rates) for (stage, kind), done in work.items() if stage == name]
        # a stage on a GPU ends with a wait of its own
        syncs = max(0, sum(e.name in _SYNCS[on_gpu] for e in inside) - on_gpu)
        yield Stage(name, wall, max(0.0, wall - busy), syncs, sum(least) / wall if any(least) else None, tuple(rows))


def _busy(events: Iterable[Any], on_gpu: bool) -> Iterator[tuple[Any, float]]:
    """The events that occupy the device, with their own microseconds: kernels on a GPU, operators on a CPU."""
    for event in events:
        if on_gpu and event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event, event.time_range.elapsed_us()
        elif not on_gpu and event.device_type == DeviceType.CPU:
            yield event, event.self_cpu_time_total


def _covered(ranges: Iterable[Any]) -> float:
    """Microseconds that at least one of the ranges covers."""
    total, reached = 0.0, float("-inf")
    for item in sorted(ranges, key=lambda r: r.start):
        total += max(0.0, item.end - max(item.start, reached))
        reached = max(reached, item.end)
    return total


def _least(work: Work, kind: str, rates: Mapping[str, float]) -> float:
    return max(work.flops / rates.get(kind, rates[""]), work.bytes / rates["copy"])


def _of_roof(work: Work | None, kind: str, rates: Mapping[str, float], spent: float) -> float | None:
    return (_least(work, kind, rates) / spent or None) if work and spent else None


# --- the work, on meta --------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Adds up the operations and bytes of every operator that runs in the block, by class."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            flops = (
                flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
                if func._overloadpacket in flop_registry
                else 0
            )
            self.add(str(func._schema.name), flops, (args, kwargs, out))
        return out

    def add(self, name: str, flops: float, touched: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, Tensor)]
        # a broadcast tensor is read from what it really holds
        moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        self.work[kind_of(name)] += Work(flops, moved)


class _CountAttention(TorchFunctionMode):
    """Counts attention as one operator: on meta PyTorch would spell it out, scores and all."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3] if len(args) >= 3 else [kwargs[name] for name in ("query", "key", "value")]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.count.add("attention", 4 * prod(q.shape) * k.shape[-2], (q, k, v, out))
        return out


def count_work(engine: Engine, todo: Plan) -> dict[tuple[str, str], Work]:
    """(stage, class) -> work of denoising and decoding; what the text encoder does is not counted."""
    work: dict[tuple[str, str], Work] = {}
    forwards = Counter(step.expert for step in todo.steps for run in (step.conditional, step.unconditional) if run == "run")
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
        for expert, count in forwards.items():
            loaded = engine.models[expert]
            assert isinstance(loaded, WanDiT)
            model = _on_meta(loaded, WanDiT(loaded.dims))
            latents, timestep = torch.empty(1, *todo.latent_shape), torch.empty(1, 1)
            context = model.prepare([torch.empty(1, model.dims.text_dim)], grid_of(latents.shape))
            for kind, done in _counted(partial(model, latents, timestep, context)).items():
                work["denoise", kind] = work.get(("denoise", kind), Work()) + done * count
        shapes = {name: tuple(t.shape) for name, t in engine.models["vae"].state_dict().items()}
        vae = _on_meta(engine.models["vae"], WanVAE(VaeDims.of_shapes(shapes)))
        z = torch.empty(todo.latent_shape)
        decoded = _counted(lambda: [frames_to_uint8(c) for c in vae.decode_chunks(z, chunk=todo.memory.decode_chunk)])
        work |= {("decode", kind): done for kind, done in decoded.items()}
    return work


def _counted(call: Callable[[], object]) -> dict[str, Work]:
    with Count() as count, _CountAttention(count):
        call()
    return dict(count.work)


def _on_meta(model: nn.Module, empty: Any) -> Any:
    """`empty`, a model of the same kind, with the shapes and dtypes of `model` and no values."""
    empty.load_state_dict({n: torch.empty_like(t, device="meta") for n, t in model.state_dict().items()}, assign=True)
    return empty.requires_grad_(False).eval()
