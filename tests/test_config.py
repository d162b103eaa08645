import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.framing import best_size
from wan_fast.parsing import parse_bytes, parse_guidance, parse_size, parse_steps
from wan_fast.resolving import resolve, with_seed
from wan_fast.tasks import TASKS, VAES


def test_config_and_command_line_load_without_torch():
    code = "import sys, wan_fast.config, wan_fast.cli, wan_fast.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(task="ti2v-5b"), "did you mean ti2v-5B"),
        (dict(task="video"), "choose one of"),
        (dict(task="ti2v-5B", device="gpu"), "unknown device 'gpu'"),
        (dict(task=5), "task must be a text, got 5; see --task in --help"),
        (dict(task="ti2v-5B", vram="12GiB"), "vram must be a whole number, got '12GiB'; see --vram in --help"),
        (dict(task="ti2v-5B", t5_cpu="no"), "t5_cpu must be True or False, got 'no'; see --t5_cpu in --help"),
        (dict(task="ti2v-5B", skip_softmax=True), "skip_softmax must be a number, got True; see --skip_softmax in --help"),
        (dict(task="ti2v-5B", dtype="fp16"), "dtype must be one of"),
        (dict(task="ti2v-5B", vram=0), "positive"),
        (dict(task="ti2v-5B", checkpoint=" "), "empty"),
        (dict(task="ti2v-5B", attention="int4"), "attention must be one of"),
        (dict(task="ti2v-5B", attention="int8", keep_steps=(2, -1)), "--keep_steps must be two numbers of 0 or more"),
        (dict(task="ti2v-5B", attention="int8", skip_softmax=1.0), "--skip_softmax must be from 0 to below 1, got 1.0"),
        (dict(task="ti2v-5B", keep_steps=(1, 1)), "--keep_steps is for attention in 8 bits, --attention is auto"),
        (dict(task="ti2v-5B", attention="sdpa", skip_softmax=0.1), "--skip_softmax is for attention in 8 bits"),
    ],
)
def test_config_refuses(options, says):
    with pytest.raises(WanFastError, match=says):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(num_frames=80), "take 77 or 81"),
        (dict(num_frames=0), "take 1"),
        (dict(num_steps=0), "from 1 to 1000"),
        (dict(size=(0, 64)), "positive"),
        (dict(shift=-1.0), "--sample_shift"),
        (dict(fps=float("nan")), "--fps"),
        (dict(guidance_scale=(3.0, float("inf"))), "finite"),
        (dict(solver="ddim"), "unipc dpm"),
        (dict(seed=2**63), "below"),
        (dict(image="no/such.png"), "is not a file"),
        (dict(noise="no/such.safetensors"), "is not a file"),
        (dict(num_clip="2"), "num_clip must be a whole number, got '2'; see --num_clip in --help"),
        (dict(shift="3"), "shift must be a number, got '3'; see --sample_shift in --help"),
        (dict(image=5), "image must be a text, got 5; see --image in --help"),
        (dict(start_from_ref=1), "start_from_ref must be True or False, got 1; see --start_from_ref in --help"),
    ],
)
def test_request_refuses(options, says):
    with pytest.raises(WanFastError, match=says):
        Request(prompt="a cat", **options)


def test_resolve_fills_in_the_official_defaults():
    wide = resolve(TASKS["t2v-A14B"], Request(prompt="a cat"))
    assert (wide.size, wide.num_frames, wide.fps) == ((1280, 720), 81, 16)
    assert (wide.num_steps, wide.shift, wide.guidance_scale) == (40, 12.0, (3.0, 4.0))
    assert resolve(TASKS["t2v-A14B"], Request(prompt="a cat", guidance_scale=5.0)).guidance_scale == (5.0, 5.0)
    five = resolve(TASKS["ti2v-5B"], Request(prompt="a cat"))
    assert (five.size, five.num_frames, five.fps, five.num_steps) == ((1280, 704), 121, 24, 50)
    assert resolve(TASKS["t2i-14B"], Request(prompt="a cat")).num_frames == 1
    assert resolve(TASKS["i2v-14B"], Request(prompt="a cat", image=__file__, size=(832, 480))).shift == 3.0


def test_the_checkpoints_defaults_stand_between_flags_and_task():
    defaults = Request(size=(128, 128), num_frames=33)
    request = resolve(TASKS["ti2v-5B"], Request(prompt="a cat", num_frames=5), defaults)
    assert (request.size, request.num_frames, request.num_steps) == ((128, 128), 5, 50)


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("t2v-1.3B", dict(prompt="a", image=__file__), "takes no --image"),
        ("t2v-1.3B", dict(), "needs a prompt"),
        ("t2v-1.3B", dict(prompt="  "), "needs a prompt"),
        ("t2v-1.3B", dict(prompt="a", size=(830, 480)), r"16-pixel grid .* nearest that is: 832\*480"),
        ("ti2v-5B", dict(prompt="a", size=(1280, 720)), r"32-pixel grid .* 1280\*704"),
        ("t2i-14B", dict(prompt="a", num_frames=5), "one picture"),
        ("ti2v-5B", dict(prompt="a", guidance_scale=(3.0, 4.0)), "has one expert, got two guidance scales"),
    ],
)
def test_resolve_refuses(task, options, says):
    with pytest.raises(WanFastError, match=says):
        resolve(TASKS[task], Request(**options))


def test_seed_is_drawn_only_where_there_is_none():
    assert with_seed(Request(prompt="a", seed=7)).seed == 7
    assert with_seed(Request(prompt="a", seed=-1)).seed >= 0
    assert len({with_seed(Request(prompt="a")).seed for _ in range(5)}) > 1


def test_values_as_typed():
    assert parse_size("1280*704") == parse_size("1280x704") == (1280, 704)
    assert (parse_guidance("5"), parse_guidance("3,4")) == (5.0, (3.0, 4.0))
    assert (parse_steps("2"), parse_steps("4,1"), parse_steps(" 0, 3 ")) == ((2, 2), (4, 1), (0, 3))
    assert [parse_bytes(t) for t in ("12GiB", "1.5GB", "800mib", "64", "auto")] == [
        12 * 2**30,
        1_500_000_000,
        800 * 2**20,
        64,
        None,
    ]
    for parse, text in (
        (parse_size, "1280"),
        (parse_size, "axb"),
        (parse_guidance, "1,2,3"),
        (parse_steps, "1,2,3"),
        (parse_bytes, "lots"),
    ):
        with pytest.raises(WanFastError, match=text):
            parse(text)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((1280, 704), (1280, 704)),
        ((1280, 720), (1248, 704)),
        ((1920, 1080), (1248, 704)),
        ((832, 480), (1248, 704)),
        ((1024, 1024), (960, 928)),
        ((720, 1280), (704, 1248)),
        ((1024, 768), (1088, 800)),
        ((800, 1200), (768, 1152)),
    ],
)
def test_size_follows_the_picture_as_officially(image, size):
    assert best_size((1280, 704), image, 32) == size


@given(st.integers(64, 4096), st.integers(64, 4096), st.integers(1, 10_000), st.integers(1, 10_000))
def test_size_stays_on_the_grid_and_within_the_area(width, height, image_width, image_height):
    try:
        w, h = best_size((width, height), (image_width, image_height), 32)
    except WanFastError as error:
        assert "too small" in str(error)
        return
    assert w % 32 == h % 32 == 0
    assert 0 < w * h <= width * height


def test_task_table():
    assert len(TASKS) == 15
    for name, spec in TASKS.items():
        assert spec.name == name
        assert spec.dim == 128 * spec.num_heads
        assert spec.default_size in spec.sizes
        assert spec.num_frames % 4 == 1 or spec.kind == "speech"
        assert all(side % spec.vae_spec.grid == 0 for size in spec.sizes for side in size)
        assert spec.needs - spec.takes <= {"prompt"}
    for vae in VAES.values():
        assert len(vae.mean) == len(vae.std) == vae.channels
    assert TASKS["flf2v-14B"].negative_prompt.startswith("镜头切换，镜头晃动，色调艳丽，")
    # the released prompts, byte for byte
    for task, digest in (("ti2v-5B", "ce96e0324e4b54ce"), ("s2v-14B", "98afffdba82fbb1f")):
        assert hashlib.sha256(TASKS[task].negative_prompt.encode()).hexdigest()[:16] == digest
