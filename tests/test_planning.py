import json
from dataclasses import replace
from importlib import import_module
from math import prod

import pytest
import torch
from meter import peak_bytes
from models import write_native
from PIL import Image
from safetensors.torch import save_file

from wan_fast import manifest, memory, planning
from wan_fast.attention import Attention8bit
from wan_fast.backends import FUSED, FUSED_8BIT, IN_8_BITS, OF_ATTENTION
from wan_fast.conditioning.image import grey_but_for
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.device import Device, describe
from wan_fast.dit import WanDiT, grid_of
from wan_fast.encoders import AudioEncoder
from wan_fast.engine import Engine
from wan_fast.inputs import Inputs
from wan_fast.kernels import KERNELS
from wan_fast.manifest import DiTDims, VaeDims, dit_shapes, stays_fp32
from wan_fast.planning import plan
from wan_fast.quantize import QuantizedLinear, swap
from wan_fast.schemes import linear_of, quantized_at_load
from wan_fast.tasks import TASKS, VAES
from wan_fast.vae import WanVAE, windows

GIB = 2**30
FIVE = EngineConfig(task="ti2v-5B", checkpoint="nobody/nothing-here")
CAT = Request(prompt="a cat", seed=0)


def test_the_released_model_on_a_large_gpu(gpu):
    gpu(80)
    todo = plan(FIVE, CAT)
    assert todo.dtype == "bf16" and not todo.memory.offload and todo.checkpoint is None
    assert todo.tokens == 27280 and todo.latent_shape == (48, 31, 44, 80)
    assert todo.memory.weights["text encoder"] == 2 * 5_680_910_336
    assert todo.memory.weights["VAE"] == 2 * 704_688_668
    assert sum(todo.flops.values()) == pytest.approx(53.7e15, rel=0.01)  # 51.7 of denoising, 2.0 of decoding
    assert todo.seconds_at_least == pytest.approx(54.3, abs=0.3)
    json.dumps(todo.to_dict(), default=str)


def test_offload_only_where_it_must(gpu):
    gpu(24)
    todo = plan(FIVE, CAT)
    assert todo.memory.offload and max(todo.memory.peak.values()) <= 24 * GIB
    gpu(80)
    assert plan(replace(FIVE, vram=24 * GIB), CAT).memory.offload
    assert not plan(replace(FIVE, offload_model=False), CAT).memory.offload
    assert plan(replace(FIVE, offload_model=True), CAT).memory.offload


def test_linears_in_8_bits_take_less_memory_and_time(gpu):
    gpu(80)
    plain, narrow = (plan(replace(FIVE, precision=precision), CAT) for precision in ("auto", "fp8"))
    dims = DiTDims.of_task(TASKS["ti2v-5B"])
    shapes = dit_shapes(dims)
    held = {n: s for n, s in shapes.items() if linear_of(n) and 2 <= int(n.split(".")[1]) < 28}
    saved = sum(prod(s) - 4 * s[0] for s in held.values())
    assert plain.memory.weights["DiT"] - narrow.memory.weights["DiT"] == saved
    assert narrow.flops == plain.flops and sum(plain.flops_8bit.values()) == 0
    # they run at twice the rate
    faster = plain.seconds_at_least - narrow.seconds_at_least
    assert faster == pytest.approx(narrow.flops_8bit["fp8"] / 2 / (narrow.device.peak_tflops * 1e12))
    assert "blocks 0-1, 28-29 are not" in narrow.linears
    added = {k.op for k in narrow.kernels} - {k.op for k in plain.kernels}
    assert added == {*FUSED_8BIT} - {"gemm_8bit_add", "gemm_8bit_gelu"}
    by_block = plan(replace(FIVE, precision="fp8", scaling="block"), CAT)
    assert {k.op for k in by_block.kernels} - {k.op for k in plain.kernels} == {*FUSED_8BIT} - {
        "gemm_8bit_add",
        "gelu_tanh_quantized",
    }


@pytest.mark.parametrize(
    ("model", "fp8", "int8"),
    [
        ("NVIDIA H200", 2 * 989, 2 * 989),
        ("NVIDIA GeForce RTX 4090", 2 * 165, 4 * 165),
        ("NVIDIA L40S", 2 * 362, 2 * 362),
        ("NVIDIA No Such", None, None),
    ],
)
def test_peaks_in_8_bits_are_those_of_the_data_sheets(model, fp8, int8):
    device = Device(name="cuda:0", model=model, memory=0, free=0)
    assert (device.peak_tops("fp8"), device.peak_tops("int8")) == (fp8, int8)


def test_refuses_with_numbers_and_ways_out(gpu):
    gpu(8)
    with pytest.raises(WanFastError, match=r"stage denoise needs [\d.]+ GiB .* budget is 8.00 GiB; take a smaller --size"):
        plan(FIVE, CAT)
    with pytest.raises(WanFastError, match=r"stage text needs [\d.]+ GiB .* budget is 8.00 GiB; add --t5_cpu"):
        plan(FIVE, replace(CAT, size=(320, 320), num_frames=17))
    gpu(16)
    with pytest.raises(WanFastError, match="leave out --offload_model False"):
        plan(replace(FIVE, offload_model=False), CAT)


def test_weights_are_those_that_get_loaded(tmp_path):
    for task, dtype in (("ti2v-5B", "fp32"), ("t2v-A14B", "bf16")):
        folder = tmp_path / task
        folder.mkdir()
        config = EngineConfig(task=task, checkpoint=str(write_native(folder, task)), device="cpu", dtype=dtype)
        engine = Engine(config)
        request = Request(prompt="a", size=(64, 64), num_frames=5)
        labels = {
            "text": "text encoder",
            "vae": "VAE",
            "model": "DiT",
            "high_noise": "DiT high_noise",
            "low_noise": "DiT low_noise",
        }
        loaded = {labels[n]: sum(p.nbytes for p in m.parameters()) for n, m in engine.models.items()}
        assert dict(plan(config, request).memory.weights) == loaded


@pytest.mark.parametrize("task", ["t2v-1.3B", "ti2v-5B", "t2v-14B", "i2v-14B", "vace-1.3B", "s2v-14B", "animate-14B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", ["", "row", "block"])
def test_denoising_memory_is_what_the_model_takes(task, dtype, scaling, attention=None):
    """Run on meta at the real size: the prediction is at most a fifth above what is alive at once, and never below."""
    spec = TASKS[task]
    shape = spec.vae_spec.latent_shape(spec.default_size, spec.num_frames)
    dims = replace(DiTDims.of_task(spec), num_layers=2, vace_layers=spec.vace_layers and (0,))
    for name in {"speech", "face"} & {spec.extension}:
        dims = replace(dims, **{name: replace(getattr(dims, name), layers=(0, 1))})
    with torch.device("meta"):
        model = WanDiT(dims, in_8_bits=attention).requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_fp32(name) else dtype)
        forms = quantized_at_load(dit_shapes(dims), "fp8", scaling, 0) if scaling else {}
        swap(model, forms)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.bias = module.bias.to(dtype)
        x = torch.empty(1, *shape)

        def step():
            text, inputs = [torch.empty(20, dims.text_dim)], Inputs.blank(dims, shape)
            context = model.prepare(text, grid_of(x.shape), inputs)
            other = model.prepare(text, grid_of(x.shape), like=context)  # of the other branch
            model(x, torch.empty(1, 1), context, in_8_bits=bool(attention))
            return other

        measured = peak_bytes(step)
    size = 2 if dtype == torch.bfloat16 else 4
    tokens = prod(grid_of(shape)) + sum(extension.extra_tokens(shape, first=False) for extension in dims.extensions)
    predicted = memory._denoise_bytes({"model": dims}, shape, tokens, size, True, {"model": forms}, bool(attention), 2)
    predicted += memory._inputs_bytes(spec, {"model": dims}, shape, tokens, size, {"model"})
    assert measured <= predicted <= 1.2 * measured


@pytest.mark.parametrize("task", ["t2v-1.3B", "ti2v-5B", "t2v-14B"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_memory_of_attention_in_8_bits(task, precision):
    attention = Attention8bit(precision)
    test_denoising_memory_is_what_the_model_takes(task, torch.bfloat16, "row", attention)
    test_denoising_memory_is_what_the_model_takes(task, torch.float32, "", attention)


@pytest.mark.parametrize(("version", "latents"), [("2.1", (16, 9, 60, 104)), ("2.2", (48, 9, 44, 80))])
@pytest.mark.parametrize("decode", [(1, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (2, 8, 1), (1, 1, 2), (1, 2, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_memory_is_what_the_vae_takes(version, latents, decode, dtype):
    dims = VaeDims.of_spec(VAES[version])
    chunk, piece, tiles = decode
    with torch.device("meta"):
        vae = WanVAE(dims).requires_grad_(False).to(dtype)
        z = torch.empty(latents)

        def decode_all():
            if tiles == 1:
                for _ in vae.decode_stream(z, chunk=chunk, piece=piece):
                    pass
                return
            with torch.no_grad():  # what is on the device: the assembled clip is not
                for _ in vae._decode(z, chunk, piece, windows(*latents[2:], tiles)[1]):
                    pass

        measured = peak_bytes(decode_all)
    assert measured <= memory._decode_bytes(dims, latents, *decode, dtype.itemsize, fused=True) <= 1.2 * measured


@pytest.mark.parametrize("seconds", [2, 60, 600])
def test_hearing_takes_memory_in_proportion_to_the_sound(seconds):
    with torch.device("meta"):
        encoder = AudioEncoder(manifest.AUDIO).requires_grad_(False)
        sound = torch.empty(16000 * seconds)
    measured = peak_bytes(lambda: encoder(sound))
    assert measured <= memory._audio_bytes(manifest.AUDIO, 16000 * seconds) <= 2.5 * measured


@pytest.mark.parametrize(
    ("task", "stage", "says"),
    [
        ("s2v-14B", "denoise", "take a smaller --size or --infer_frames"),
        ("s2v-14B", "audio", "shorten --audio"),
        ("animate-14B", "denoise", "take a smaller --frame_num"),
        ("t2v-14B", "denoise", "take a smaller --size or --frame_num"),
    ],
)
def test_advice_names_options_that_the_task_has(task, stage, says):
    assert memory._advice(EngineConfig(task=task), describe("cpu"), "bf16", stage).startswith(says)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(("version", "latents"), [("2.1", (16, 5, 60, 104)), ("2.2", (48, 5, 44, 80))])
def test_encoding_memory_is_what_the_vae_takes(version, latents, frames):
    dims = VaeDims.of_spec(VAES[version])
    with torch.device("meta"):
        vae = WanVAE(dims).requires_grad_(False)
        length = 1 if frames == 1 else 4 * latents[1] - 3
        video = torch.empty(3, length, latents[2] * vae.spec.stride[1], latents[3] * vae.spec.stride[2])
        measured = peak_bytes(lambda: vae.encode(video))
    assert measured <= memory._encode_bytes(dims, latents, 4, fused=True, frames=frames) <= 1.3 * measured


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_encoding_a_longer_clip_of_grey_takes_no_more_memory(version):
    with torch.device("meta"):
        vae = WanVAE(VaeDims.of_spec(VAES[version])).requires_grad_(False)
        picture = torch.empty(3, 64, 64)

    def encode(num_frames):
        return vae.encode_stream(grey_but_for({0: picture}, num_frames), num_frames)

    short, long = (peak_bytes(lambda frames=frames: encode(frames)) for frames in (161, 401))
    latents = 4 * vae.channels * 8 * 8 * (401 - 161) // 4  # which are what is made
    assert long <= short + 2 * latents


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 64], ids=["narrow", "wide"])
def test_memory_of_the_references_is_within_the_plan(version, dtype, width, monkeypatch):
    """On a CPU, where their bodies are called so that what they hold is seen."""
    for module, op, body in (
        ("causal_conv3d", "_op", "_reference"),
        ("causal_conv3d", "_op_add", "_reference_add"),
        ("rms_norm_silu", "_op", "_reference"),
        ("rms_norm_silu", "_op_inplace", "_reference_inplace"),
        ("frames_to_uint8", "_op", "_reference"),
    ):
        module = import_module(f"wan_fast.kernels.{module}")
        monkeypatch.setattr(module, op, getattr(module, body))
    dims = VaeDims(version=version, encoder_dim=width, decoder_dim=width, channels=VAES[version].channels)
    with torch.device("meta"):
        vae = WanVAE(dims).requires_grad_(False).to(dtype)
    vae.to_empty(device="cpu")
    for parameter in vae.parameters():
        parameter.zero_()
    # of the wide one the two upper levels are large enough for every form of the convolutions
    latents = torch.randn(dims.channels, 3, 4, 6)
    for chunk, piece in ((2, 8), (1, 4), (1, 1)):
        measured = peak_bytes(
            lambda chunk=chunk, piece=piece: list(map(len, vae.decode_stream(latents, chunk=chunk, piece=piece)))
        )
        planned = memory._decode_bytes(dims, latents.shape, chunk, piece, 1, dtype.itemsize, fused=False)
        assert measured <= planned <= 1.6 * measured, (chunk, piece)
    for frames, length in ((1, 1), (4, 9)):
        clip = torch.rand(3, length, *(side * vae.spec.stride[1] for side in latents.shape[2:]))
        measured = peak_bytes(lambda clip=clip: vae.encode(clip))
        planned = memory._encode_bytes(dims, latents.shape, dtype.itemsize, fused=False, frames=frames)
        assert measured <= planned <= 1.6 * measured, frames


def test_a_tiny_budget_decodes_in_strips_and_says_what_they_cost():
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
    request = Request(prompt="x", size=(512, 512), num_frames=5)
    whole, strips = (plan(replace(config, vram=count * 2**20), request) for count in (280, 240))
    assert (whole.memory.decode_chunk, whole.memory.decode_piece, whole.memory.decode_tiles) == (1, 1, 1)
    assert strips.memory.decode_tiles == 2 and max(strips.memory.peak.values()) <= 240 * 2**20
    times = strips.flops["decode"] / whole.flops["decode"]
    assert 1.2 < times < 1.5 and f"in 2 strips, the same pixels for {times:.2f} times the work" in strips.warnings[-1]
    # one strip is the whole frame
    assert planning._tiled_flops(VaeDims.of_spec(VAES["2.2"]), (48, 5, 44, 80), 1) == pytest.approx(
        manifest.vae_flops(VaeDims.of_spec(VAES["2.2"]), "decoder", 5, 44, 80)
    )


def test_dtype_of_the_vae(gpu):
    gpu(80)
    chosen = {d: plan(replace(FIVE, dtype=d), CAT).vae_dtype for d in ("auto", "bf16", "fp32")}
    assert chosen == {"auto": "bf16", "bf16": "bf16", "fp32": "fp32"}
    exact = plan(replace(FIVE, vae_dtype="fp32"), CAT).memory
    assert exact.weights["VAE"] == 4 * 704_688_668
    assert exact.working["decode"] == pytest.approx(2 * plan(FIVE, CAT).memory.working["decode"])


def test_dtype_of_the_vae_on_a_cpu():
    tiny = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="bf16")
    assert plan(tiny, CAT).vae_dtype == "fp32"
    assert "fp16" in plan(replace(tiny, vae_dtype="fp16"), CAT).warnings[-1]


def test_a_picture_decides_the_shape(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
    todo = plan(config, Request(prompt="x", image=str(tmp_path / "wide.png")))
    width, height = todo.request.size
    assert width * height <= 128 * 128 and width % 32 == height % 32 == 0 and width > height
    assert "encode" in todo.flops


def test_untrained_size_gets_a_warning(gpu):
    gpu(80)
    assert not plan(FIVE, CAT).warnings
    todo = plan(FIVE, replace(CAT, size=(640, 352)))
    assert "not trained for 640*352" in todo.warnings[0]
    tiny = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
    assert not plan(tiny, CAT).warnings  # its own size is the one it brings along


def test_offload_on_a_cpu_is_said_to_change_nothing():
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", offload_model=True)
    todo = plan(config, CAT)
    assert "--offload_model True changes nothing" in todo.warnings[0] and not todo.memory.offload


def test_noise_file_is_checked_before_anything_is_loaded(tmp_path):
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu")
    file = tmp_path / "noise.safetensors"
    for tensors, says in (
        ({"other": torch.zeros(1)}, "no tensor 'noise', it has: other"),
        (
            {"noise": torch.zeros(48, 2, 8, 8)},
            r"holds f32 \[48, 2, 8, 8\], this size and length need f32 \[48, 9, 8, 8\]",
        ),
        ({"noise": torch.zeros(48, 9, 8, 8, dtype=torch.int64)}, "holds i64"),
    ):
        save_file(tensors, file)
        with pytest.raises(WanFastError, match=says):
            plan(config, replace(CAT, noise=str(file)))
    save_file({"noise": torch.zeros(48, 9, 8, 8)}, file)
    assert plan(config, replace(CAT, noise=str(file))).request.noise == str(file)


def test_attention_asked_for_must_be_there(gpu):
    with pytest.raises(WanFastError, match=r"8\.0 to 12\.x, the device is the CPU; take --attention auto"):
        plan(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", attention="flash"), CAT)
    gpu(80)
    with pytest.raises(WanFastError, match="computes in bf16"):
        plan(replace(FIVE, attention="flash", dtype="fp32"), CAT)
    if not __import__("importlib.util").util.find_spec("flash_attn"):
        with pytest.raises(WanFastError, match="pip install --pre flash-attn-4"):
            plan(replace(FIVE, attention="flash"), CAT)


@pytest.mark.parametrize(
    ("capability", "asked", "backend"),
    [
        *((80, "int8", "int8 triton"), (89, "fp8", "fp8 triton"), (90, "int8", "int8 triton"), (120, "fp8", "fp8 triton")),
        (90, "fp8-sm90", "fp8 cuda"),
    ],
)
def test_attention_in_8_bits_is_planned(gpu, monkeypatch, capability, asked, backend):
    monkeypatch.setattr("wan_fast.attention.installed", {"torch", "triton", "wan_fast._cuda"}.__contains__)
    gpu(80, capability=divmod(capability, 10))
    exact = plan(FIVE, CAT)
    todo = plan(replace(FIVE, attention=asked, keep_steps=(3, 1), keep_blocks=2), CAT)
    wide, narrow = todo.kernels[:2]
    assert (wide.op, narrow.op, narrow.backend) == ("attention", IN_8_BITS, backend) and wide.backend.startswith("sdpa")
    assert {*OF_ATTENTION} <= {kernel.op for kernel in todo.kernels} and not {*OF_ATTENTION} & {k.op for k in exact.kernels}
    assert [step.attention for step in todo.steps] == ["exact"] * 3 + ["8-bit"] * 46 + ["exact"]
    assert {step.kind for step in todo.steps} == {("model", "run", "run", "exact"), ("model", "run", "run", "8-bit")}
    half = 46 * 2 * (30 - 4) * 2.0 * todo.tokens**2 * 3072
    expected = (
        {"int8": half} if capability == 80 else {"fp8": 2 * half} if asked.startswith("fp8") else {"int8": half, "fp8": half}
    )
    assert todo.flops_8bit == pytest.approx(expected) and todo.flops == exact.flops
    assert todo.memory.peak["denoise"] >= exact.memory.peak["denoise"]
    references = [plan(replace(FIVE, attention=of, kernels="reference"), CAT).memory for of in ("auto", asked)]
    assert references[0].working["denoise"] < references[1].working["denoise"]


@pytest.mark.parametrize(
    ("capability", "options", "said"),
    [
        (86, {"attention": "fp8"}, "fp8 runs on compute capability 8.9 to 12.x, this GPU has 8.6; take --attention int8"),
        (90, {"attention": "int8", "dtype": "fp32"}, "int8 computes in bf16, --dtype is fp32"),
        (100, {"attention": "int8-sm90"}, "9.0 to 9.x, this GPU has 10.0; take --attention auto"),
        (90, {"attention": "int8", "keep_steps": (25, 25)}, "--keep_steps 25,25 leaves none of 50 steps"),
        (90, {"attention": "int8", "keep_blocks": 15}, "--keep_blocks 15 at either end leaves none of 30 blocks"),
        (90, {"attention": "sage", "skip_softmax": 0.1}, "--skip_softmax is for --attention int8 and fp8, not for sage"),
        (90, {"attention": "sage"}, "sageattention 2: pip install"),
    ],
)
def test_attention_in_8_bits_that_cannot_be(gpu, capability, options, said):
    gpu(80, capability=divmod(capability, 10))
    with pytest.raises(WanFastError, match=said):
        plan(replace(FIVE, **options), CAT)


def test_another_projects_attention_needs_no_kernels_of_ours(gpu, monkeypatch):
    monkeypatch.setattr("wan_fast.attention.installed", {"torch", "sageattention"}.__contains__)
    gpu(80)
    todo = plan(replace(FIVE, attention="sage"), CAT)
    assert todo.kernels[1].backend == "sageattention" and not {*OF_ATTENTION} & {kernel.op for kernel in todo.kernels}


def test_blocks_are_kept_for_attention_and_linears_alike(gpu):
    gpu(90)
    kept = plan(replace(FIVE, attention="int8", precision="int8", keep_blocks=3), CAT)
    rule = plan(replace(FIVE, attention="int8", precision="int8"), CAT)
    assert rule.flops_8bit["fp8"] / kept.flops_8bit["fp8"] == pytest.approx(30 / 24)
    assert "24 blocks" in kept.linears and "blocks 0-2, 27-29 are not" in kept.linears
    with pytest.raises(WanFastError, match="--keep_blocks is for linears and attention in 8 bits"):
        plan(replace(FIVE, keep_blocks=3), CAT)


def test_every_operation_of_the_plan_says_what_runs_it(gpu):
    assert {*FUSED, *FUSED_8BIT, *OF_ATTENTION} == set(KERNELS)
    gpu(80)
    for asked, runs, more in (("auto", {"triton"}, 1.0), ("reference", {"reference"}, 1.2)):
        todo = plan(replace(FIVE, kernels=asked), CAT)
        assert {kernel.backend for kernel in todo.kernels if kernel.op in KERNELS} == runs
        assert todo.memory.working["denoise"] >= more * plan(FIVE, CAT).memory.working["denoise"]
    assert todo.kernels[0].op == "attention" and todo.kernels[0].backend.startswith("sdpa")


def test_host_description():
    host = describe("cpu")
    assert host.type == "cpu" and 0 < host.free <= host.memory and host.peak_tflops is None
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:3"):
            with pytest.raises(WanFastError, match=f"--device {name}: .*take --device cpu"):
                describe(name)
    assert prod(TASKS["ti2v-5B"].vae_spec.stride) == 1024
