import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch.autograd import DeviceType

from bench.quality import emulated
from wan_fast import EngineConfig, Request, WanFastError, profiling, roofs
from wan_fast.cli import main
from wan_fast.counting import Work, count_work, kind_of
from wan_fast.engine import Engine
from wan_fast.profiling import Profile
from wan_fast.steps import in_8_bits

REQUEST = Request(prompt="a ball", size=(64, 96), num_frames=9, num_steps=3, seed=3)


@pytest.fixture(scope="module")
def engine():
    return Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="fp32"))


@pytest.fixture(autouse=True)
def quick_roofs(monkeypatch):
    monkeypatch.setattr(roofs, "measured", lambda device, products: [("copy", 1e10), ("fp32", 1e11)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix product"),
        ("aten::mm", "matrix product"),
        ("nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256>", "matrix product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nhwc", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("_frames_to_uint8_kernel", "wan_fast kernel"),
        ("wan_fast::frames_to_uint8", "wan_fast kernel"),
        ("void (anonymous namespace)::frames_to_uint8_kernel<float>(float const*)", "wan_fast kernel"),
        ("Memcpy DtoH (Device -> Pinned)", "copy and layout"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy and layout"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", "norm"),
        ("aten::view", "other"),
    ],
)
def test_classes(name, kind):
    assert kind_of(name) == kind


def test_counted_work_is_that_of_the_plan(engine):
    todo = engine.plan(REQUEST)
    work = count_work(engine, todo)
    by_stage = {stage: sum(w.flops for (s, _), w in work.items() if s == stage) for stage in ("denoise", "decode")}
    assert by_stage["denoise"] == pytest.approx(todo.flops["denoise"], rel=0.03)
    assert by_stage["decode"] == pytest.approx(todo.flops["decode"], rel=0.02)
    assert work["decode", "convolution"].flops > 0.9 * todo.flops["decode"]
    assert work["decode", "wan_fast kernel"].bytes > 9 * 64 * 96 * 3 * (4 + 1)  # the pixels, and the norms


def test_steps_in_8_bits_are_counted_as_such(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with emulated():
        engine = Engine(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", dtype="fp32", attention="int8"))
        todo = engine.plan(REQUEST)
    moved = []
    for keep in ((0, 0), (1, 0), (3, 0)):
        steps = in_8_bits([replace(step, attention="exact") for step in todo.steps], keep)
        work = count_work(engine, replace(todo, steps=steps))
        moved.append(sum(done.bytes for (stage, _), done in work.items() if stage == "denoise"))
    narrow, two, exact = moved
    assert narrow != exact and two == pytest.approx((2 * narrow + exact) / 3)


def test_a_profiled_run(engine, tmp_path):
    todo = engine.plan(REQUEST)
    profile = Profile(engine, todo, lambda: engine.generate(REQUEST))
    plain = engine.generate(REQUEST)
    assert torch.equal(profile.result.frames, plain.frames)
    assert [stage.name for stage in profile.stages] == ["prepare", "denoise", "decode"]
    for stage in profile.stages:
        assert 0 < sum(row.seconds for row in stage.rows) <= stage.seconds * 1.02
        assert 0 <= stage.idle < stage.seconds
    denoise = profile.stages[1]
    rows = {row.kind: row for row in denoise.rows}
    assert {"matrix product", "attention", "norm", "elementwise"} <= set(rows)
    assert rows["attention"].of_roof > 0 and denoise.of_roof > 0 and profile.stages[0].of_roof is None
    assert denoise.syncs == 0, "the loop read a tensor back"
    profile.write_trace(tmp_path / "x.trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "x.trace.json").read_text())["traceEvents"]}
    assert {"prepare", "denoise", "decode", "aten::addmm"} <= names
    lines = list(profile.table())
    assert "fp32 100 GFLOP/s" in lines[0] and any("host waited for the device 0x" in line for line in lines)


# --- a GPU's events ------------------------------------------------------------------------------------------------------


@dataclass
class Range:
    start: float
    end: float

    def elapsed_us(self):
        return self.end - self.start


@dataclass
class Event:
    name: str
    start: float
    end: float
    device_type: DeviceType = DeviceType.CUDA
    self_cpu_time_total: float = 0.0
    is_user_annotation: bool = False
    time_range: Range = field(init=False)

    def __post_init__(self):
        self.time_range = Range(self.start, self.end)


CPU = DeviceType.CPU


def test_kernels_idle_time_and_waits_of_a_gpu():
    events = [
        Event("denoise", 0, 1000, CPU),
        Event("denoise", 10, 900, is_user_annotation=True),
        Event("a mark of somebody's", 10, 900, is_user_annotation=True),
        Event("aten::addmm", 0, 5, CPU, 5),
        Event("nvjet_a", 100, 300),
        Event("nvjet_b", 200, 400),  # on another stream: 300 us are covered, not 400
        Event("void at::native::vectorized_elementwise_kernel<4>", 600, 700),
        Event("aten::_local_scalar_dense", 640, 810, CPU),
        Event("cudaStreamSynchronize", 650, 800, CPU),
        Event("cudaDeviceSynchronize", 950, 990, CPU),  # the stage's own end
        Event("cudaDeviceSynchronize", 1200, 1300, CPU),
        Event("decode", 1000, 2000, CPU),
    ]
    work = {("denoise", "matrix product"): Work(flops=1e8, bytes=10), ("denoise", "elementwise"): Work(bytes=1e5)}
    denoise, decode = profiling._stages(events, work, {"": 1e12, "copy": 1e9}, on_gpu=True)
    assert denoise.seconds == pytest.approx(1e-3) and denoise.idle == pytest.approx(0.6e-3)
    assert denoise.syncs == 1 and decode.syncs == 0 and decode.idle == pytest.approx(1e-3)
    product, elementwise = denoise.rows
    assert (product.kind, product.calls) == ("matrix product", 2) and product.seconds == pytest.approx(400e-6)
    assert product.of_roof == pytest.approx(100 / 400) and elementwise.of_roof == pytest.approx(1.0)
    assert denoise.of_roof == pytest.approx((100e-6 + 100e-6) / 1e-3)
    # roofs that could not be measured
    unknown, _ = profiling._stages(events, work, {"": float("inf"), "copy": float("inf")}, on_gpu=True)
    assert unknown.of_roof is None and [row.of_roof for row in unknown.rows] == [None, None]


def test_nothing_behind_a_run_costs_its_result(engine, monkeypatch):
    monkeypatch.setattr(profiling, "_stages", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(roofs, "measured", lambda device, products: [("copy", 1e10), ("fp32", "out of memory")])
    profile = Profile(engine, engine.plan(REQUEST), lambda: "the clip")
    assert profile.result == "the clip"
    with pytest.raises(ZeroDivisionError):
        list(profile.table())
    monkeypatch.undo()
    assert "fp32 not measured (out of memory)" in next(iter(profile.table()))


# --- the command ---------------------------------------------------------------------------------------------------------

RUN = ["run", "--task", "ti2v-5B", "--ckpt_dir", "tiny", "--device", "cpu", "--prompt", "cat", "--quiet"]
FAST = ["--size", "64*64", "--frame_num", "5", "--sample_steps", "1"]


def test_run_with_profile(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *FAST, "--profile", "--save_file", "x.mp4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "x.mp4" and any(line.startswith("profile     roofs of this machine") for line in lines)
    assert json.loads((tmp_path / "x.trace.json").read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4", "x.trace.json"]


def test_a_trace_that_cannot_be_written_is_said_before_the_run(tmp_path, capsys):
    (tmp_path / "x.trace.json").mkdir()
    assert main([*RUN, *FAST, "--profile", "--save_file", str(tmp_path / "x.mp4")]) == 2
    error = capsys.readouterr().err
    assert "x.trace.json" in error and "--profile" in error and not (tmp_path / "x.mp4").exists()


def test_a_product_that_a_device_has_not_is_said(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(roofs, "copy_rate", lambda device: 1.0)
    monkeypatch.setattr(roofs, "_fastest", lambda call, device: 2.0)
    found = dict(roofs.measured(torch.device("cpu"), ("fp32", "tf32")))
    assert found == {"copy": 1.0, "fp32": 2048**3, "tf32": "tf32 is a mode of NVIDIA GPUs"}


def test_an_error_in_a_profiled_run_is_the_runs_own(engine):
    def fails():
        raise WanFastError("nothing is left")

    with pytest.raises(WanFastError, match="nothing is left"):
        Profile(engine, engine.plan(REQUEST), fails)
