"""What `bench.graphs` and the cases of a few steps measure; on a CPU, with stand-ins for captures."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench import bookkeeping, campaign, graphs, networks, presets, registry
from bench.bookkeeping import PARTS
from bench.cases import CASES
from bench.graphs import EAGER
from bench.registry import OURS, NotHere
from wan_fast import manifest
from wan_fast.setup import Models
from wan_fast.vae import WanVAE

CPU = torch.device("cpu")
SMALL = partial(graphs.steps, "ti2v-5B", "tiny", (32, 32, 5))
CHUNKS = partial(graphs.chunks, "ti2v-5B", "tiny", (16, 16), count=6)
MASK = {"step_cache": "#.#.#"}


@pytest.fixture
def unprofiled(monkeypatch):
    """What takes the profiler's place: it is slow, and tried out by itself."""

    def profiled(units, device):
        return 100, sum(1 for _ in units), 1e-6

    monkeypatch.setattr(graphs, "profiled", profiled)


def stand_in(work):
    """Captures as a GPU does, nothing being done before the first replay, at which the work is done again."""
    result = []

    def replay():
        result[:] = work() or ()

    return replay, result


def without_effect(work):
    """Of steps: the latents stay as they were."""
    return (lambda: None), None


def of_other_pixels(work):
    replay, result = stand_in(work)

    def changed():
        replay()
        result[0][0, 0, 0, 0] += 1

    return changed, result


def test_steps_launched_and_replayed(unprofiled, monkeypatch):
    monkeypatch.setattr(graphs, "capture_on", lambda device: stand_in)
    with torch.inference_mode():
        work = SMALL(5, CPU, **MASK)
        assert list(work.arms) == [OURS, EAGER]
        found = [build()() for build in work.arms.values()]
    assert torch.equal(*found) and found[0].shape == (48, 2, 2, 2)
    assert work.findings[OURS]["captured"] == 2 and 0 < work.findings[OURS]["capture_seconds"] < 10
    for arm in (OURS, EAGER):
        values = work.findings[arm]
        assert values["launches"] == 20 and values["kernels"] == 1 and 0 < values["idle"] < 1
        assert 0 < values["host_seconds"] < 10 and 0 < values["device_seconds"] < 10
    assert "captured" not in work.findings[EAGER]


def test_chunks_launched_and_replayed(unprofiled, monkeypatch):
    monkeypatch.setattr(graphs, "capture_on", lambda device: stand_in)
    with torch.inference_mode():
        work = CHUNKS(CPU)
        found = [build()() for build in work.arms.values()]
    assert torch.equal(*found) and found[0].shape == (41, 16, 16, 3) and found[0].dtype == torch.uint8
    # of six chunks three are of other kinds or warm up, one is captured
    assert work.findings[OURS]["captured"] == 1 and work.findings[OURS]["launches"] == 50


def test_the_profiler_runs_while_units_are_done(monkeypatch):
    seen = []

    class Profiler:
        def __init__(self, activities):
            seen.append(activities)

        def __enter__(self):
            seen.append("begin")
            return self

        def __exit__(self, *error):
            seen.append("end")

        def events(self):
            return []

    monkeypatch.setattr(graphs, "profile", Profiler)
    assert graphs.profiled((seen.append(unit) for unit in range(3)), CPU) == (0, 0, 0.0)
    assert seen == [[ProfilerActivity.CPU], "begin", 0, 1, 2, "end"]


def test_launches_and_kernels_of_a_gpu():
    host = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch", "cudaMemcpyAsync", "aten::mul")
    host += ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventRecord")
    events = [event(name, DeviceType.CPU) for name in host]
    events += [event(name, DeviceType.CUDA) for name in ("a_kernel", "Memcpy DtoD", "b_kernel")]
    launches, kernels, spent = graphs.accounts(events, True)
    assert (launches, kernels) == (5, 3) and spent == pytest.approx(30e-6)


def event(name, device):
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: 10.0))


@pytest.mark.parametrize(
    ("make", "capture", "what"),
    [(partial(SMALL, 4), without_effect, "latents"), (CHUNKS, of_other_pixels, "pixels")],
)
def test_a_replay_that_does_something_else_is_noticed(make, capture, what, monkeypatch):
    monkeypatch.setattr(graphs, "capture_on", lambda device: capture)
    with (
        torch.inference_mode(),
        pytest.raises(AssertionError, match=f"graphs give other {what} of the first clip than launches"),
    ):
        make(CPU).arms[OURS]()


def test_a_cpu_says_that_it_has_no_graphs():
    with torch.inference_mode(), pytest.raises(NotHere, match="CUDA graphs need a GPU"):
        SMALL(3, CPU).arms[OURS]()
    assert all(case.device == "cuda" for case in graphs.GPU_GRAPH_CASES)


def test_findings_are_kept_and_shown(unprofiled, monkeypatch):
    monkeypatch.setattr(graphs, "capture_on", lambda device: stand_in)
    case = registry.Case("graphs/small/32x32x5-3-steps/fp32", "cpu", partial(SMALL, 3), 0.0)
    row, _ = registry.run(case, CPU, {})
    row = json.loads(json.dumps(row))
    assert set(row["arms"]) == {OURS, EAGER} and row["arms"][OURS]["findings"]["captured"] == 1
    lines = graphs.table([row])
    header = next(line for line in lines if line.startswith("| case"))
    shown = [line for line in lines if line.startswith("| `")]
    assert len(shown) == 2 and all(line.count("|") == header.count("|") for line in shown)
    assert all("not measured | not measured |" in line for line in shown), "a CPU has no account of memory"
    first, second, *_ = (each.name for each in graphs.GPU_GRAPH_CASES)
    page = []
    said = "FAILED: AssertionError: graphs give other latents of the first clip than launches"
    graphs.on_a_gpu(lambda *lines: page.extend(lines), {"rows": {first: {**row, "case": first}}, "notes": {second: said}})
    assert sum(line.startswith(f"| `{first}` |") for line in page) == 2
    assert f"- `{second}`: not measured: {said}" in page
    assert f"- `{presets.FEW_STEPS_GOAL[0]}`: not measured: there was no time left" in page


def test_what_a_cpu_can_tell(tmp_path, capsys):
    page = graphs.Page(tmp_path / "machine" / "graphs.md")
    bookkeeping.on_a_cpu(page.add, repeats=2, num_steps=12, video=(32, 32, 5))
    text = page.path.read_text()
    assert text == "\n".join([*page.lines, ""]) and capsys.readouterr().out == text
    assert "0.5 ms or less is wanted per step" in text and "These are not launches" in text
    for kind in ("run, run", "run, run, with the difference", "reuse, reconstruct, in two bands"):
        assert f"| {kind} | " in text


def test_dispatches_by_part():
    found = bookkeeping.dispatches(graphs.planned("ti2v-5B", "tiny", (64, 64, 5), 12, CPU, **graphs.CACHES))
    by_kind = {kind[1:3]: parts for kind, parts in found.items()}
    both, reused = by_kind["run", "run"], by_kind["reuse", "reconstruct"]
    assert all(set(parts) == set(PARTS) for parts in by_kind.values())
    # the step's time, and weights of the difference and of the solver; the solver's step is one operator
    assert all(parts["rows"][0] == 3 and parts["solver"][0] == 1 for parts in by_kind.values())
    assert both["model"][0] > 5 * reused["model"][0] > 0 and reused["caches"][0] > 0


def test_bookkeeping_and_planning_are_measured():
    todo = graphs.planned("ti2v-5B", "tiny", (64, 64, 5), 12, CPU, **graphs.CACHES)
    loop, without, load, solver = bookkeeping.bookkeeping(todo, 5).values()
    assert 0 < load[1] <= load[0] <= load[2] < 1 and load[1] < without[1] < loop[1] < 1 and 0 < solver[1] < loop[2]
    assert all(0 < low <= middle <= high < 1 for middle, low, high in bookkeeping.planning(todo, 2).values())


def test_a_few_steps_end_to_end():
    with torch.inference_mode():
        work = presets.few_steps("ti2v-5B", "tiny", (32, 32, 17), "fastwan-3step", CPU)
        call = work.arms[OURS]()
        first, again = call(), call()
    assert first.shape == again.shape == (17, 32, 32, 3) and first.dtype == torch.uint8
    assert set(work.stages[OURS]) == {"prepare", "denoise", "decode"} and min(work.stages[OURS].values()) > 0


def test_a_few_steps_with_graphs_are_the_same():
    todo = presets._of_few_steps("ti2v-5B", "tiny", (32, 32, 41), "fastwan-3step", CPU, {})
    assert len(todo.steps) == todo.forwards == 3
    memory = replace(todo.memory, graphs="kept", decode_graphs=True, decode_chunk=2, decode_piece=2)
    models = Models.of(todo.config.spec, todo.checkpoint)
    captures = []

    def capture(work):
        captures.append(work)
        return stand_in(work)

    with torch.inference_mode():
        parts = networks.make_dit(models.experts["model"], todo.latent_shape, torch.float32, CPU)
        vae = networks.random_model(lambda: WanVAE(models.vae), manifest.vae_shapes(models.vae), CPU)
        given = parts["model"], vae, torch.randn(todo.latent_shape)
        as_it_is = presets.Distilled(todo, *given)
        graphed = presets.Distilled(replace(todo, memory=memory), *given, capture=lambda device, roomy: capture)
        for embedding in torch.randn(2, 64, models.experts["model"].text_dim):
            frames = []
            for clip in (as_it_is, graphed):
                torch.manual_seed(0)
                frames.append(clip.made(embedding)[0])
            assert torch.equal(*frames)
    # steps once for both clips, chunks for each
    assert len(captures) == 3


def test_the_goal_stands_beside_what_was_measured():
    name, wanted = presets.FEW_STEPS_GOAL
    stages = {"prepare": 0.01, "denoise": 3.0, "decode": 2.0}
    for taken, said in ((wanted + 1, "not reached here"), (wanted - 1, "one H200: reached here")):
        arms = {OURS: {"seconds": taken, "stages": stages}, presets.IN_BF16: {"seconds": 9.0, "stages": stages}}
        text = "\n".join(presets.few_steps_lines({"case": name, "arms": arms, "skipped": {}}))
        assert said in text and "| wan-fast, bf16 | 9.000 s | 0.010 s | 3.000 s | 2.000 s |" in text


def test_the_campaign_begins_with_the_goal_and_the_small_ones():
    names = list(campaign.steps(torch.device("cuda"), ["few-steps/*", "graphs/*"]))
    assert names[:3] == ["roofs", presets.FEW_STEPS_GOAL[0], "graphs/tiny/128x128x33-50-steps/bf16"]
    assert names[3:] == [case.name for case in graphs.GPU_GRAPH_CASES[1:]]
    assert "few-steps/tiny/128x128x33-3-steps/fp32" in campaign.steps(CPU)
    # what timing takes, builds and first calls not counted
    assert sum(case.seconds for case in CASES if case.group in ("few-steps", "graphs")) < 120
