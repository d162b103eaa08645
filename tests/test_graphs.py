"""CUDA graphs: what is replayed is, bit for bit, what would have been done. On a CPU with the stand-in of `tape`."""

import weakref
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import combinations

import pytest
import torch
from clips_of import noise, write_clip, write_folder
from models import random_vae, write_native, write_poses
from PIL import Image
from safetensors.torch import save_file
from sounds_of import tone, write_sound
from tape import Counting, Tape
from test_sampler import no_reading_back

import wan_fast.engine as engine_module
from wan_fast.branches import Branches
from wan_fast.config import INPUTS, EngineConfig, Request, WanFastError
from wan_fast.engine import Engine
from wan_fast.graphs import CudaCapture, Graphs
from wan_fast.sampler import denoise
from wan_fast.skipping import Mask, with_caches

GIB = 2**30


# --- Graphs ---------------------------------------------------------------------------------------------------------


def counting_work():
    x, ran = torch.zeros(1), []

    def work():
        ran.append(1)
        return x.add_(1)

    return x, ran, work


def test_the_first_run_is_the_work_the_second_is_captured_later_ones_replay():
    (_, ran, work), tape = counting_work(), Tape()
    graphs = Graphs(tape)
    seen = []
    for _ in range(4):
        result = graphs("a", work)
        seen.append((len(ran), tape.captures, tape.replays, result.item()))
    assert seen == [(1, 0, 0, 1), (2, 1, 1, 2), (2, 1, 2, 3), (2, 1, 3, 4)]


def test_kinds_are_apart():
    first, second = torch.zeros(1), torch.zeros(1)
    tape = Tape()
    graphs = Graphs(tape)
    for _ in range(3):
        graphs(("a", 1), lambda: first.add_(1))
        graphs(("a", 2), lambda: second.add_(10))
    assert (first.item(), second.item(), tape.captures, tape.replays) == (3, 30, 2, 4)
    assert set(graphs.captured) == {("a", 1), ("a", 2)}


def no_capture(asked):
    def capture(work):
        asked.append(1)
        raise WanFastError("CUDA graphs cannot be captured here")

    return capture


def test_what_cannot_be_captured_is_done_as_it_is_and_said_once(caplog):
    (x, ran, work), asked = counting_work(), []
    graphs = Graphs(no_capture(asked), optional=True)
    for kind in "aabbab":
        graphs(kind, work)
    assert x.item() == len(ran) == 6 and len(asked) == 1 and not graphs.captured
    assert graphs.refused == "CUDA graphs cannot be captured here"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "launched kernel by kernel" in record.getMessage()


def test_what_was_asked_for_and_cannot_be_captured_is_an_error():
    graphs, (_, _, work) = Graphs(no_capture([])), counting_work()
    graphs("a", work)
    with pytest.raises(WanFastError, match="cannot be captured"):
        graphs("a", work)


@pytest.mark.parametrize("roomy", [True, False])
def test_where_memory_is_tight_a_first_run_has_it_alone(roomy):
    (x, _, work), tape = counting_work(), Tape()
    graphs, held = Graphs(tape, roomy=roomy), []
    for kind in "aabba":
        graphs(kind, lambda: (held.append(len(graphs.captured)), work())[1])
    # of the first run of b: the graph of a
    assert held[2] == roomy and x.item() == 5 and tape.captures == (2 if roomy else 3)


# --- through the engine ---------------------------------------------------------------------------------------------

SHORT = Request(prompt="a red ball", size=(64, 64), num_frames=5, num_steps=6, seed=0)


FOLDER = []
# what a task needs beside its checkpoint
OWN_FILES = {"phantom-1.3B": ("dit", "phantom-1.3B"), "unianimate-14B": ("unianimate", "poses.safetensors")}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A checkpoint of one small block for each task, and pictures; in FOLDER, for what is called outside of tests too."""
    made = tmp_path_factory.mktemp("graphs")
    for task in ("ti2v-5B", "t2v-A14B", "i2v-14B", "i2v-A14B", "vace-1.3B", *OWN_FILES, "s2v-14B", "animate-14B"):
        write_native(made / task, task, layers=1, width=128)
    write_poses(made / "poses.safetensors")
    for number, name in enumerate(("first", "second")):
        write_folder(made / f"{name}-driving", 13, size=(64, 64), face=16, seed=10 * number)
        write_clip(made / f"{name}.mkv", noise(5, 64, 64, seed=number))
        write_sound(made / f"{name}.wav", tone(220 + 110 * number, 16000), 16000)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(made / "first.png")
    Image.new("RGB", (64, 64), "green").save(made / "second.png")
    FOLDER.append(made)
    yield made
    FOLDER.clear()
    wanted.cache_clear()
    bare.cache_clear()


def engine(graphs, *, decode=True, task="ti2v-5B", checkpoint=None, **options):
    """An engine on the CPU whose plans say what they would on a GPU, and the tapes that it captures with."""
    checkpoint = checkpoint or str(FOLDER[0] / task)
    if task in OWN_FILES:
        name, file = OWN_FILES[task]
        options[name] = str(FOLDER[0] / file)
    made = Engine(EngineConfig(task=task, checkpoint=checkpoint, device="cpu", **options))
    planned, tapes = made.plan, []

    def as_on_a_gpu(request):
        todo = planned(request)
        given = dict(graphs=graphs, decode_graphs=decode and graphs != "off", decode_chunk=1, decode_piece=2)
        return replace(todo, memory=replace(todo.memory, **given))

    def capture(device, roomy):
        assert roomy == (graphs == "kept") and device == made.device
        tapes.append(Tape())
        return tapes[-1]

    made.plan, made.workspace.capture = as_on_a_gpu, capture
    return made, tapes


@lru_cache
def bare(**options):
    """The same engine, which launches everything."""
    return engine("off", **options)[0]


@lru_cache
def wanted(request, **options):
    return clip(bare(**options), request)[0]


def clip(made, request):
    """Latents, frames before and after they are rounded, kept as they were given until the clip is done; stats."""
    floats, pixels = [], []
    done = made.generate(request, on_frames=floats.append, on_pixels=pixels.append)
    return {"latents": done.latents, "floats": torch.cat(floats, 1), "frames": torch.cat(pixels)}, done.stats


def assert_same(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differ"


def asked(**changes):
    """A request; files by their names."""
    for name in {*INPUTS} & {*changes}:
        if given := changes[name]:
            there = (str(FOLDER[0] / file) for file in ([given] if isinstance(given, str) else given))
            changes[name] = next(there) if isinstance(given, str) else tuple(there)
    return replace(SHORT, **changes)


def others(changes):
    """The same with all files but the first ones' others."""
    text = {name: changes[name] for name in {*INPUTS} & {*changes}}
    swapped = {"first": "second", "second": "first"}

    def other(file):
        stem = next(stem for stem in swapped if file.startswith(stem))
        return swapped[stem] + file.removeprefix(stem)

    return changes | {n: other(v) if isinstance(v, str) else tuple(map(other, v)) for n, v in text.items()}


MASK = dict(step_cache="#..#.##..#.#")
IMAGE = dict(image="first.png")
CASES = {
    "unipc": ({}, {}),
    "dpm++": ({}, dict(solver="dpm++")),
    "euler": ({}, dict(solver="euler")),
    "no-guidance": ({}, dict(guidance_scale=1.0)),
    "image": ({}, IMAGE),
    "image-lcm": ({}, dict(IMAGE, solver="lcm")),
    "lcm": ({}, dict(solver="lcm", num_steps=5)),
    "rcm": ({}, dict(preset="rcm-4step", num_steps=None)),
    "mask": (MASK, dict(num_steps=12)),
    "mask-image": (MASK, dict(IMAGE, num_steps=12)),
    "every": (dict(step_cache="every:2,0"), dict(num_steps=10)),
    "difference": (dict(cfg_cache="difference:3,0"), dict(num_steps=10)),
    "frequency": (dict(cfg_cache="frequency:3,0"), dict(num_steps=10)),
    "gate": (dict(cfg_cache="gate:0.3"), dict(num_steps=10)),
    "mask-difference": (dict(MASK, cfg_cache="difference:2,0"), dict(num_steps=12)),
    "every-frequency": (dict(step_cache="every:2,0", cfg_cache="frequency:3,0.2"), dict(num_steps=16)),
    "cfg-zero": (dict(cfg_zero=2), dict(num_steps=10)),
    "cfg-zero-gate": (dict(cfg_zero=1, cfg_cache="gate:0.4", step_cache="every:2,0.3"), dict(num_steps=12)),
    "two-experts": (dict(task="t2v-A14B"), dict(num_steps=10, shift=3.0)),
    "i2v": (dict(task="i2v-14B"), IMAGE),
    "i2v-mask-two-experts": (dict(task="i2v-A14B", step_cache="#.###.#.##.#"), dict(IMAGE, num_steps=12, shift=3.0)),
    "vace": (dict(task="vace-1.3B"), dict(src_ref_images=("first.png",), context_scale=0.8)),
    "two-experts-mask": (dict(task="t2v-A14B", step_cache="#.#.#.#.#.##"), dict(num_steps=12, shift=3.0)),
    "phantom": (dict(task="phantom-1.3B"), dict(src_ref_images=("first.png", "second.png"))),
    "phantom-mask": (dict(MASK, task="phantom-1.3B"), dict(src_ref_images=("first.png",), num_steps=12)),
    "unianimate": (dict(task="unianimate-14B"), dict(IMAGE, pose_video="first.mkv", pose_image="second.png")),
}
# and how many clips have the memory of the one before
SOUND = dict(IMAGE, audio="first.wav", infer_frames=4, num_clip=3, num_frames=None)
DRIVEN = dict(src_root_path="first-driving", guidance_scale=3.0)
CHAINS = {
    "s2v": (dict(MASK, task="s2v-14B"), dict(SOUND, num_steps=12), 1),
    "animate": (dict(task="animate-14B"), DRIVEN, 2),
    "animate-no-guidance": (dict(task="animate-14B"), dict(DRIVEN, guidance_scale=1.0), 2),
    "animate-replaced": (
        dict(task="animate-14B", cfg_cache="difference:3,0"),
        dict(DRIVEN, replace_flag=True, num_steps=10),
        2,
    ),
}


@pytest.mark.parametrize(
    ("name", "graphs"),
    [*((name, "kept") for name in CASES), *((name, "released") for name in ("lcm", "mask-difference"))],
)
def test_replayed_clips_are_those_of_every_launch(name, graphs):
    options, changes = CASES[name]
    # long enough for chunks of the VAE to be replayed
    request = asked(**changes, num_frames=17 if name in ("unipc", "image", "two-experts") else 5)
    made, tapes = engine(graphs, **options)
    found, stats = clip(made, request)
    assert_same(found, wanted(request, **options))
    steps = made.plan(request).steps
    often = [kind for kind, count in Counter(step.kind for step in steps).items() if count > 1]
    of_steps, of_decode = tapes
    assert often and of_steps.captures == captures([step.kind for step in steps], roomy=graphs == "kept")
    assert stats["graphs"]["steps"] == len(often)
    assert of_steps.replays == len(steps) - len({step.kind for step in steps}) and of_steps.launches > 0
    # of latent frames the first three find fewer histories, or are the first of their kind
    replayed = max((request.num_frames - 1) // 4 - 2, 0)
    assert (stats["graphs"]["decode"], of_decode.captures, of_decode.replays) == (bool(replayed), bool(replayed), replayed)


def captures(kinds, roomy):
    """How often there is a capture: where memory is tight a first run lets go of those before it."""
    met, held, count = set(), set(), 0
    for kind in kinds:
        if kind not in met:
            met.add(kind)
            held = held if roomy else set()
        elif kind not in held:
            held.add(kind)
            count += 1
    return count


def test_a_trained_model():
    request = asked(num_frames=17, num_steps=10)
    options = dict(checkpoint="tiny", cfg_cache="difference:2,0")
    found, stats = clip(engine("kept", **options)[0], request)
    assert_same(found, wanted(request, **options))
    assert stats["graphs"] == {"steps": 2, "decode": 1}


def test_the_cases_have_the_kinds_they_are_for():
    seen = set()
    for options, changes in CASES.values():
        seen |= {step.kind[1:3] for step in bare(**options).plan(asked(**changes)).steps}
    ran = {("run", how) for how in ("run", "none", "reconstruct")}
    assert seen == {*ran, ("reuse", "reuse"), ("reuse", "reconstruct"), ("zero", "zero")}


# --- from clip to clip ----------------------------------------------------------------------------------------------


def test_graphs_serve_later_clips_of_the_shape():
    made, tapes = engine("kept", decode=False)
    changes = (
        {},
        dict(prompt="a green square", seed=5),
        dict(guidance_scale=2.5, num_steps=9, shift=3.0),
        dict(solver="euler", num_steps=3),
        dict(solver="dpm++", negative_prompt="blue"),
        {},
    )
    for i, change in enumerate(changes):
        request = asked(**change)
        assert_same(clip(made, request)[0], wanted(request))
        assert len(tapes) == 1 and tapes[0].captures == 1, f"clip {i} was captured again"
    # the very first step of the later clips is replayed
    assert tapes[0].replays == 6 + 6 + 9 + 3 + 6 + 6 - 1


@pytest.mark.parametrize(
    "name",
    [
        *("image", "lcm", "image-lcm", "mask-difference", "every-frequency", "cfg-zero-gate", "two-experts"),
        *("i2v", "i2v-mask-two-experts", "vace", "phantom", "phantom-mask", "unianimate"),
    ],
)
def test_later_clips_with_more_to_remember(name):
    options, changes = CASES[name]
    made, tapes = engine("kept", decode=False, **options)
    request, other = asked(**changes), asked(**others(changes), prompt="a blue square", seed=7)
    if name.startswith("phantom"):
        other = replace(other, image_guidance_scale=3.0)
    captured = []
    for each in (request, other, request):
        assert_same(clip(made, each)[0], wanted(each, **options))
        captured.append(tapes[0].captures)
    # a kind of a single step in a clip is captured in the second clip, and is then there
    assert len(tapes) == 1 and captured[2] == captured[1] == len({step.kind for step in made.plan(request).steps})


@pytest.mark.parametrize(("name", "graphs"), [*((name, "kept") for name in CHAINS), ("animate", "released")])
def test_clips_of_a_chain_are_those_of_every_launch(name, graphs):
    """A clip whose tokens are as many as those of the one before begins in its memory, and so does another video."""
    options, changes, continued = CHAINS[name]
    made, tapes = engine(graphs, decode=False, **options)
    request, other = asked(**changes), asked(**others(changes), prompt="a blue square", seed=7)
    todo = made.plan(request)
    kinds, clips = Counter(step.kind for step in todo.steps), len(todo.framing.clips)
    for each in (request, other) if graphs == "kept" else (request,):
        expected = wanted(each, **options)
        assert_same(clip(made, each)[0], expected)
        assert not any(torch.equal(*pair) for pair in combinations(expected["latents"].chunk(clips, dim=1), 2))
    if graphs == "released":
        assert len(tapes) == clips
    elif continued == clips - 1:
        assert len(tapes) == 1 and tapes[0].captures == len(kinds)
        assert tapes[0].replays == 2 * clips * len(todo.steps) - len(kinds)
    else:  # the first clip has no frames before it
        often = sum(count > 1 for count in kinds.values())
        assert [tape.captures for tape in tapes] == [often, len(kinds)] * 2
        assert [tape.replays for tape in tapes] == [len(todo.steps) - len(kinds), 2 * len(todo.steps) - len(kinds)] * 2


def test_chunks_of_a_chain_are_replayed():
    options, changes, _ = CHAINS["s2v"]
    made, tapes = engine("kept", **options)
    assert_same(clip(made, asked(**changes))[0], wanted(asked(**changes), **options))
    _, first, _, second, third = tapes
    # behind the first clip there are 19 latent frames before the one of a clip
    assert (first.replays, second.replays, third.replays) == (0, 17, 17)


def test_another_strength_of_hints_begins_anew():
    """It is a number of the graph itself."""
    made, tapes = engine("kept", decode=False, task="vace-1.3B")
    for scale, count in ((1.0, 1), (1.0, 1), (0.5, 2)):
        request = asked(src_ref_images=("first.png",), context_scale=scale)
        assert_same(clip(made, request)[0], wanted(request, task="vace-1.3B"))
        assert len(tapes) == count


def test_a_kind_that_comes_later_joins_the_others():
    """Guidance of 1 is a kind of its own, and needs no text of the other branch."""
    made, tapes = engine("kept", decode=False)
    one, green = asked(guidance_scale=1.0), asked(prompt="a green square", negative_prompt="red")
    for request in (one, SHORT, green, replace(one, prompt="a blue square", seed=1), SHORT, green):
        assert_same(clip(made, request)[0], wanted(request))
    assert len(tapes) == 1 and tapes[0].captures == 2


@pytest.mark.parametrize(
    "change",
    [dict(size=(96, 64)), dict(size=(64, 96)), dict(num_frames=9), dict(image="first.png"), dict(solver="lcm")],
    ids=["wider", "higher", "longer", "image", "noise"],
)
def test_another_shape_begins_anew_and_gives_the_memory_back_first(change):
    made, tapes = engine("kept", decode=False)
    old, alive = [], []

    def branches(*args, **settings):
        alive.append(any(solver() is not None for solver in old))
        return Branches(*args, **settings)

    made.workspace.branches = branches
    for i, request in enumerate((SHORT, asked(**change), SHORT)):
        assert_same(clip(made, request)[0], wanted(request))
        assert len(tapes) == i + 1 and tapes[i].captures == 1
        old.append(weakref.ref(made.workspace.kept.solver))
    assert alive == [False] * 3


def test_other_caches_begin_anew():
    made, tapes = engine("kept", decode=False)
    plain, branches = made.plan(asked(num_steps=12)), ("conditional", "unconditional")
    for mask, count in (("#" * 12, 1), ("#.#.#.#.##.#", 2), ("#..#..#..#.#", 2), ("#" * 12, 3)):
        todo = replace(plain, steps=with_caches(plain.steps, dict.fromkeys(branches, Mask(mask)), None))
        as_it_is = replace(todo, memory=replace(todo.memory, graphs="off"))
        assert torch.equal(made.latents(todo), bare().latents(as_it_is)), mask
        assert len(tapes) == count


def test_released_graphs_leave_nothing():
    made, tapes = engine("released")
    made_for = []

    def branches(*args, **settings):
        new = Branches(*args, **settings)
        made_for.append(weakref.ref(new))
        return new

    made.workspace.branches = branches
    for request in (asked(num_frames=17), asked(num_frames=17, seed=3)):
        assert_same(clip(made, request)[0], wanted(request))
        assert made.workspace.kept is None and made_for[-1]() is None
    assert [tape.captures for tape in tapes] == [1] * 4 and len(made_for) == 2


def test_a_clips_latents_are_the_callers():
    made, _ = engine("kept")
    first = made.latents(made.plan(SHORT))
    copy = first.clone()
    second = made.latents(made.plan(asked(seed=9)))
    made.generate(asked(seed=10))
    assert torch.equal(first, copy) and not torch.equal(first, second)
    assert torch.equal(first, wanted(SHORT)["latents"])


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_clip_that_was_broken_off_leaves_no_trace(at):
    made, _ = engine("kept")

    def stop(step):
        if step.index == at:
            raise KeyboardInterrupt

    for request in (SHORT, asked(prompt="a blue square", seed=2)):
        with pytest.raises(KeyboardInterrupt):
            made.generate(replace(request, seed=77), on_step=stop)
        assert_same(clip(made, request)[0], wanted(request))


def lora(engine, path):
    width = engine.models["model"].dims.dim
    generator = torch.Generator().manual_seed(3)
    name = "diffusion_model.blocks.0.self_attn.q.lora_"
    pair = (torch.randn(shape, generator=generator) for shape in ((width, 2), (2, width)))
    save_file(dict(zip((f"{name}B.weight", f"{name}A.weight"), pair, strict=True)), path)
    return str(path)


def test_other_loras_begin_anew(tmp_path):
    made, tapes = engine("kept", decode=False)
    plain = clip(made, SHORT)[0]
    file = lora(made, tmp_path / "lora.safetensors")
    made.set_loras([file])
    assert made.workspace.kept is None
    other = wanted(SHORT, lora=(file,))
    assert not torch.equal(other["latents"], plain["latents"])
    assert_same(clip(made, SHORT)[0], other)
    made.set_loras([])
    assert made.workspace.kept is None
    assert_same(clip(made, SHORT)[0], plain)
    assert [tape.captures for tape in tapes] == [1, 1, 1]


def test_a_step_that_was_broken_off_has_warmed_up_nothing(monkeypatch):
    made, _ = engine("kept")

    def broken_off(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine_module.WanDiT, "forward", broken_off)
        made.generate(SHORT)
    for request in (SHORT, asked(prompt="a green square", seed=5), SHORT):
        assert_same(clip(made, request)[0], wanted(request))


def test_an_engine_without_a_choice_does_without_graphs(caplog):
    made, _ = engine("kept")
    made.workspace.capture = lambda device, roomy: no_capture([])
    request = asked(num_frames=17)
    found, stats = clip(made, request)
    assert_same(found, wanted(request))
    assert stats["graphs"] == {"steps": "CUDA graphs cannot be captured here"}
    assert_same(clip(made, request)[0], wanted(request))
    assert sum("kernel by kernel" in record.getMessage() for record in caplog.records) == 1, "it is tried again"


def test_an_engine_that_was_asked_for_graphs_raises():
    made, _ = engine("kept")
    made.workspace.capture, made.config = lambda device, roomy: no_capture([]), replace(made.config, cuda_graphs=True)
    request = asked(num_frames=17)
    with pytest.raises(WanFastError, match="cannot be captured"):
        made.generate(request)


# --- the VAE alone --------------------------------------------------------------------------------------------------


@lru_cache
def vae(version):
    return random_vae(version)


DECODES = {(1, 1): (1, 5), (1, 2): (2, 5, 9), (1, 4): (5,), (2, 2): (2, 9), (2, 3): (5, 8), (2, 8): (9,), (3, 2): (11,)}


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize(("chunk", "piece"), DECODES, ids=str)
def test_replayed_chunks_are_those_of_every_launch(version, chunk, piece):
    model = vae(version)
    for T in DECODES[chunk, piece]:
        latents = torch.randn(model.channels, T, 2, 3, generator=torch.Generator().manual_seed(T))
        expected, floats = [], []
        wanted = list(model.decode_stream(latents, chunk=chunk, piece=piece, on_frames=expected.append))
        tape = Tape()
        graphs = Graphs(tape)
        found = list(model.decode_stream(latents, chunk=chunk, piece=piece, on_frames=floats.append, run=graphs))
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), T
        assert len(floats) == len(expected) and all(map(torch.equal, floats, expected)), T
        # whole chunks behind the second one are of one kind; a shorter last one is by itself
        whole = (T - 1) // chunk - 1
        assert tape.replays == max(whole - 1, 0) and tape.captures == (whole > 1), T
        if whole > 0:
            histories = max(kind[2] for kind in graphs.met)
            assert all(kind == ("decode", chunk, histories) for kind in graphs.captured)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_frames_are_not_written_over_by_the_next_chunk(version):
    """Each is compared when the next ones have been decoded."""
    model = vae(version)
    latents = torch.randn(model.channels, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    kept, copies = [], []

    def keep(frames):
        kept.append(frames)
        copies.append(frames.clone())

    for pixels in model.decode_stream(latents, piece=2, on_frames=keep, run=Graphs(Tape())):
        keep(pixels)
    assert len(kept) > 8 and all(map(torch.equal, kept, copies))


# --- what the host does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("unipc", "image", "lcm", "no-guidance", "mask-difference", "frequency", "cfg-zero"),
        *("phantom", "unianimate", "s2v-from-picture", "animate"),
    ],
)
def test_of_a_replayed_step_the_host_issues_the_rows(name, monkeypatch):
    # whose clips all have as many tokens
    from_picture = {"s2v-from-picture": (dict(task="s2v-14B"), dict(SOUND, num_clip=2, start_from_ref=True))}
    options, changes, *_ = (CASES | CHAINS | from_picture)[name]
    made, tapes = engine("kept", decode=False, **options)
    by_step = []

    def guarded(steps, *args, on_step, **settings):
        def counted(step):
            by_step.append((step.kind, counting.take()))
            on_step(step)

        with no_reading_back(monkeypatch), Counting(tapes) as counting:
            denoise(steps, *args, on_step=counted, **settings)

    monkeypatch.setattr(engine_module, "denoise", guarded)
    made.generate(asked(**changes))
    met, replayed = set(), []
    for kind, count in by_step:
        if kind in met:
            replayed.append(count)
        met.add(kind)
    assert len(replayed) > 2 and all(count == replayed[0] for count in replayed)
    # the solver's row and the timestep; weights of the difference; noise
    drawn, reconstructed = name == "lcm", "difference" in name or name == "frequency"
    rows = 2 + drawn + reconstructed
    assert replayed[0] == Counter(copy_=rows, select=rows - drawn, **({"randn": 1} if drawn else {})), (
        "more is issued than copies of rows"
    )


# --- on a GPU -------------------------------------------------------------------------------------------------------


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["unipc", "image", "lcm", "mask-difference", "frequency", "cfg-zero"])
@pytest.mark.parametrize("graphs", ["kept", "released"])
def test_on_a_gpu(dtype, name, graphs, monkeypatch):
    options, changes = CASES[name]
    request = asked(**changes, num_frames=33)
    config = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cuda", dtype=dtype, **options)
    exact, made = (Engine(replace(config, cuda_graphs=asked_for)) for asked_for in (False, True))
    assert exact.plan(request).memory.graphs == "off" and made.plan(request).memory.graphs == "kept"
    if graphs == "released":
        planned = made.plan
        made.plan = lambda request: replace(todo := planned(request), memory=replace(todo.memory, graphs="released"))

    def guarded(*args, **settings):
        torch.cuda.set_sync_debug_mode("error")
        try:
            denoise(*args, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for each in (request, replace(request, prompt="a green square", seed=4), request):
        expected, _ = clip(exact, each)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "denoise", guarded)
            found, stats = clip(made, each)
        assert_same(found, expected)
        assert stats["graphs"]["steps"] >= 1 and stats["graphs"]["decode"] == 1
        assert (made.workspace.kept is None) == (graphs == "released")


@needs_gpu
@pytest.mark.parametrize("graphs", ["kept", "released"])
def test_two_experts_loras_and_a_second_engine_on_a_gpu(graphs, tmp_path):
    """Graphs come and go, and so does the memory that they work in."""
    shape = (128, 128)
    factors = {"lora_A.weight": torch.randn(2, shape[1]), "lora_B.weight": torch.randn(shape[0], 2)}
    save_file({f"blocks.0.self_attn.q.{name}": value for name, value in factors.items()}, tmp_path / "lora.safetensors")
    config = EngineConfig(task="t2v-A14B", checkpoint=str(FOLDER[0] / "t2v-A14B"), device="cuda", dtype="bf16")
    requests = [asked(num_steps=8, shift=3.0, num_frames=frames, seed=seed) for frames, seed in ((17, 0), (17, 1), (33, 2))]
    exact = Engine(replace(config, cuda_graphs=False))
    engines = [Engine(replace(config, cuda_graphs=True)) for _ in range(2)]
    for made in engines:
        planned = made.plan
        made.plan = lambda request, planned=planned: replace(
            todo := planned(request), memory=replace(todo.memory, graphs=graphs, decode_graphs=True)
        )
    for lora in ([], [str(tmp_path / "lora.safetensors")], []):
        for each in (exact, *engines):
            each.set_loras(lora)
        for request in requests:
            expected, _ = clip(exact, request)
            for made in engines:
                assert_same(clip(made, request)[0], expected)
                torch.cuda.empty_cache()


@needs_gpu
def test_a_capture_that_fails_says_so_and_the_gpu_goes_on():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(2, device=device)
    with pytest.raises(WanFastError, match=r"CUDA graphs cannot be captured here \(.*\); add --no-cuda-graphs"):
        CudaCapture(device)(lambda: x.sum().item(), roomy=True)
    replay, y = CudaCapture(device)(lambda: x * 2, roomy=False)
    x.fill_(3)
    replay()
    assert y.tolist() == [6, 6]
