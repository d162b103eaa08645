import os
from fractions import Fraction
from itertools import pairwise

import clips_of
import numpy as np
import pytest
import torch
from clips_of import noise, write_clip
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan_fast import media
from wan_fast.errors import WanFastError


def picture(height=20, width=30, seed=0):
    """Pixels [H, W, 3] uint8 of a gradient; no turn or mirror image of it equals it."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y + seed) % 256], -1).astype(np.uint8)


def saved(path, image, **how):
    image.save(path, **how)
    return path


def pixels_of(path):
    image = media.read_image(path)
    assert image.mode == "RGB" and media.image_size(path) == image.size
    return np.asarray(image).astype(int)


def refusal(call, *arguments):
    """The sentence in which a call is refused; it is one line that says what to do."""
    with pytest.raises(WanFastError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


def frames_of(footage):
    return np.stack([frame.numpy() for frame in media.read_frames(footage, range(len(footage.times)))])


# pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "LAB"])
def test_opaque_pictures_of_every_mode(tmp_path, mode):
    image = Image.fromarray(picture())
    if mode == "LAB":
        from PIL import ImageCms

        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(image, to_lab)
        assert abs(np.asarray(image.convert("RGB")).astype(int) - picture()).mean() < 3
    else:
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    file = saved(tmp_path / "x.tiff", image)
    expected = picture()
    if mode in ("1", "L", "LA"):
        expected = np.asarray(image.convert("L"))[..., None]
    elif mode in ("P", "PA", "LAB"):
        expected = np.asarray(image.convert("RGB"))
    assert abs(pixels_of(file) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["HSV", "YCbCr"])
def test_modes_that_files_seldom_keep(mode):
    image = media._rgb(Image.fromarray(picture()).convert(mode), None)
    assert image.mode == "RGB" and abs(np.asarray(image).astype(int) - picture()).max() <= 8


VALUES = np.array([[0, 1, 127, 128, 129, 257, 300, 32768, 40000, 65408, 65535]], np.uint16)
SCALED = np.rint(VALUES / 257).astype(int)[..., None]


@pytest.mark.parametrize("kind", ["png", "big.png", "I;16.tiff", "I;16B.tiff", "I.tiff", "pgm", "jp2"])
def test_grey_of_16_bits_is_scaled(tmp_path, kind):
    file = tmp_path / f"x.{kind}"
    if kind == "big.png":
        file.write_bytes(clips_of.png(VALUES))
    elif kind == "pgm":
        file.write_bytes(b"P5 11 1 65535\n" + VALUES.astype(">u2").tobytes())
    elif kind == "I;16B.tiff":
        Image.frombytes("I;16B", (11, 1), VALUES.astype(">u2").tobytes()).save(file)
    elif kind == "I.tiff":
        Image.fromarray(VALUES.astype(np.int32)).save(file)
    else:
        Image.fromarray(VALUES).save(file)
    assert (pixels_of(file) == SCALED).all()


def test_colours_of_16_bits_are_scaled(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(clips_of.png(np.repeat(VALUES[..., None], 3, -1)))
    assert abs(pixels_of(file) - SCALED).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    dark = np.full((2, 2), 200)
    for name, content in {"x.png": clips_of.png(dark), "x.pgm": b"P5 2 2 65535\n" + dark.astype(">u2").tobytes()}.items():
        (tmp_path / name).write_bytes(content)
        assert (pixels_of(tmp_path / name) == 1).all()
    # a mode of 32 bits says nothing of the range
    file = saved(tmp_path / "x.tiff", Image.fromarray(dark.astype(np.int32)))
    assert (pixels_of(file) == 200).all()


def test_one_transparent_grey_of_16_bits(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(clips_of.png(VALUES, transparent=300))
    assert (pixels_of(file) == np.where(VALUES == 300, 255, SCALED[..., 0])[..., None]).all()


@pytest.mark.parametrize(("top", "scale"), [(1, 255), (0.5, 255), (255, 1), (200.4, 1)])
def test_floats(tmp_path, top, scale):
    values = np.linspace(0, top, 8, dtype=np.float32)[None]
    file = saved(tmp_path / "x.tiff", Image.fromarray(values))
    assert (pixels_of(file) == np.rint(values * scale)[..., None]).all()


@pytest.mark.parametrize(
    "values",
    [np.float32([-0.1, 1]), np.float32([0, 300]), np.float32([0, np.nan]), np.int32([-1, 5]), np.int32([0, 65536])],
    ids=lambda values: f"{values.dtype}{values.tolist()}",
)
def test_values_of_no_range_are_refused(tmp_path, values):
    file = saved(tmp_path / "x.tiff", Image.fromarray(values[None]))
    assert "its values go from" in refusal(media.read_image, file)


def test_alpha_is_laid_on_white(tmp_path):
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 51, 255
    image = Image.fromarray(np.concatenate([picture(), alpha], -1))
    expected = np.rint(picture() * (alpha / 255) + 255 * (1 - alpha / 255))
    for suffix in ("png", "webp"):
        file = saved(tmp_path / f"x.{suffix}", image, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        assert abs(pixels_of(file) - expected).max() <= 1
    grey = saved(tmp_path / "grey.png", image.convert("LA"))
    assert (pixels_of(grey)[:, :10] == 255).all() and abs(
        pixels_of(grey)[:, 20:, 0] - np.asarray(image.convert("L"))[:, 20:]
    ).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_one_transparent_colour_becomes_white(tmp_path, mode):
    image = Image.new(mode, (4, 3), 0)
    image.putpixel((1, 2), (9, 8, 7) if mode == "RGB" else 1)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 100, 50])
    file = saved(tmp_path / "x.png", image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    found = pixels_of(file)
    assert found[2, 1].tolist() == {"P": [200, 100, 50], "RGB": [9, 8, 7], "L": [1, 1, 1], "1": [255, 255, 255]}[mode]
    found[2, 1] = 255
    assert (found == 255).all()


def test_opaque_alpha_changes_nothing(tmp_path):
    file = saved(tmp_path / "x.png", Image.fromarray(picture()).convert("RGBA"))
    assert (pixels_of(file) == picture()).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    upright = picture()
    # the stored picture is the upright one seen in a turned or mirrored way; EXIF 2.3, 4.6.4
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    file = saved(tmp_path / f"x.{suffix}", Image.fromarray(np.ascontiguousarray(stored[orientation])), exif=exif, **how)
    assert media.image_size(file) == (30, 20)
    assert abs(pixels_of(file) - upright).max() <= (6 if suffix == "jpg" else 0)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    for suffix in ("png", "webp", "jpg"):
        file = saved(tmp_path / f"x.{suffix}", Image.fromarray(picture()), exif=b"Exif\0\0nonsense")
        assert media.image_size(file) == (30, 20)


def test_exif_orientation_of_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    file = saved(tmp_path / "x.png", Image.fromarray(VALUES), exif=exif)
    assert (pixels_of(file)[:, 0] == SCALED[0]).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_several_pictures_are_refused(tmp_path, suffix):
    images = [Image.fromarray(frame) for frame in noise(3)]
    several = saved(tmp_path / f"x.{suffix}", images[0], save_all=True, append_images=images[1:])
    said = refusal(media.read_image, several)
    assert "3 pictures; give one picture" in said and f"x.{suffix}'" in said
    one = saved(tmp_path / f"y.{suffix}", images[0])
    assert media.image_size(one) == (64, 48)


def test_a_phone_photo_with_further_versions_is_one_picture(tmp_path):
    images = [Image.fromarray(picture(seed=seed)) for seed in (0, 100)]
    file = saved(tmp_path / "x.jpg", images[0], format="MPO", save_all=True, append_images=images[1:], quality=100)
    assert Image.open(file).n_frames == 2
    assert abs(pixels_of(file)[..., :2] - picture()[..., :2]).max() <= 16


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".gif", ".bmp"])
@pytest.mark.parametrize("keep", [0, 5, 30, 0.5])
def test_part_of_a_picture_is_refused(tmp_path, suffix, keep):
    file = saved(tmp_path / f"x{suffix}", Image.fromarray(noise(1)[0]).effect_spread(40))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    said = refusal(media.image_size, file)
    assert f"picture {str(file)!r} " in said and ("empty" in said) == (keep == 0)


def test_what_is_no_picture_is_refused(tmp_path):
    video = write_clip(tmp_path / "x.mp4", noise())
    assert "is no picture, or of no known format" in refusal(media.read_image, video)
    assert "No such file" in refusal(media.read_image, tmp_path / "none.png")
    assert "Is a directory" in refusal(media.read_image, tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    file = saved(tmp_path / "x.png", Image.fromarray(picture()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "is too large" in refusal(media.read_image, file) and "scale it down" in refusal(media.read_image, file)


# videos

WRITERS = {
    "x.mp4": {},
    "x.mkv": {},
    "y.mp4": dict(codec="libx264", options={"bf": "3"}),
    "z.mkv": dict(codec="libx264", options={"bf": "3"}),
    "x.mov": dict(codec="png", pix_fmt="rgb24"),
    "x.webm": dict(codec="libvpx-vp9", options={"crf": "4", "b:v": "0"}),
    "x.avi": dict(codec="mpeg4", options={"bf": "2", "qmax": "2", "qmin": "1"}),
    "x.ts": dict(codec="libx264", options={"bf": "2"}),
    "x.gif": {},
    "a:b-%03d.mp4": {},
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rate", [16, 29.97])
def test_frames_and_times_of_every_container(tmp_path, name, rate):
    frames = noise(9)
    file = write_clip(tmp_path / name, frames, rate, **WRITERS[name])
    footage = media.examine(file, "--src_video")
    assert (footage.path, footage.size, len(footage.times)) == (file, (64, 48), 9)
    # the clock of Matroska counts milliseconds, that of a GIF hundredths
    edges = np.arange(10) / rate
    assert footage.times[0][0] == 0
    assert abs(np.array(footage.times) - np.stack([edges[:-1], edges[1:]], -1)).max() < (0.011 if name == "x.gif" else 0.002)
    assert all(before[1] == after[0] for before, after in pairwise(footage.times))
    found = frames_of(footage)
    assert found.shape == frames.shape and found.dtype == np.uint8
    error = abs(found.astype(int) - frames)
    assert error.max() == 0 if WRITERS[name].get("codec", "png") == "png" and name != "x.gif" else error.mean() < 30
    # each frame is itself and no neighbour
    distances = abs(found[:, None].astype(int) - frames[None]).mean((2, 3, 4))
    assert (distances.argmin(1) == np.arange(9)).all()


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "y.mp4", "x.webm", "x.ts"])
def test_uneven_times_that_do_not_start_at_0(tmp_path, name):
    times = [2, 2.1, 2.15, 4, 4.001, 9]
    file = write_clip(tmp_path / name, noise(), times=times, **WRITERS[name])
    footage = media.examine(file, "--src_video")
    assert [start for start, _ in footage.times] == pytest.approx([0, 0.1, 0.15, 2, 2.001, 7], abs=1e-6)
    # Matroska has a last duration, that of the rate; MPEG-TS has none: the average; MP4 depends on the writer
    ends = {".ts": [8.4], ".mp4": [7.0625, 8.4]}.get(file.suffix, [7.0625])
    assert footage.times[-1][1] in [pytest.approx(end, abs=1e-3) for end in ends]


def test_a_video_without_times_has_those_of_its_rate(tmp_path):
    footage = media.examine(write_clip(tmp_path / "x.h264", noise(), 16, codec="libx264"), "--src_video")
    assert [edge for span in footage.times for edge in span] == [i / 16 for i in range(6) for i in (i, i + 1)]


def test_durations_of_gif_frames(tmp_path):
    images = [Image.fromarray(frame) for frame in noise(3)]
    file = saved(tmp_path / "x.gif", images[0], save_all=True, append_images=images[1:], duration=[100, 300, 200])
    footage = media.examine(file, "--src_video")
    assert footage.times == ((0, 0.1), (0.1, 0.4), (0.4, 0.6))
    alike = abs(frames_of(footage).astype(int) - noise(3)).mean()
    assert alike < 20


MILLISECONDS = st.lists(st.one_of(st.none(), st.integers(-1000, 100_000)), min_size=1, max_size=30)


@given(MILLISECONDS, st.integers(0, 2000), st.integers(1, 120))
def test_spans(milliseconds, last, rate):
    starts = [None if value is None else Fraction(value, 1000) for value in milliseconds]
    spans = media._spans(starts, Fraction(last, 1000), Fraction(rate))
    assert len(spans) == len(starts) and spans[0][0] == 0
    assert all(start < end for start, end in spans)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    shift = float(starts[0] or 0)
    for said, (before, _), (found, _) in zip(starts[1:], spans, spans[1:], strict=False):
        holds = said is not None and said - shift > before + 1e-9
        assert found == pytest.approx(float(said) - shift if holds else before + 1 / rate, abs=1e-6)
    average = spans[-1][0] / (len(spans) - 1) if len(spans) > 1 else 1 / rate
    assert spans[-1][1] - spans[-1][0] == pytest.approx(last / 1000 or average, rel=1e-6)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_turned_video_comes_upright(tmp_path, rotation):
    """As a phone writes it: the sensor's picture lies on its side, and a player turns it clockwise."""
    upright = np.stack([picture(48, 32, seed) for seed in range(3)])
    lying = np.rot90(upright, rotation // 90, axes=(1, 2))  # counter-clockwise
    file = write_clip(tmp_path / "x.mp4", np.ascontiguousarray(lying), rotation=rotation)
    footage = media.examine(file, "--src_video")
    assert footage.size == (32, 48)
    assert (frames_of(footage) == upright).all()


def test_every_display_matrix():
    """The definition of libavutil/display.h, pixel by pixel, mirrors included."""
    import struct
    from types import SimpleNamespace

    stored = picture(4, 6)
    for a, b, c, d in [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, -1, -1, 0),
    ]:
        matrix = struct.pack("=9i", *(65536 * x for x in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
        frame = SimpleNamespace(
            side_data={"DISPLAYMATRIX": matrix},
            to_ndarray=lambda format: stored,
            format=SimpleNamespace(components=()),
            width=6,
            height=4,
        )
        shown = media._upright(frame)
        assert media._upright_size(frame) == (shown.shape[1], shown.shape[0])
        left = min(a * x + c * y for x in (0, 5) for y in (0, 3))
        top = min(b * x + d * y for x in (0, 5) for y in (0, 3))
        for y in range(4):
            for x in range(6):
                assert (shown[b * x + d * y - top, a * x + c * y - left] == stored[y, x]).all()


def test_an_angle_that_is_no_quarter_turn_is_refused(tmp_path):
    file = write_clip(tmp_path / "x.mp4", noise(), rotation=45)
    assert "is to be shown at an angle" in refusal(media.examine, file, "--src_video")


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_odd_sizes_and_a_single_frame(tmp_path, name):
    footage = media.examine(write_clip(tmp_path / name, noise(1, 47, 63), 10), "--src_video")
    assert footage.size == (63, 47) and footage.times == ((0, 0.1),)
    assert (frames_of(footage) == noise(1, 47, 63)).all()


def test_transparent_frames_are_laid_on_white(tmp_path):
    frames = np.concatenate([noise(), np.zeros((6, 48, 64, 1), np.uint8)], -1)
    frames[:, :, 32:, 3] = 255
    file = write_clip(tmp_path / "x.mov", frames, codec="png", pix_fmt="rgba")
    found = frames_of(media.examine(file, "--src_video"))
    assert (found[:, :, :32] == 255).all() and (found[:, :, 32:] == noise()[:, :, 32:]).all()


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_sound_beside_the_video(tmp_path, name):
    footage = media.examine(write_clip(tmp_path / name, noise(), sound=True), "--src_video")
    assert len(footage.times) == 6 and (frames_of(footage) == noise()).all()


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_refused(tmp_path, cover):
    file = clips_of.write_sound(tmp_path / "x.flac", cover)
    assert "--src_video" in refusal(media.examine, file, "--src_video")
    assert "holds only sound; give a video" in refusal(media.examine, file, "--src_video")


def test_metadata_of_another_encoding(tmp_path):
    file = write_clip(tmp_path / "x.mkv", noise(), title="ABCDEFGH")
    content = file.read_bytes()
    assert content.count(b"ABCDEFGH") == 1
    file.write_bytes(content.replace(b"ABCDEFGH", b"\xe4\xf6\xfc\xe4\xf6\xfc\xe4\xf6"))
    assert media.examine(file, "--src_video").size == (64, 48)


@pytest.mark.parametrize("indices", [[], [0], [5], [1, 1, 1, 4], [0, 2, 2, 5, 5]])
def test_chosen_frames(tmp_path, indices):
    footage = media.examine(write_clip(tmp_path / "x.mp4", noise()), "--src_video")
    found = list(media.read_frames(footage, indices))
    assert all(frame.dtype == torch.uint8 and frame.is_contiguous() for frame in found)
    assert [frame.tolist() for frame in found] == [noise()[index].tolist() for index in indices]


@pytest.mark.parametrize("indices", [[2, 1], [-1], [6]])
def test_indices_out_of_order_or_range(tmp_path, indices):
    footage = media.examine(write_clip(tmp_path / "x.mp4", noise()), "--src_video")
    with pytest.raises(IndexError, match=r"of 6"):
        list(media.read_frames(footage, indices))


def test_frames_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    footage = media.examine(write_clip(tmp_path / "x.mp4", noise()), "--src_video")
    converted = []
    convert = media._upright
    monkeypatch.setattr(media, "_upright", lambda frame: converted.append(frame.pts) or convert(frame))
    frames = media.read_frames(footage, [1, 1, 3, 5])
    for expected in (1, 1, 2, 3):
        next(frames)
        assert len(converted) == expected


@pytest.mark.parametrize("name", ["x.mp4", "faststart.mp4", "faststart.mov", "x.mkv", "x.webm", "x.ts", "x.avi"])
@pytest.mark.parametrize("keep", [0, 0.01, 0.3, 0.7, 0.9])
def test_part_of_a_video_is_refused(tmp_path, name, keep):
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    how = WRITERS.get(name, {"movflags": "faststart"})
    if name == "faststart.mov":  # a decoder that fills up what a frame lacks
        how = dict(codec="mjpeg", pix_fmt="yuvj420p", options={"q:v": "1"}, **how)
    file = write_clip(tmp_path / name, frames, **how)
    assert len(media.examine(file, "--src_video").times) == 20
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    said = refusal(media.examine, file, "--src_video")
    assert said.startswith(f"--src_video {str(file)!r} ") and ("is an empty file" in said) == (keep == 0)


def test_garbage_in_a_video_is_refused(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    for name, how in {"x.mp4": dict(codec="libx264"), "x.avi": dict(codec="mpeg4")}.items():
        file = write_clip(tmp_path / name, frames, **how)
        content = bytearray(file.read_bytes())
        at = len(content) // 2
        if name == "x.avi":  # inside a frame: the reader skips one whose header is broken
            at = content.index(b"00dc", at) + 28
        content[at : at + 400] = np.random.default_rng(1).bytes(400)
        file.write_bytes(content)
        assert "encode it again" in refusal(media.examine, file, "--src_video")


@pytest.mark.parametrize("how", [dict(codec="mpeg4"), dict(codec="libvpx-vp9")], ids=["mpeg4", "vp9"])
def test_garbage_in_the_last_frame_is_refused(tmp_path, how):
    import av

    file = write_clip(tmp_path / "x.mp4", noise(20), **how)
    with av.open(str(file)) as container:
        at = max(packet.pos for packet in container.demux(video=0) if packet.size)
    content = bytearray(file.read_bytes())
    content[at : at + 60] = np.random.default_rng(1).bytes(60)
    file.write_bytes(content)
    assert "encode it again" in refusal(media.examine, file, "--src_video")


def test_a_codec_that_is_not_known(tmp_path):
    file = write_clip(tmp_path / "x.mp4", noise())
    file.write_bytes(file.read_bytes().replace(b"avc1", b"zzzz"))
    assert "is no video that can be decoded" in refusal(media.examine, file, "--src_video")


def test_a_video_of_two_sizes_is_refused(tmp_path):
    parts = [write_clip(tmp_path / f"{height}.ts", noise(3, height), codec="libx264") for height in (48, 32)]
    file = tmp_path / "x.ts"
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert "changes its size, from (64, 48) to (64, 32) in frame 3" in refusal(media.examine, file, "--src_video")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "ICO", "AVIF"])
def test_a_picture_is_no_video(tmp_path, kind):
    from PIL import features

    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    for name in ("x.mp4", f"x.{kind.lower()}"):
        file = saved(tmp_path / name, Image.fromarray(picture()), format=kind)
        assert "is a picture" in refusal(media.examine, file, "--src_video")


def test_an_animation_that_is_no_video_for_ffmpeg(tmp_path):
    images = [Image.fromarray(frame) for frame in noise(3)]
    webp = saved(tmp_path / "x.webp", images[0], save_all=True, append_images=images[1:])
    assert "an animation of a picture format" in refusal(media.examine, webp, "--src_video")
    # this one is
    apng = saved(tmp_path / "x.png", images[0], save_all=True, append_images=images[1:], duration=100)
    footage = media.examine(apng, "--src_video")
    assert len(footage.times) == 3 and (frames_of(footage) == noise(3)).all()


def test_what_is_no_video_is_refused(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("one line\n" * 200)
    assert "is no video that can be decoded" in refusal(media.examine, text, "--src_video")
    noise_file = tmp_path / "x.mp4"
    noise_file.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "is no whole video (Invalid data" in refusal(media.examine, noise_file, "--src_video")
    assert "No such file" in refusal(media.examine, tmp_path / "none.mp4", "--src_video")
    assert "Is a directory" in refusal(media.examine, tmp_path, "--src_video")


def test_a_video_without_frames_is_refused(tmp_path):
    file = tmp_path / "x.y4m"
    file.write_bytes(b"YUV4MPEG2 W64 H48 F16:1 Ip A1:1 C420jpeg\n")
    assert "holds no frames" in refusal(media.examine, file, "--src_video")


def test_a_video_is_examined_once(tmp_path, monkeypatch):
    opened = []
    real = media._opened
    monkeypatch.setattr(media, "_opened", lambda path: opened.append(path) or real(path))
    monkeypatch.chdir(tmp_path)
    file = write_clip(tmp_path / "x.mp4", noise())
    first = media.examine(file, "--src_video")
    assert media.examine(file, "--src_mask") is first and media.examine(file.relative_to(tmp_path), "--src_video") is first
    assert len(opened) == 1
    write_clip(file, noise(3))
    assert len(media.examine(file, "--src_video").times) == 3
    os.utime(file, ns=(0, 0))
    media.examine(file, "--src_video")
    assert len(opened) == 3


@pytest.mark.parametrize("becomes", ["shorter", "smaller", "no video", "gone"])
def test_a_video_that_changes_after_it_was_examined(tmp_path, becomes):
    file = write_clip(tmp_path / "x.mp4", noise())
    footage = media.examine(file, "--src_video")
    if becomes == "shorter":
        write_clip(file, noise(3))
    elif becomes == "smaller":
        write_clip(file, noise(6, 32))
    elif becomes == "no video":
        file.write_bytes(b"no video")
    else:
        file.unlink()
    frames = media.read_frames(footage, [2, 4])
    said = refusal(list, frames)
    assert "has changed since it was examined" in said
    assert {"shorter": "3 frames, not 6", "smaller": "(64, 32)", "no video": "Invalid", "gone": "No such"}[becomes] in said
