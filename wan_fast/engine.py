"""Build once, generate many: prepare, plan, denoise, decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from wan_fast import checkpoint as checkpoints
from wan_fast import manifest, video
from wan_fast.attention import Attention, Projected, choose, first_that_runs, sdpa
from wan_fast.backends import IN_8_BITS
from wan_fast.conditioning import PREPARE, Clips, Conditioning, texts_of
from wan_fast.config import ATTENTION_8BIT, EngineConfig, Request, WanFastError
from wan_fast.dit import WanDiT
from wan_fast.embeddings import Embeddings
from wan_fast.encoders import Tokenizer
from wan_fast.examples import example
from wan_fast.framing import Segment
from wan_fast.kernels import only_reference
from wan_fast.loading import load_model, reload
from wan_fast.memory import GIB, model_weights
from wan_fast.merging import Merger
from wan_fast.planning import Plan, plan
from wan_fast.residents import DTYPES, Residents
from wan_fast.running import memory_guard, on_the_host, peak_bytes, tf32_convolutions
from wan_fast.sampler import denoise, directly
from wan_fast.schedule import sampler_of
from wan_fast.setup import Models, Setup, set_up, with_loras
from wan_fast.single_files import located
from wan_fast.steps import Step
from wan_fast.workspace import Workspace

# per clip the noise to start from [C, T, H, W], and what draws more of it
Noise: TypeAlias = Callable[[Segment], tuple[Tensor, Callable[[], Tensor]]]
# (stage, done, total): "load" counts bytes, "denoise" steps, "decode" frames, the others pieces
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Video:
    """A finished clip.

    frames: [F, H, W, 3] uint8 on the CPU, up to the end of the sound that drives them; F is 0 where `on_pixels` took them.
    latents: [C, T, H, W] fp32, of a chain those of its clips one after the other. stats: seconds and bytes per stage, and the
    plan. sound: a file with the clip's sound.
    """

    frames: Tensor
    latents: Tensor
    fps: float
    stats: Mapping[str, Any]
    sound: Path | None = None

    def save(self, path: str | Path) -> Path:
        """Write the clip as .mp4, .webm, .gif, or one frame as .png or .jpg, with its sound; returns the path."""
        path = Path(path)
        if not len(self.frames):
            raise WanFastError(f"there are no frames to save as {str(path)!r}: on_pixels took them as they were made")
        video.check_output(path, len(self.frames), image_only=False)
        video.write(self.frames, path, self.fps, self.sound)
        return path


class Engine:
    """Holds the models of one task and makes videos with them.

    Args:
        config: what to build.
        request: the video to place the models for, where it is known; else the task's default one.
        on_progress: called with (stage, done, total) as loading goes on.

    Raises:
        WanFastError: the checkpoint is missing, not of this task, or does not fit the device.
    """

    def __init__(self, config: EngineConfig, *, request: Request | None = None, on_progress: Progress | None = None) -> None:
        self._text: dict[str, Any] = {}
        self._half_done = False
        self._setup = set_up(located(config))
        with memory_guard(self._setup, "a context on the device"):
            self._setup = _free_now(self._setup)
        opened = self._setup.checkpoint
        assert opened is not None
        config = self._setup.config
        self.config = replace(config, offload_model=_offload(config, self._setup, request))
        self.spec = config.spec
        self.device = torch.device(self._setup.device.name)
        self.dtype = DTYPES[self._setup.dtype]
        self.residents = Residents(self.config, self._setup, self.device)
        self.workspace = Workspace(self.device, self.residents.expert)
        self._settle_attention()
        mergers = {name: Merger(files) for name, files in self._setup.loras.items()}
        # tensors that are not the checkpoint's own, by expert
        self._merged = {name: mergers[name].targets if name in mergers else frozenset() for name in opened.experts}
        self.embeddings = self._embeddings(opened)
        self._seconds: dict[str, float] = {}
        guard = memory_guard(self._setup, f"weights of {opened.num_bytes / GIB:.2f} GiB as stored")
        with self._stage("load"), tf32_convolutions(False), guard:
            for merger in mergers.values():
                merger.check()
            self._load(opened, mergers, request, on_progress or _silent)

    @property
    def models(self) -> dict[str, nn.Module]:
        """By name: "text", "vae", "image", "audio" and the experts."""
        return self.residents.models

    def set_loras(self, loras: Sequence[str]) -> None:
        """Give the model other LoRAs: `PATH[:STRENGTH]`, as --lora takes them; none restores the checkpoint's own weights.

        Every tensor that changes is read from the checkpoint again, so that what comes is what a new engine would have, bit for
        bit, however often they were changed before.

        Raises:
            WanFastError: a LoRA cannot be read, or is not one for this model; all is as it was. What is broken off later leaves
                a mixed model, which refuses to run until this has been called again.
        """
        # what is no list is refused there
        config = replace(self.config, lora=tuple(loras) if isinstance(loras, (list, tuple)) else loras)  # type: ignore[arg-type]
        setup = with_loras(self._setup, config)
        mergers = {name: Merger(files) for name, files in setup.loras.items()}
        for merger in mergers.values():
            merger.check()
        opened = setup.checkpoint
        assert opened is not None
        self.workspace.kept, self._half_done = None, True
        with torch.inference_mode(), tf32_convolutions(False), memory_guard(self._setup, "a block's weights once more"):
            for name, part in opened.experts.items():
                targets = mergers[name].targets if name in mergers else frozenset()
                # should this be broken off, the next call mends it
                self._merged[name] |= targets
                reload(self.models[name], part, self._merged[name], merger=mergers.get(name), **self._held(name))
                self._merged[name] = targets
        self.config, self._setup, self._half_done = config, setup, False

    def plan(self, request: Request) -> Plan:
        """What `generate(request)` would do; needs no GPU time."""
        return plan(self.config, request, self._setup)

    def generate(
        self,
        request: Request,
        *,
        on_step: Callable[[Step], None] | None = None,
        on_progress: Progress | None = None,
        on_frames: Callable[[Tensor], None] | None = None,
        on_pixels: Callable[[Tensor], None] | None = None,
    ) -> Video:
        """Make one video.

        Args:
            request: what to show and how to sample it.
            on_step: called after each denoising step has been issued.
            on_progress: called with (stage, done, total).
            on_frames: called with each decoded chunk, [3, f, H, W] fp32 in [-1, 1], before it is rounded to 8 bits.
            on_pixels: called with each decoded chunk, [f, H, W, 3] uint8 on the CPU, while the next one is decoded, up to the
                end of the sound that drives them; the clip is then not collected, so that memory does not grow with its length.

        Raises:
            WanFastError: the request does not fit the task or the device.
        """
        todo = self.plan(request)
        progress = on_progress or _silent
        self._seconds = {"load": self._seconds["load"]}
        self.workspace.captured = {}
        self._reset_peak()
        # made outside inference mode, so that the caller may change it
        width, height = todo.request.size
        shown = todo.framing.shown or todo.request.num_frames
        frames = torch.empty(0 if on_pixels else shown, height, width, 3, dtype=torch.uint8)
        latents: list[Tensor] = []
        take, before = _first(shown, on_pixels or _into(frames)), None
        with self._running(todo):
            begun = self._begin(todo, progress)
            for segment in todo.framing.clips:
                conditioning, made = self._latents(todo, begun, segment, before, on_step, progress)
                made = made[:, todo.framing.leading :]
                latents.append(made.cpu().clone())
                with self._stage("decode"):
                    if conditioning.before is not None:
                        made = torch.cat([conditioning.before, made], dim=1)
                    before = self._decode(todo, segment, made, before, on_frames, take, progress)
        return Video(
            frames=frames,
            latents=torch.cat(latents, dim=1),
            fps=todo.request.fps,
            stats=self._stats(todo),
            sound=todo.framing.sound,
        )

    def latents(self, todo: Plan, *, on_progress: Progress | None = None) -> Tensor:
        """Carry out a plan of this engine's up to the final latents [C, T, H, W] fp32 on its device; of a chain those of its
        first clip."""
        progress = on_progress or _silent
        with self._running(todo):
            return self._latents(todo, self._begin(todo, progress), todo.framing.clips[0], None, None, progress)[1]

    @contextmanager
    def _running(self, todo: Plan) -> Iterator[None]:
        """What holds while a plan is carried out."""
        if self._half_done:
            raise WanFastError("changing LoRAs was broken off, and weights are mixed; call set_loras again")
        peaks = ", ".join(f"{stage} {count / GIB:.2f} GiB" for stage, count in todo.memory.peak.items())
        with (
            torch.inference_mode(),
            only_reference(self.config.kernels == "reference"),
            tf32_convolutions(todo.dtype == "bf16"),
            memory_guard(self._setup, f"peaks of {peaks}"),
        ):
            yield

    def _begin(self, todo: Plan, progress: Progress) -> tuple[Clips, Noise]:
        """What gives each clip what it is conditioned on, and its noise."""
        self.workspace.make_room(todo)
        with self._stage("prepare"):
            progress("prepare", 0, len(todo.framing.clips))
            return PREPARE[self.spec.kind](todo.request, todo.framing, self), self._noise(todo)

    def _latents(
        self,
        todo: Plan,
        begun: tuple[Clips, Noise],
        segment: Segment,
        before: Tensor | None,
        on_step: Callable[[Step], None] | None,
        progress: Progress,
    ) -> tuple[Conditioning, Tensor]:
        """What a clip is conditioned on, and its latents [C, T, H, W] fp32; `before` are the frames before it, where it is
        given any, [3, n, H, W] in [-1, 1]."""
        clips, noise = begun
        with self._stage("prepare"):
            conditioning = clips(segment, before)
            progress("prepare", segment.index + 1, len(todo.framing.clips))
        with self._stage("denoise"):
            return conditioning, self._denoise(todo, segment, conditioning, *noise(segment), on_step, progress)

    def encode_text(self, texts: Mapping[str, str]) -> Mapping[str, Tensor]:
        """Each text -> [S, text_dim], unpadded, on the engine's device; from the user's cache where it is there."""
        start, cache = time.perf_counter(), self.embeddings
        found: dict[str, Tensor] = {}
        for name, text in texts.items():
            embedding = cache.get(text) if cache else None
            if embedding is not None:
                found[name] = embedding.to(self.device)
        if missing := [name for name in texts if name not in found]:
            self.residents.load_text()
            with self.residents.at_work("text") as encoder:
                device = next(encoder.parameters()).device
                for name in missing:
                    embedding = encoder(self.tokenizer(texts[name]).to(device))
                    found[name] = embedding.to(self.device)
                    if cache:
                        cache.put(texts[name], embedding)
        self._text = {"seconds": time.perf_counter() - start, "texts": len(texts), "from_cache": len(texts) - len(missing)}
        return found

    def encode_image(self, pictures: Sequence[Tensor]) -> Tensor | None:
        """Pictures [3, H, W] fp32 in [-1, 1] -> their tokens [I, S, image_dim]; of a model that takes none, None."""
        if "image" not in self.models:
            return None
        with self.residents.at_work("image") as encoder:
            return torch.stack([encoder(picture.to(self.device)) for picture in pictures])

    def encode_audio(self, samples: Tensor) -> Tensor:
        """Sound [n] fp32 at 16 kHz -> all states of the audio encoder [layers, Ta, width] fp32, at 50 per second."""
        with self.residents.at_work("audio") as encoder, tf32_convolutions(False):
            return encoder(samples.to(self.device))

    def encode_video(self, chunks: Iterable[Tensor], num_frames: int) -> Tensor:
        """A clip in chunks [3, f, H, W] in [-1, 1], 1 frame and then multiples of 4 -> normalised latents [C, T, h, w] fp32."""
        with self.residents.at_work("vae") as vae:
            return vae.encode_stream(chunks, num_frames)

    def _denoise(
        self,
        todo: Plan,
        segment: Segment,
        conditioning: Conditioning,
        noise: Tensor,
        draw: Callable[[], Tensor],
        on_step: Callable[[Step], None] | None,
        progress: Progress,
    ) -> Tensor:
        workspace, steps = self.workspace, todo.steps
        clip = workspace.begin(todo, conditioning, noise, draw)
        done, total = segment.index * len(steps), len(todo.framing.clips) * len(steps)

        def report(step: Step) -> None:
            progress("denoise", done + step.index + 1, total)
            if on_step:
                on_step(step)

        progress("denoise", done, total)

        try:
            denoise(steps, clip.branches, clip.solver, run=clip.run, on_step=report)
            return clip.solver.latents if workspace.kept is None else clip.solver.latents.clone()
        except BaseException:
            workspace.kept = None  # its memory holds half a clip
            raise
        finally:
            self.residents.expert(None)
            workspace.note(clip.run, "steps")

    def _decode(
        self,
        todo: Plan,
        segment: Segment,
        latents: Tensor,
        before: Tensor | None,
        on_frames: Callable[[Tensor], None] | None,
        on_pixels: Callable[[Tensor], None],
        progress: Progress,
    ) -> Tensor | None:
        """Give on_pixels the frames [f, H, W, 3] uint8 of a clip, chunk by chunk. Returns the last frames [3, n, H, W] in
        [-1, 1] of what there is then, as many as the next clip is given; `before` are those before this one."""
        done, memory, history = segment.offset, todo.memory, todo.framing.history
        run = self.workspace.run(todo) if memory.decode_graphs else directly
        progress("decode", done, todo.request.num_frames)
        if on_frames or history:
            taken = _part(segment.skip, segment.count)

            def take(chunk: Tensor) -> None:
                nonlocal before
                chunk = chunk[:, taken(chunk.shape[1])]
                if on_frames and chunk.shape[1]:
                    on_frames(chunk)
                if history:
                    tail = chunk[:, -history:]
                    before = torch.cat([tail] if before is None else [before, tail], dim=1)[:, -history:].contiguous()

        with self.residents.at_work("vae") as vae:
            stream = vae.decode_stream(
                latents,
                chunk=memory.decode_chunk,
                piece=memory.decode_piece,
                tiles=memory.decode_tiles,
                rounding=self.spec.image_only,  # the official writers truncate video and round pictures
                on_frames=take if on_frames or history else None,
                run=None if run is directly else run,
            )
            kept = _part(segment.skip, segment.count)
            for pixels in on_the_host(stream):
                pixels = pixels[kept(pixels.shape[0])]
                if len(pixels):
                    on_pixels(pixels)
                done += pixels.shape[0]
                progress("decode", done, todo.request.num_frames)
        self.workspace.note(run, "decode")
        return before

    def _noise(self, todo: Plan) -> Noise:
        """Per clip the noise to start from [C, T, H, W], and what draws more of it."""
        sampler, (C, T, H, W), trailing = sampler_of(todo.request), todo.latent_shape, todo.framing.trailing
        generator = torch.Generator(self.device).manual_seed(todo.request.seed)
        dtype = torch.bfloat16 if self.spec.seed_per_clip else torch.float32

        def drawn() -> Tensor:
            whole = torch.randn(C, T + trailing, H, W, generator=generator, device=self.device, dtype=dtype)
            return whole[:, :T] if trailing else whole

        def draw() -> Tensor:
            if sampler.time_first:
                return torch.randn(T, C, H, W, generator=generator, device=self.device).transpose(0, 1)
            return drawn()

        def noise(segment: Segment) -> tuple[Tensor, Callable[[], Tensor]]:
            if self.spec.seed_per_clip:
                generator.manual_seed(todo.request.seed + segment.index)
            first = drawn().float()
            if todo.request.noise is not None:
                from safetensors.torch import load_file

                first = load_file(todo.request.noise)[todo.framing.noises[segment.index]].float().to(self.device)
            return first * sampler.start, draw

        return noise

    def _settle_attention(self) -> None:
        """Take the planned backends if they run, else the next that may stand for them; the plan then says so."""
        self._attention: Attention = sdpa
        self._attention_8bit: Projected | None = None
        opened, config = self._setup.checkpoint, self.config
        assert opened is not None
        expert = next(iter(opened.experts.values()))
        dims = manifest.DiTDims.of_shapes(expert.shapes, expert.config)
        narrow = config.attention in ATTENTION_8BIT
        if self.device.type == "cuda":
            self._attention = self._settle("attention", "auto" if narrow else config.attention, dims)
        if narrow:
            with torch.inference_mode(), only_reference(config.kernels == "reference"):
                self._attention_8bit = self._settle(IN_8_BITS, config.attention, dims)

    def _settle(self, op: str, asked: str, dims: manifest.DiTDims) -> Any:
        """The attention of `asked` that runs."""
        config = self.config
        capability, skip = self._setup.device.capability or (0, 0), config.skip_softmax
        rows = choose(asked, capability, self._setup.dtype, dims.head_dim)
        row, attention, failures = first_that_runs(
            rows, self.device, self.dtype, dims.num_heads, dims.head_dim, skip, config.kernels
        )
        logging.getLogger(__name__).info("%s: %s", op, "; ".join([*failures, row.name]))
        if failures:
            settled = [
                replace(choice, backend=row.name, why="; ".join(failures)) if choice.op == op else choice
                for choice in self._setup.kernels
            ]
            self._setup = replace(self._setup, kernels=tuple(settled))
        return attention

    def _load(
        self, opened: checkpoints.Checkpoint, mergers: Mapping[str, Merger], request: Request | None, progress: Progress
    ) -> None:
        config = self.config
        assert opened.text_encoder is not None and opened.tokenizer is not None
        from_cache = self._has_embeddings(request)
        total, done = opened.num_bytes - from_cache * opened.text_encoder.num_bytes, 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress("load", done, total)

        progress("load", 0, total)
        dims = {name: manifest.DiTDims.of_shapes(part.shapes, part.config) for name, part in opened.experts.items()}
        self.tokenizer = Tokenizer(opened.tokenizer, min(d.text_len for d in dims.values()))
        if not from_cache:
            self.residents.load_text(report)
        self.residents.load(report)
        for name, part in opened.experts.items():
            self.models[name] = load_model(
                partial(WanDiT, dims[name], self._attention, self._attention_8bit, config.keep_blocks or 0),
                part,
                self.residents.home,
                merger=mergers.get(name),
                report=report,
                **self._held(name),
            )

    def _held(self, expert: str) -> dict[str, Any]:
        """How the tensors of an expert are brought into the model."""
        return {
            "dtype": lambda name: torch.float32 if manifest.stays_fp32(name) else self.dtype,
            "forms": self._setup.forms.get(expert, {}),
            "through": torch.bfloat16 if self.config.convert_model_dtype else None,
            "work_on": self.device,
        }

    def _embeddings(self, opened: checkpoints.Checkpoint) -> Embeddings | None:
        """The cache of prompts' embeddings, unless it is not wanted."""
        if self.config.no_cache:
            return None
        assert opened.text_encoder is not None and opened.tokenizer is not None
        on = "cpu" if self.config.t5_cpu else self.device.type
        limit = min(manifest.DiTDims.of_shapes(part.shapes, part.config).text_len for part in opened.experts.values())
        return Embeddings(opened.text_encoder, opened.tokenizer, f"{self._setup.dtype} {on}, up to {limit} tokens")

    def _has_embeddings(self, request: Request | None) -> bool:
        """Whether the request's texts are in the cache, so that the encoder is not needed."""
        if request is None or self.embeddings is None:
            return False
        return all(self.embeddings.has(text) for text in texts_of(self.plan(request).request).values())

    # --- accounts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with record_function(name):  # a mark in the trace of --profile
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _stats(self, todo: Plan) -> dict[str, Any]:
        return {
            "seconds": dict(self._seconds),
            "text": dict(self._text),
            "graphs": dict(self.workspace.captured),
            "peak_bytes": peak_bytes(self.device),
            "plan": todo.to_dict(),
        }


def _first(count: int, on_pixels: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Gives on_pixels no more than so many frames [f, H, W, 3]."""
    part = _part(0, count)

    def take(pixels: Tensor) -> None:
        if len(kept := pixels[part(len(pixels))]):
            on_pixels(kept)

    return take


def _part(skip: int, count: int) -> Callable[[int], slice]:
    """Of chunks that follow each other, given by their lengths, what of each is within `count` behind the first `skip`."""
    place = 0

    def part(length: int) -> slice:
        nonlocal place
        first, last = skip - place, skip + count - place
        place += length
        return slice(max(first, 0), max(min(last, length), 0))

    return part


def _into(frames: Tensor) -> Callable[[Tensor], None]:
    """Fills frames [F, H, W, 3] with what it is given."""
    done = 0

    def add(pixels: Tensor) -> None:
        nonlocal done
        frames[done : done + pixels.shape[0]] = pixels
        done += pixels.shape[0]

    return add


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _free_now(setup: Setup) -> Setup:
    """The setup with what is really free on the GPU, now that torch can ask."""
    if setup.device.type == "cpu":
        return setup
    free, _ = torch.cuda.mem_get_info(setup.device.name)
    # the libraries' workspaces are still to come
    return replace(setup, device=replace(setup.device, free=min(setup.device.free, free - GIB // 2)))


def _offload(config: EngineConfig, setup: Setup, request: Request | None) -> bool:
    """As configured; where that is left open, whether the request, or the task's default one, does not fit without."""
    if setup.device.type == "cpu" or config.offload_model is not None:
        return bool(config.offload_model) and setup.device.type != "cpu"
    if request is not None:
        return plan(config, request, setup).memory.offload
    usual = example(config.spec)
    if not usual:  # what drives it is not known: a clip takes some of the rest
        weights = model_weights(config, Models.of(config.spec, setup.checkpoint), setup)
        return sum(weights.values()) > 0.8 * (config.vram if config.vram is not None else setup.device.free)
    try:
        return plan(config, Request(**usual), setup).memory.offload
    except WanFastError:  # not even with it: a smaller request may
        return True
