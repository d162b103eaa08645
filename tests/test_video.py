import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sounds_of import clicks, heard, onsets, write_sound

from wan_fast import video
from wan_fast.config import WanFastError


def clip(frames=9, height=48, width=64):
    """A square that moves over a grey ground."""
    pixels = torch.full((frames, height, width, 3), 90, dtype=torch.uint8)
    for f in range(frames):
        pixels[f, 16:32, 4 * f : 4 * f + 16] = torch.tensor([220, 40, 30], dtype=torch.uint8)
    return pixels


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("fps", [16, 24, 29.97])
def test_a_written_clip_reads_back(tmp_path, suffix, fps):
    import av

    file = tmp_path / f"x{suffix}"
    video.write(clip(), file, fps)
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == ("h264" if suffix == ".mp4" else "vp9")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == (9, 48, 64, 3)
    assert abs(frames.astype(float) - clip().numpy()).mean() < 4
    assert list(tmp_path.iterdir()) == [file]


def test_gif_and_pictures(tmp_path):
    video.write(clip(), tmp_path / "x.gif", 20)
    with Image.open(tmp_path / "x.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (9, (64, 48), 50)
    video.write(clip(1), tmp_path / "x.png", 16)
    assert Image.open(tmp_path / "x.png").getpixel((5, 20)) == (220, 40, 30)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_chunks_make_the_file_that_the_whole_clip_makes(tmp_path, suffix):
    video.write(clip(), tmp_path / f"whole{suffix}", 16)
    with video.writing(tmp_path / f"chunks{suffix}", 16) as add:
        for chunk in clip().split([1, 4, 3, 1]):
            add(chunk)
    whole, chunks = (tmp_path / f"{name}{suffix}" for name in ("whole", "chunks"))
    frames = [Image.open(file).n_frames if suffix == ".gif" else read(file) for file in (whole, chunks)]
    assert frames[0] == frames[1]


def read(file):
    """The pixels of a video, as bytes."""
    import av

    with av.open(str(file)) as container:
        return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))


def test_bytes_are_written_before_the_last_frame_is_there(tmp_path):
    noise = torch.randint(256, (120, 96, 96, 3), dtype=torch.uint8)
    with video.writing(tmp_path / "x.mp4", 16) as add:
        for chunk in noise.split(6)[:-1]:
            add(chunk)
        deadline = time.monotonic() + 60
        while not (sizes := [file.stat().st_size for file in tmp_path.iterdir()]) or max(sizes) < 1000:
            assert time.monotonic() < deadline, "nothing has been written"
            time.sleep(0.01)
        assert not (tmp_path / "x.mp4").exists()
        add(noise[-6:])
    assert len(read(tmp_path / "x.mp4")) == 120 * 96 * 96 * 3


def test_no_more_than_two_chunks_wait(tmp_path, monkeypatch):
    taken = []

    def slow(path, fps, codec):
        while (frames := (yield)) is not None:
            time.sleep(0.05)
            taken.append(frames)
        path.write_bytes(b"x")

    monkeypatch.setattr(video, "_video", slow)
    with video.writing(tmp_path / "x.mp4", 16) as add:
        for number in range(1, 7):
            add(clip(1))
            assert number - len(taken) <= 2 + 1  # two that wait, and the one just added
    assert len(taken) == 6


def test_what_fails_in_writing_is_raised(tmp_path):
    with (
        pytest.raises(WanFastError, match=r"x\.mp4' cannot be written .*libx264"),
        video.writing(tmp_path / "x.mp4", 16) as add,
    ):
        add(clip(2, 47, 64))  # yuv420p wants even sides
    with pytest.raises(WanFastError, match=r"x\.mp4"), video.writing(tmp_path / "x.mp4", 16) as add:
        for _ in range(4):
            add(clip(2, 47, 64))
    # what fails beside the writing is not told as if it were the file's
    with pytest.raises(PermissionError, match="another"), video.writing(tmp_path / "x.mp4", 16) as add:
        add(clip())
        raise PermissionError("another file")
    with pytest.raises(KeyboardInterrupt), video.writing(tmp_path / "x.mp4", 16) as add:
        add(clip())
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# sound


def sounding(tmp_path, *, channels=1, rate=48000, seconds=2.0, name="in.wav", codec=None, **how):
    return write_sound(tmp_path / name, clicks([0.25, 1.0, 1.5], rate, seconds, channels), rate, codec, **how)


def shown(file):
    """(start, end) in seconds of the frames in a file at 16 per second."""
    import av

    with av.open(str(file)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert np.diff(times) == pytest.approx(1 / 16, abs=2e-3)
    return times[0], times[-1] + 1 / 16


# (suffix, samples per second of the file): the longest that an encoder's last packet is over, in seconds
PACKETS = {(".mp4", 8000): 1024 / 8000, (".mp4", 44100): 1024 / 44100, (".mp4", 48000): 1024 / 48000, (".webm", 48000): 0.02}


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("channels", "rate"), [(1, 8000), (2, 44100), (2, 48000), (6, 48000)])
def test_sound_is_in_time_with_the_frames(tmp_path, suffix, channels, rate):
    file, source = tmp_path / f"x{suffix}", sounding(tmp_path, channels=channels, rate=rate)
    video.write(clip(32, width=192), file, 16, source)
    assert shown(file) == pytest.approx((0, 2), abs=2e-3)
    samples, found, start = heard(file)
    assert len(samples) == min(channels, 2) and found == (48000 if suffix == ".webm" else rate)
    assert start == 0 and 2 - 1e-3 <= samples.shape[1] / found <= 2 + PACKETS[suffix, found]
    for channel in samples:
        assert onsets(channel, found, start) == pytest.approx([0.25, 1.0, 1.5], abs=0.005)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", file.name]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_frames_say_how_long_a_file_is(tmp_path, suffix):
    file, source = tmp_path / f"x{suffix}", sounding(tmp_path, seconds=1.6)
    with video.writing(file, 16, source) as add:
        for chunk in clip(48, width=256).split(7):
            add(chunk)
    samples, rate, start = heard(file)
    assert shown(file) == pytest.approx((0, 3.0), abs=2e-3)
    assert 1.6 - 1e-3 <= start + samples.shape[1] / rate <= 1.6 + PACKETS[suffix, 48000]
    video.write(clip(13, width=192), file, 16, source)
    samples, rate, start = heard(file)
    assert shown(file) == pytest.approx((0, 13 / 16), abs=2e-3)
    assert 13 / 16 - 1e-3 <= start + samples.shape[1] / rate <= 13 / 16 + PACKETS[suffix, 48000]
    assert onsets(samples[0], rate, start) == pytest.approx([0.25], abs=0.005)


def test_frames_are_the_same_with_sound(tmp_path):
    video.write(clip(), tmp_path / "plain.mp4", 16)
    video.write(clip(), tmp_path / "sounding.mp4", 16, sounding(tmp_path))
    assert read(tmp_path / "plain.mp4") == read(tmp_path / "sounding.mp4")


def test_the_sound_of_a_video_and_of_a_compressed_file(tmp_path):
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    for source in (
        sounding(tmp_path, name="in.mkv", codec="pcm_s16le", video=frames),
        sounding(tmp_path, name="in.mp3", rate=44100),
        sounding(tmp_path, name="in.ogg", codec="libopus"),
    ):
        video.write(clip(32, width=192), tmp_path / "x.mp4", 16, source)
        samples, rate, start = heard(tmp_path / "x.mp4")
        assert onsets(samples[0], rate, start) == pytest.approx([0.25, 1.0, 1.5], abs=0.05), source


def test_sound_and_frames_lie_side_by_side_in_a_file(tmp_path):
    import av

    source = sounding(tmp_path, seconds=20.0)
    video.write(torch.randint(256, (320, 48, 64, 3), dtype=torch.uint8), tmp_path / "x.mp4", 16, source)
    with av.open(str(tmp_path / "x.mp4")) as container:
        packets = sorted((p for p in container.demux() if p.pos and p.size), key=lambda packet: packet.pos)
        times = {"audio": 0.0, "video": 0.0}
        for packet in packets:
            times[packet.stream.type] = float(packet.dts * packet.time_base)
            assert abs(times["audio"] - times["video"]) < 1.5


def test_gifs_and_pictures_have_no_sound_and_all_their_frames(tmp_path):
    source = sounding(tmp_path, seconds=0.25)
    video.write(clip(), tmp_path / "x.gif", 20, source)
    assert Image.open(tmp_path / "x.gif").n_frames == 9
    video.write(clip(1), tmp_path / "x.png", 16, source)
    assert Image.open(tmp_path / "x.png").getpixel((5, 20)) == (220, 40, 30)


def test_sound_that_fails_on_the_way_leaves_no_file(tmp_path):
    source = write_sound(tmp_path / "in.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 96000), 48000)
    content = source.read_bytes()
    source.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(WanFastError, match=r"sound .*in\.flac' has changed since it was read: it is no whole sound file"):
        video.write(clip(32, width=192), tmp_path / "x.mp4", 16, source)
    with pytest.raises(WanFastError, match="No such file"):
        video.write(clip(32, width=192), tmp_path / "x.mp4", 16, tmp_path / "none.wav")
    with (
        pytest.raises(WanFastError, match=r"x\.mp4' cannot be written .*libx264"),
        video.writing(tmp_path / "x.mp4", 16, sounding(tmp_path)) as add,
    ):
        add(clip(2, 47, 64))
    with pytest.raises(KeyboardInterrupt), video.writing(tmp_path / "x.mp4", 16, sounding(tmp_path)) as add:
        add(clip())
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.flac", "in.wav"]


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write(clip(), Path("a:b.mp4"), 16)
    assert [p.name for p in tmp_path.iterdir()] == ["a:b.mp4"]


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    with pytest.raises(WanFastError, match=r"cannot be written .*No space left"), video.whole(tmp_path / "x.mp4"):
        Path("/dev/full").write_text("x")


def test_nothing_is_left_of_a_failed_write(tmp_path):
    file = tmp_path / "x.mp4"
    file.write_text("the older file")
    with pytest.raises(KeyboardInterrupt), video.whole(file) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "the older file" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "frames", "image_only", "says"),
    [
        ("x.avi", 9, False, "'.avi'; for 9 frames it must be one of .mp4 .webm .gif"),
        ("x", 9, False, "'nothing'"),
        ("x.png", 9, False, "for 9 frames"),
        ("x.mp4", 1, True, "one picture it must be one of .png .jpg"),
        ("no/such/x.mp4", 9, False, "does not exist; create it first"),
    ],
)
def test_output_is_refused(tmp_path, name, frames, image_only, says):
    with pytest.raises(WanFastError) as error:
        video.check_output(tmp_path / name, frames, image_only)
    assert says in str(error.value)


def test_output_is_allowed(tmp_path):
    for name, frames, image_only in (("x.mp4", 9, False), ("x.MP4", 1, False), ("x.png", 1, False), ("x.png", 1, True)):
        video.check_output(tmp_path / name, frames, image_only)


def test_output_folder_that_cannot_be_written(tmp_path):
    for folder in ("/proc", "/sys"):  # not even root may write there
        with pytest.raises(WanFastError, match="cannot be written there"):
            video.check_output(Path(folder) / "x.mp4", 9, False)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(WanFastError, match="is a folder"):
        video.check_output(tmp_path / "folder.mp4", 9, False)
