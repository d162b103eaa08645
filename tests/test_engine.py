import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from models import official_grid, relative_error, write_native
from safetensors.torch import save_file

import wan_fast
import wan_fast.engine as engine_module
from bench.quality import emulated
from wan_fast import Engine, EngineConfig, Request, WanFastError
from wan_fast.checkpoint import locate
from wan_fast.device import named
from wan_fast.engine import DTYPES
from wan_fast.examples import example
from wan_fast.kernels import _op
from wan_fast.setup import set_up
from wan_fast.tasks import TASKS

PROMPT = "A red ball &amp; its shadow  bounce"
TINY = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="fp32")
SMALL = Request(prompt=PROMPT, size=(64, 96), num_frames=9, num_steps=3, seed=3)


@pytest.fixture(scope="module")
def engine():
    return Engine(TINY)


def generate(engine, request):
    """(video, frames before rounding)."""
    chunks = []
    video = engine.generate(request, on_frames=chunks.append)
    return video, torch.cat(chunks, dim=1)


def test_what_comes_out(engine, tmp_path):
    steps, stages = [], []
    video = engine.generate(SMALL, on_step=steps.append, on_progress=lambda *report: stages.append(report))
    assert video.frames.shape == (9, 96, 64, 3) and video.frames.dtype == torch.uint8
    assert video.latents.shape == (48, 3, 6, 4) and video.latents.dtype == torch.float32
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert ("denoise", 3, 3) in stages and ("decode", 9, 9) in stages
    assert set(video.stats["seconds"]) == {"load", "prepare", "denoise", "decode"} and video.stats["peak_bytes"] > 0
    json.dumps(video.stats, default=str)
    assert video.save(tmp_path / "x.mp4").stat().st_size > 0
    with pytest.raises(WanFastError, match=r"x\.png"):
        video.save(tmp_path / "x.png")


def test_pixels_are_handed_over_as_they_come(engine):
    request, parts = replace(SMALL, num_frames=17, num_steps=1), []
    whole = engine.generate(request)
    video = engine.generate(request, on_pixels=parts.append)
    assert video.frames.shape == (0, 96, 64, 3) and len(parts) > 2
    with pytest.raises(WanFastError, match=r"no frames to save as 'x\.mp4': on_pixels took them"):
        video.save("x.mp4")
    assert torch.equal(torch.cat(parts), whole.frames) and torch.equal(video.latents, whole.latents)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_vae_has_a_dtype_of_its_own(engine, dtype):
    halved = Engine(replace(TINY, vae_dtype=dtype))
    assert {p.dtype for p in halved.models["vae"].parameters()} == {DTYPES[dtype]}
    small = replace(SMALL, size=(32, 32), num_frames=1, num_steps=1)
    video, exact = halved.generate(small), engine.generate(small)
    assert torch.equal(video.latents, exact.latents)
    assert 0 < (video.frames.int() - exact.frames.int()).abs().max() < 12


def test_strips_give_the_same_clip(engine, monkeypatch):
    whole = engine.generate(SMALL)
    settled = engine.plan(SMALL)
    strips = replace(settled, memory=replace(settled.memory, decode_chunk=1, decode_piece=1, decode_tiles=3))
    monkeypatch.setattr(engine, "plan", lambda request: strips)
    assert (engine.generate(SMALL).frames.int() - whole.frames.int()).abs().max() <= 1


def test_latents_that_are_not_finite_are_refused(engine, monkeypatch):
    monkeypatch.setattr("wan_fast.engine.denoise", lambda steps, _, solver, **__: solver.latents.fill_(float("nan")))
    with pytest.raises(WanFastError, match="latents are NaN or infinite, so there is no picture to decode"):
        engine.generate(SMALL)


def test_the_caller_may_change_what_came_out(engine):
    video = engine.generate(SMALL)
    video.frames[0] = 0
    video.latents.mul_(2)


def test_an_engine_is_built_even_where_the_default_request_does_not_fit(tmp_path):
    """150 MiB hold this small request, not the task's own 832x480 or 81 frames."""
    config = EngineConfig(task="t2v-1.3B", checkpoint=str(write_native(tmp_path, "t2v-1.3B")), device="cpu", vram=150 * 2**20)
    with pytest.raises(WanFastError, match="out of memory by plan"):
        wan_fast.plan(config, Request(prompt="a"))
    assert len(Engine(config).generate(Request(prompt="a", size=(32, 32), num_frames=5, num_steps=1)).frames) == 5


def test_the_seed_decides(engine):
    one, two, other = (engine.generate(replace(SMALL, seed=seed)).latents for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_the_seed_is_drawn_as_officially(engine, tmp_path):
    """Without a batch dimension, fp32, from a generator of the device."""
    noise = torch.randn(48, 3, 6, 4, generator=torch.Generator().manual_seed(3))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    from_file = engine.generate(replace(SMALL, seed=None, noise=str(tmp_path / "noise.safetensors")))
    assert torch.equal(from_file.latents, engine.generate(SMALL).latents)


def test_frames_are_the_truncated_pixels(engine):
    video, frames = generate(engine, SMALL)
    assert frames.shape == (3, 9, 96, 64) and frames.abs().max() <= 1
    assert torch.equal(video.frames, ((frames + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tf32_only_in_the_convolutions_of_bf16_runs(engine, dtype, monkeypatch):
    seen = []
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    monkeypatch.setattr(engine, "_setup", replace(engine._setup, dtype=dtype))
    engine.generate(
        SMALL,
        on_frames=lambda chunk: seen.append(
            (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.enabled)
        ),
    )
    assert set(seen) == {(dtype == "bf16", False, before[1])}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_reference_kernels_run_where_they_are_asked_for(kernels):
    seen = []
    Engine(replace(TINY, kernels=kernels)).generate(
        SMALL,
        on_step=lambda step: seen.append(_op._only_reference.get()),
        on_frames=lambda chunk: seen.append(_op._only_reference.get()),
    )
    assert set(seen) == {kernels == "reference"} and not _op._only_reference.get()


def test_the_backend_that_runs_is_the_one_that_the_plan_names(monkeypatch, caplog):
    """Where the planned one does not, the next one is taken, and said."""
    import wan_fast.engine as module

    def other(q, k, v):
        raise AssertionError("only named")

    monkeypatch.setattr(module, "sdpa", other)
    engine = Engine(TINY)
    assert all(block.cross_attn.attention is other for block in engine.models["model"].blocks)
    with pytest.raises(AssertionError, match="only named"):
        engine.generate(SMALL)
    # as on a Hopper without flash-attn, whose cuDNN refuses
    hopper = replace(engine._setup.device, name="cuda:0", capability=(9, 0))
    monkeypatch.setattr(engine, "_setup", replace(engine._setup, device=hopper, dtype="bf16"))
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    tried = []

    def first_that_runs(rows, *args):
        tried.extend(row.name for row in rows)
        return rows[1], other, ["sdpa cudnn does not run here: no"]

    monkeypatch.setattr(module, "first_that_runs", first_that_runs)
    with caplog.at_level("INFO"):
        engine._settle_attention()
    assert tried[0] == "sdpa cudnn" and engine._attention is other
    assert (engine._setup.kernels[0].backend, engine._setup.kernels[0].why) == (tried[1], "sdpa cudnn does not run here: no")
    assert f"attention: sdpa cudnn does not run here: no; {tried[1]}" in caplog.text


def test_exact_attention_stays_beside_that_in_8_bits(monkeypatch):
    """On a Hopper: text, and what is kept, take what "auto" takes."""
    import wan_fast.engine as module

    engine = Engine(TINY)
    hopper = replace(engine._setup.device, name="cuda:0", capability=(9, 0))
    monkeypatch.setattr(engine, "_setup", replace(engine._setup, device=hopper, dtype="bf16"))
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    monkeypatch.setattr(engine, "config", replace(engine.config, attention="int8", skip_softmax=0.1))
    asked = []

    def first_that_runs(rows, *args):
        asked.append(([row.name for row in rows], args[-2:]))
        return rows[0], rows[0].name, []

    monkeypatch.setattr(module, "first_that_runs", first_that_runs)
    engine._settle_attention()
    assert (engine._attention, engine._attention_8bit) == ("sdpa cudnn", "int8 triton")
    assert asked[1] == (["int8 triton"], (0.1, "auto")) and asked[0][0][0] == "sdpa cudnn"


def test_attention_in_8_bits_runs_where_the_plan_says(monkeypatch, tmp_path):
    """On a CPU by the references: which steps and blocks take it, and that the clip stays near the exact one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with emulated():
        engine = Engine(replace(TINY, attention="int8", keep_steps=(1, 0), keep_blocks=2, skip_softmax=1e-6))
        assert engine._attention_8bit.skip == 1e-6
        calls = []
        for i, block in enumerate(engine.models["model"].blocks):
            layer = block.self_attn
            for name in ("attention", "in_8_bits"):
                inner = getattr(layer, name)
                if inner is not None:
                    monkeypatch.setattr(layer, name, lambda *a, i=i, n=name, f=inner, **k: calls.append((i, n)) or f(*a, **k))
        near = engine.generate(SMALL)
        exact = Engine(TINY).generate(SMALL)
    of_step = [calls[start : start + 12] for start in range(0, 36, 12)]
    assert len(calls) == 36 and [name for _, name in of_step[0]] == ["attention"] * 12
    for step in of_step[1:]:
        assert [i for i, name in step if name == "in_8_bits"] == [2, 3] * 2
    assert [step["attention"] for step in near.stats["plan"]["steps"]] == ["exact", "8-bit", "8-bit"]
    assert 0 < relative_error(near.latents, exact.latents) < 0.1
    assert json.loads((tmp_path / "wan-fast" / "self-tests.json").read_text())


def test_bf16_stays_near_fp32(engine):
    exact = engine.generate(SMALL).latents
    rounded = Engine(replace(TINY, dtype="bf16")).generate(SMALL).latents
    assert 1e-4 < relative_error(rounded, exact) < 0.1


def test_convert_model_dtype_rounds_every_weight_of_the_dit(tmp_path):
    config = EngineConfig(task="t2v-1.3B", checkpoint=str(write_native(tmp_path, "t2v-1.3B")), device="cpu")
    plain, rounded = Engine(config), Engine(replace(config, convert_model_dtype=True))
    for (name, a), b in zip(plain.models["model"].named_parameters(), rounded.models["model"].parameters(), strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b), name
    assert torch.equal(plain.models["vae"].conv1.weight, rounded.models["vae"].conv1.weight)


@pytest.mark.parametrize(
    ("task", "moves"),
    [
        ("t2v-A14B", [["text"], ["high_noise"], ["low_noise"], ["vae"]]),
        ("i2v-14B", [["vae"], ["text"], ["image"], ["model"], ["vae"]]),
    ],
)
def test_offload_keeps_one_model_on_the_device(task, moves, tmp_path, monkeypatch):
    """Moves are recorded where they would happen; the picture stays the same."""
    folder = write_native(tmp_path, task)
    config = EngineConfig(task=task, checkpoint=str(folder), device="cpu", no_cache=True)
    given = {**example(TASKS[task]), "prompt": "a cat"}
    request = Request(**given, size=(32, 48), num_frames=5, num_steps=4, seed=0)
    engine = Engine(config)
    expected = engine.generate(request).latents
    names = {id(model): name for name, model in engine.models.items()}
    on_device, trace = set(), []

    def to(self, place):
        if id(self) in names:
            (on_device.discard if str(place) == "cpu" else on_device.add)(names[id(self)])
            trace.append(sorted(on_device))
        return self

    monkeypatch.setattr(torch.nn.Module, "to", to)
    engine.residents.config = replace(engine.config, offload_model=True)
    engine.residents.device = torch.device("cpu:0")  # another spelling of the same device, to tell moves apart
    assert torch.equal(engine.generate(request).latents, expected)
    assert max(map(len, trace)) == 1
    assert [t for t in trace if t] == moves and not on_device


@pytest.mark.parametrize("task", TASKS)
def test_an_engine_that_knows_no_request_is_placed_for_the_tasks_own(task):
    """On a card that holds all models, without the pictures that a request would bring."""
    config = EngineConfig(task=task, vram=2**60)
    assert engine_module._offload(config, set_up(replace(config, device="cpu"), named("h200")), None) is False
    tight = replace(config, vram=40 * 2**30)
    assert engine_module._offload(tight, set_up(replace(tight, device="cpu"), named("h200")), None) is ("14B" in task)


# --- against diffusers ----------------------------------------------------------------------------------------------------


def run_diffusers(pipe, request, shift, **options):
    pipe.set_progress_bar_config(disable=True)
    width, height = request.size
    frames = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or TASKS["ti2v-5B"].negative_prompt,
        width=width,
        height=height,
        num_frames=request.num_frames,
        num_inference_steps=request.num_steps,
        output_type="pt",
        **options,
    ).frames[0]
    return frames.float().transpose(0, 1) * 2 - 1


@pytest.mark.parametrize("image", [False, True])
def test_ti2v_equals_diffusers(engine, image, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from PIL import Image

    kind = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    pipe = kind.from_pretrained(locate("tiny", TASKS["ti2v-5B"]), torch_dtype=torch.float32)
    pipe.scheduler = official_grid(3, 5.0)
    noise = torch.randn(48, 3, 6, 4, generator=torch.Generator().manual_seed(3))
    options, request = {}, SMALL
    if image:
        picture = Image.effect_noise(SMALL.size, 60).convert("RGB")
        picture.save(tmp_path / "x.png")
        options["image"], request = picture, replace(SMALL, image=str(tmp_path / "x.png"))
    expected = run_diffusers(pipe, request, 5.0, latents=noise[None], guidance_scale=5.0, **options)
    _, frames = generate(engine, request)
    assert relative_error(frames, expected) < 1e-4


def test_two_experts_equal_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    tiny = locate("tiny", TASKS["ti2v-5B"])
    torch.manual_seed(5)
    dit = dict(num_attention_heads=1, text_dim=64, ffn_dim=160, num_layers=2, cross_attn_norm=True)
    base = diffusers.WanPipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    pipe = diffusers.WanPipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=diffusers.AutoencoderKLWan(base_dim=8),
        scheduler=official_grid(6, 12.0),
        transformer=diffusers.WanTransformer3DModel(**dit),
        transformer_2=diffusers.WanTransformer3DModel(**dit),
        boundary_ratio=0.875,
    )
    pipe.save_pretrained(tmp_path)
    request = Request(prompt=PROMPT, negative_prompt="blurry", size=(48, 32), num_frames=5, num_steps=6, seed=3)
    noise = torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = run_diffusers(pipe, request, 12.0, latents=noise[None], guidance_scale=4.0, guidance_scale_2=3.0)
    engine = Engine(EngineConfig(task="t2v-A14B", checkpoint=str(tmp_path), device="cpu"))
    _, frames = generate(engine, request)
    assert {step.expert for step in engine.plan(request).steps} == {"high_noise", "low_noise"}
    assert relative_error(frames, expected) < 1e-4


def test_t2i_makes_one_rounded_picture(tmp_path):
    engine = Engine(EngineConfig(task="t2i-14B", checkpoint=str(write_native(tmp_path, "t2i-14B")), device="cpu"))
    video, frames = generate(engine, Request(prompt="a cat", size=(64, 48), num_steps=2, seed=0))
    assert torch.equal(video.frames, ((frames + 1) / 2 * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0))
    assert video.save(tmp_path / "x.png").is_file()


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_is_told_with_the_plans_numbers(engine, error, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(wan_fast.engine, "denoise", refuse)
    with pytest.raises(WanFastError, match=r"out of memory on cpu: the plan expected peaks of text [\d.]+ GiB"):
        engine.generate(SMALL)


def test_other_errors_stay_what_they_are(engine, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(wan_fast.engine, "denoise", refuse)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.generate(SMALL)


def test_real_exhaustion_of_the_host(tmp_path):
    """The allocator really says no: the address space is capped below what the decode needs."""
    code = f"""
import resource, sys
from wan_fast import cli, planning
import torch, transformers.models.umt5.modeling_umt5, av
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
sys.exit(cli.main("run --task ti2v-5B --ckpt_dir tiny --prompt x --size 1024x1024 --frame_num 5 --sample_steps 1 "
    "--quiet --save_file {tmp_path}/x.mp4".split()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory on cpu: the plan expected peaks" in done.stderr
    assert not list(tmp_path.iterdir())
