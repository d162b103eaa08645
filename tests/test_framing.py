"""The size and length of clips: the official formulas' own results, and what is refused."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from clips_of import noise, write_clip
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.framing import sampled, size_by_area
from wan_fast.planning import plan

P720, P480 = (1280, 720), (832, 480)


@pytest.mark.parametrize(
    ("area", "picture", "size"),
    [
        # (width, height); the floors work on the raw product
        (P480, (832, 480), (832, 464)),
        (P480, (480, 832), (480, 832)),
        (P720, (1280, 720), (1280, 720)),
        (P720, (1920, 1080), (1280, 720)),
        (P720, (1024, 1024), (960, 960)),
        (P720, (832, 480), (1248, 720)),
        (P720, (1024, 768), (1104, 816)),
        (P720, (800, 1200), (768, 1168)),
        (P480, (1280, 720), (832, 464)),
        (P480, (1024, 1024), (624, 624)),
        (P480, (1024, 768), (720, 544)),
        ((64, 64), (101, 67), (64, 48)),
    ],
)
def test_size_by_area_is_the_official_one(area, picture, size):
    assert size_by_area(area, picture, 8) == size
    assert size_by_area(area[::-1], picture, 8) == size


@given(st.integers(64, 1280), st.integers(64, 1280), st.integers(16, 4000), st.integers(16, 4000))
def test_size_by_area_is_on_the_grid_and_within_the_area(width, height, picture_width, picture_height):
    try:
        w, h = size_by_area((width, height), (picture_width, picture_height), 8)
    except WanFastError:
        assert min(picture_width, picture_height) * width * height < 16**2 * 2 * max(picture_width, picture_height)
        return
    assert w % 16 == h % 16 == 0 and w * h <= width * height
    # numpy's square roots and floors, as the official code has them
    aspect = picture_height / picture_width
    rows, columns = (
        round(np.sqrt(width * height * shape) // 8 // 2 * 2) for shape in (np.float64(aspect), 1 / np.float64(aspect))
    )
    assert (h, w) == (8 * rows, 8 * columns) or sqrt(width * height / aspect) != np.sqrt(width * height * (1 / aspect))


def even(count, rate=16.0):
    return [(i / rate, (i + 1) / rate) for i in range(count)]


def official_sampling(size, times, area, budget):
    """Written out with numpy, by the document."""
    (w, h), spans = size, np.array(times)
    area_z = min(budget, area[0] * area[1] / 256, (h // 16) * (w // 16))
    latent = min((len(spans) - 1) // 4 + 1, int(budget / area_z))
    target = min(area_z, int(budget / latent))
    rows = round(np.sqrt(target * (h / w)))
    columns = int(target / rows)
    count = 4 * (latent - 1) + 1
    at = np.linspace(0, spans[-1].mean(), count)
    inside = (spans[None, :, 0] <= at[:, None]) & (at[:, None] <= spans[None, :, 1])
    return (columns * 16, rows * 16), tuple(inside.argmax(axis=1).tolist())


@pytest.mark.parametrize("size", [(1280, 720), (832, 480), (640, 360), (1920, 1080), (720, 1280), (500, 333), (96, 2000)])
@pytest.mark.parametrize("count", [1, 4, 5, 80, 81, 100, 400])
@pytest.mark.parametrize(("area", "budget"), [(P720, 75600), (P480, 32760)])
def test_sampling_is_the_official_one(size, count, area, budget):
    for rate in (16.0, 23.976, 30.0):
        found = sampled(size, even(count, rate), area, 81)
        assert found == official_sampling(size, even(count, rate), area, budget)
        (w, h), frames = found
        assert len(frames) % 4 == 1 and (w // 16) * (h // 16) * ((len(frames) - 1) // 4 + 1) <= budget
        assert frames[0] == 0 and frames[-1] == (count - 1 if len(frames) > 1 else 0)


def test_sampling_goes_by_the_times_of_the_frames():
    uneven = [(0.0, 0.01), (0.01, 0.02), (0.02, 0.03), (0.03, 1.0), (1.0, 1.1)]
    assert sampled((64, 64), uneven, (64, 64), 5)[1] == (0, 3, 3, 3, 4)


def test_a_shorter_clip_is_a_smaller_budget():
    assert len(sampled((640, 352), even(200), (640, 352), 33)[1]) == 33
    assert sampled((640, 352), even(200), (640, 352), 1) == ((640, 352), (0,))
    assert (
        len(sampled((320, 176), even(200), (640, 352), 33)[1]) == 4 * 35 + 1
    )  # a quarter of the area: 36 latent frames, not 9


@pytest.fixture
def planned(tmp_path):
    """(task, **request) -> its plan, of the released models' sizes."""
    for name, size in {"a": (96, 64), "b": (64, 96), "tiny": (3, 200), "line": (1, 2000)}.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    for name, (frames, width) in {"video": (13, 96), "short": (9, 96), "narrow": (13, 80), "little": (5, 12)}.items():
        write_clip(tmp_path / f"{name}.mkv", noise(frames, 64, width))
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")

    def planned(task, size=(96, 64), num_frames=9, **given):
        files = {
            name: tuple(str(tmp_path / each) for each in value) if isinstance(value, tuple) else str(tmp_path / value)
            for name, value in given.items()
        }
        config = EngineConfig(task=task, device="cpu", vram=2**60)
        return plan(config, Request(prompt="x", size=size, num_frames=num_frames, seed=0, **files))

    return planned


def test_references_come_before_the_clip(planned):
    alone, todo = (planned("vace-1.3B", src_ref_images=files) for files in ((), ("a.png", "b.png")))
    assert alone.latent_shape == (16, 3, 8, 12) and todo.latent_shape == (16, 5, 8, 12)
    assert (alone.tokens, todo.tokens) == (72, 120) and todo.framing.leading == 2
    assert todo.flops["decode"] == alone.flops["decode"] and todo.flops["denoise"] > alone.flops["denoise"]


def test_footage_gives_shape_and_length(planned):
    todo = planned("vace-1.3B", src_video="video.mkv", size=(64, 96), num_frames=81)
    assert todo.request.size == (96, 64) and todo.request.num_frames == len(todo.framing.frames) == 13
    # a larger area has tokens for more frames, which are not taken where their number was said
    assert planned("vace-1.3B", src_video="video.mkv", size=(192, 128), num_frames=5).request.num_frames == 5
    assert "--src_video has 13 frames, enough for 13" in todo.warnings
    assert not any("enough" in warning for warning in planned("vace-1.3B", src_video="video.mkv", num_frames=13).warnings)
    assert planned("vace-1.3B", src_video="video.mkv", num_frames=None).request.num_frames == 13


def test_other_lengths_between_two_pictures_are_said_to_be_beyond_the_official_code(planned):
    pictures = {"first_frame": "a.png", "last_frame": "a.png"}
    said = "33 frames: the official code makes 81 between two pictures"
    assert said in planned("flf2v-14B", num_frames=33, **pictures).warnings
    assert not any("official" in warning for warning in planned("flf2v-14B", num_frames=81, **pictures).warnings)


@pytest.mark.parametrize(
    ("task", "given", "says"),
    [
        ("i2v-14B", {}, "task i2v-14B needs --image, got none; add --image FILE"),
        ("flf2v-14B", {"first_frame": "a.png"}, "needs --last_frame, got none"),
        ("flf2v-14B", {"first_frame": "a.png", "last_frame": "b.png"}, "is 96x64 pixels, --last_frame 64x96; crop or scale"),
        ("flf2v-14B", {"first_frame": "a.png", "last_frame": "a.png", "num_frames": 1}, "needs 5 frames or more .* got 1"),
        ("i2v-14B", {"image": "a.png", "src_video": "video.mkv"}, "takes no --src_video .* vace-1.3B vace-14B"),
        ("t2v-1.3B", {"src_ref_images": ("a.png", "b.png")}, "takes no --src_ref_images .*a.png,"),
        ("i2v-14B", {"image": "tiny.png", "size": (64, 64)}, "too small for a picture of 3\\*200"),
        ("i2v-14B", {"image": "broken.mp4"}, "picture .*broken.mp4"),
        ("vace-1.3B", {"src_mask": "video.mkv"}, "--src_mask .* there is none; give both"),
        ("vace-1.3B", {"src_video": "video.mkv", "src_mask": "short.mkv"}, "--src_mask has 9 frames, --src_video 13 frames"),
        (
            "vace-1.3B",
            {"src_video": "video.mkv", "src_mask": "narrow.mkv"},
            "--src_mask has 80x64 pixels, --src_video 96x64 pixels; make",
        ),
        ("vace-1.3B", {"src_video": "broken.mp4"}, "--src_video .*broken.mp4"),
        ("vace-1.3B", {"src_video": "little.mkv"}, "--src_video is 12x64 pixels, smaller than 16x16"),
        ("vace-1.3B", {"src_ref_images": ("a.png",) * 9}, "names 9 pictures, the most that are taken is 8"),
        (
            "vace-1.3B",
            {"src_ref_images": ("line.png",)},
            "line.png' is 1x2000 pixels, of which nothing is left in a clip of 96x64",
        ),
        (
            "vace-1.3B",
            {"src_video": "video.mkv", "src_ref_images": ("line.png",)},
            "of which nothing is left in a clip of 96x64",
        ),
        ("vace-1.3B", {"src_ref_images": ("a.png", "broken.mp4")}, "picture .*broken.mp4"),
        ("vace-1.3B", {"src_ref_images": ("a.png", "absent.png")}, "--src_ref_images .*absent.png' is not a file"),
        ("vace-1.3B", {"size": (100, 64)}, "not on the 16-pixel grid"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights(planned, task, given, says):
    with pytest.raises(WanFastError, match=says):
        planned(task, **given)


def test_the_strength_of_hints_is_of_vace_alone(planned):
    request = Request(prompt="x", context_scale=0.5)
    with pytest.raises(WanFastError, match=r"--context_scale is of the vace tasks, --task is t2v-1\.3B"):
        plan(EngineConfig(task="t2v-1.3B", device="cpu", vram=2**60), request)
    for scale in (-1, 11, float("nan")):
        with pytest.raises(WanFastError, match="--context_scale must be from 0 to 10"):
            replace(request, context_scale=scale)
