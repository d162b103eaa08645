import os
from itertools import islice, pairwise

import av
import numpy as np
import pytest
from clips_of import noise, write_clip
from PIL import Image
from sounds_of import clicks, tone, write_sound

from wan_fast import sound
from wan_fast.errors import WanFastError


def samples_of(path):
    return sound.read_sound(path, "--audio").samples


def refusal(path):
    """The sentence in which a file is refused; it is one line that says what to do."""
    with pytest.raises(WanFastError) as error:
        sound.read_sound(path, "--audio")
    told = str(error.value)
    assert told.startswith(f"--audio {str(path)!r} ") and "\n" not in told and "; " in told
    return told


def white(channels, n, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, n))


# as it is


INTEGERS = {"pcm_s16le": ("s16p", np.int16), "pcm_s32le": ("s32p", np.int32)}


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("codec", INTEGERS)
def test_integers_at_16_khz_are_taken_exactly(tmp_path, codec, channels):
    form, dtype = INTEGERS[codec]
    top = np.iinfo(dtype).max
    values = np.random.default_rng(0).integers(-top - 1, top, (channels, 5000), dtype=dtype, endpoint=True)
    found = samples_of(write_sound(tmp_path / "x.wav", values, 16000, codec, form))
    assert found.dtype == np.float32 and found.shape == (5000,)
    expected = values.astype(np.float64).mean(0) / (top + 1.0)
    assert abs(found - expected).max() <= (2**-23 if channels > 1 or codec == "pcm_s32le" else 0)


def test_bytes_at_16_khz_are_taken_exactly(tmp_path):
    values = np.arange(1024, dtype=np.int64).astype(np.uint8)
    found = samples_of(write_sound(tmp_path / "x.wav", values, 16000, "pcm_u8", "u8p"))
    assert (found == (values.astype(np.float32) - 128) / 128).all()


@pytest.mark.parametrize("codec", ["pcm_f32le", "pcm_f64le"])
def test_floats_at_16_khz_are_taken_exactly(tmp_path, codec):
    values = 3 * white(2, 3000)  # louder than integers can be
    found = samples_of(write_sound(tmp_path / "x.wav", values, 16000, codec))
    assert abs(found - values.mean(0)).max() < 1e-6 and abs(values.mean(0)).max() > 1


@pytest.mark.parametrize(
    ("name", "codec", "rate", "tolerance"),
    [
        ("x.wav", None, 44100, 1e-4),
        ("x.flac", None, 96000, 1e-4),
        ("x.aiff", None, 22050, 1e-4),
        ("x.mp3", None, 44100, 0.06),
        ("x.m4a", "aac", 48000, 0.02),
        ("x.aac", "aac", 32000, 0.02),
        ("x.ogg", "libopus", 48000, 0.02),
        ("x.webm", "libopus", 24000, 0.02),
        ("x.mka", "pcm_s16le", 11025, 1e-4),
        ("x.wav", "pcm_mulaw", 8000, 0.02),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_container_codec_and_rate(tmp_path, name, codec, rate, tolerance, channels):
    voice = tone(440, rate, 1.5)
    file = write_sound(tmp_path / name, [voice] if channels == 1 else [voice, 0 * voice], rate, codec)
    found = samples_of(file)[2000:22000].astype(np.float64)
    # codecs delay, so that level and frequency are held against those of the tone, but not its phase
    spectrum = np.fft.rfft(found * np.hanning(len(found)))
    assert abs(np.argmax(abs(spectrum)) * 16000 / len(found) - 440) < 1
    assert np.sqrt(2 * (found**2).mean()) == pytest.approx(0.5 / channels, rel=max(tolerance, 2e-3))


def test_the_sound_of_a_video(tmp_path):
    voice = tone(300, 16000, 1.0)
    file = write_sound(tmp_path / "x.mkv", voice, 16000, "pcm_s16le", video=noise(8))
    assert abs(samples_of(file) - voice).max() < 1e-4


@pytest.mark.parametrize(("name", "codec"), [("x.mkv", "pcm_s16le"), ("x.mkv", "aac"), ("x.mp4", "aac"), ("x.webm", "libopus")])
def test_a_sound_that_starts_late_counts_from_there(tmp_path, name, codec):
    video = None if name == "x.webm" else noise(32)
    file = write_sound(tmp_path / name, tone(300, 48000, 1.0), 48000, codec, video=video, begin=0.8)
    assert sound.read_sound(file, "--audio").seconds == pytest.approx(1, abs=0.05)
    assert abs(samples_of(file)[:1600]).max() > 0.4


def test_how_long_the_original_is(tmp_path):
    found = sound.read_sound(write_sound(tmp_path / "x.wav", tone(300, 44100, 1.23456), 44100), "--audio")
    assert found.seconds == round(44100 * 1.23456) / 44100 and found.path == tmp_path / "x.wav"


# resampling


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 37800, 44100, 48000])
@pytest.mark.parametrize("n", [5003, 12345])
def test_as_many_samples_as_librosa_has(tmp_path, rate, n):
    assert len(samples_of(write_sound(tmp_path / "x.wav", white(1, n), rate))) == -(-n * 16000 // rate)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_tones_that_16_khz_can_hold_pass_as_they_are(tmp_path, rate):
    for frequency in (60, 1000, min(7000, 0.43 * rate)):
        found = samples_of(write_sound(tmp_path / "x.wav", tone(frequency, rate), rate, "pcm_f32le"))
        # neither louder nor later
        assert abs(found - tone(frequency, 16000))[400:-400].max() < 1e-5
        os.utime(tmp_path / "x.wav", (frequency, frequency))


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_tones_that_16_khz_cannot_hold_are_gone(tmp_path, rate):
    for frequency in (9000, 0.3 * rate + 3300, 0.49 * rate):
        found = samples_of(write_sound(tmp_path / "x.wav", tone(frequency, rate, level=1.0), rate, "pcm_f32le"))
        assert abs(found[400:-400]).max() < 1e-5  # -100 dB


def test_the_edge_lies_where_librosa_has_it(tmp_path):
    # soxr_hq: 0.913 of 8 kHz passes whole, 8 kHz not at all
    for frequency, lowest, highest in ((7300, 0.997, 1.003), (7656, 0.48, 0.52), (8050, 0, 1e-3)):
        file = write_sound(tmp_path / f"{frequency}.wav", tone(frequency, 44100), 44100, "pcm_f32le")
        level = np.sqrt(2 * (samples_of(file)[400:-400] ** 2).mean()) / 0.5
        assert lowest <= level <= highest


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_against_an_exact_resampler(tmp_path, rate):
    # noise up to 3.5 kHz that repeats every second: its Fourier series gives it at any rate
    generator = np.random.default_rng(0)
    lines = np.zeros(16000 // 2 + 1, complex)
    lines[1:3500] = generator.standard_normal(3499) + 1j * generator.standard_normal(3499)

    def at(rate):
        kept = np.zeros(rate // 2 + 1, complex)
        kept[:3500] = lines[:3500]
        return np.tile(np.fft.irfft(kept, rate) * rate, 2) / 400

    found = samples_of(write_sound(tmp_path / "x.wav", at(rate), rate, "pcm_f32le"))
    expected = at(16000)
    assert np.linalg.norm((found - expected)[400:-400]) < 2e-6 * np.linalg.norm(expected)


def test_before_and_after_a_sound_is_silence(tmp_path):
    voice = white(1, 44100)[0]
    alone = samples_of(write_sound(tmp_path / "x.wav", voice, 44100, "pcm_f32le"))
    within = np.concatenate([np.zeros(4410), voice, np.zeros(4410)])
    padded = samples_of(write_sound(tmp_path / "y.wav", within, 44100, "pcm_f32le"))
    assert abs(alone - padded[1600:17600]).max() < 1e-6


# lengths


def test_frames_of_the_audio_encoder():
    assert [sound.features(n) for n in (0, 399, 400, 719, 720, 17600)] == [0, 0, 1, 1, 2, 54]
    assert [sound.frames_at_30(n) for n in (0, 1, 2, 54, 71, 40)] == [0, 0, 1, 32, 42, 24]
    assert [sound.num_clips(n, 8) for n in (14, 15, 32)] == [1, 2, 3]
    assert [sound.num_clips(n, 80) for n in (1, 149, 150, 300)] == [1, 1, 2, 3]


# refused


def float_wav(path, values):
    return write_sound(path, np.float32(values), 16000, "pcm_f32le", "fltp")


def test_files_without_sound_are_refused(tmp_path):
    files = {name: tmp_path / name for name in ("none.wav", "empty.wav", "x.png", "x.gif", "x.txt", "x.mp4", "folder")}
    files["empty.wav"].touch()
    files["folder"].mkdir()
    Image.new("RGB", (8, 8)).save(files["x.png"])
    Image.new("RGB", (8, 8)).save(files["x.gif"])
    files["x.txt"].write_text("hello " * 100)
    write_clip(files["x.mp4"], noise())
    says = {
        "none.wav": "No such file",
        "empty.wav": "is an empty file",
        "x.png": "is a picture",
        "x.gif": "is a picture",
        "x.txt": "holds no sound",
        "x.mp4": "holds no sound; give a sound file, or a video with sound",
        "folder": "Is a directory",
    }
    for name, file in files.items():
        assert says[name] in refusal(file)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros(16000), "is silent: each of its samples is 0"),
        (np.full(16000, 0.25), "is silent: each of its samples is 0.25"),
        ([0.5], "lasts 0.000 seconds, and the audio encoder needs 0.045"),
        (tone(300, 16000, 0.025), "lasts 0.025 seconds"),
        (tone(300, 16000)[:719], "lasts 0.045 seconds"),
        (np.where(np.arange(16000) == 8000, np.nan, 0.1), "has a sample of nan after 0.50 seconds"),
        (np.where(np.arange(16000) == 4000, -np.inf, 0.1), "has a sample of -inf after 0.25 seconds"),
    ],
    ids=["silence", "constant", "one sample", "25 ms", "719 samples", "nan", "inf"],
)
def test_sound_that_no_clip_can_be_made_of_is_refused(tmp_path, values, says):
    assert says in refusal(float_wav(tmp_path / "x.wav", values))


def test_silence_at_another_rate_is_refused(tmp_path):
    assert "is silent" in refusal(write_sound(tmp_path / "x.wav", np.zeros(44100), 44100))


def test_the_shortest_sound_there_is(tmp_path):
    assert len(samples_of(float_wav(tmp_path / "x.wav", tone(300, 16000)[:720]))) == 720


def test_a_file_of_no_samples_is_refused(tmp_path):
    file = float_wav(tmp_path / "x.wav", tone(300, 16000))
    content = file.read_bytes()
    at = content.index(b"data")
    file.write_bytes(content[: at + 4] + bytes(4))
    assert "holds sound of no samples" in refusal(file)


@pytest.mark.parametrize(
    ("name", "codec", "muxer"),
    [
        ("x.wav", None, {}),
        ("x.flac", None, {}),
        ("x.aiff", None, {}),
        ("x.caf", None, {}),
        ("x.mp3", None, {}),
        ("x.m4a", "aac", {}),
        ("x.m4a", "aac", {"movflags": "faststart"}),
        ("x.mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("x.mkv", "aac", {}),
        ("x.webm", "libopus", {}),
        ("x.ogg", "libopus", {}),
        ("x.aac", "aac", {}),
        ("x.ts", "aac", {}),
    ],
)
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, codec, muxer):
    file = write_sound(tmp_path / name, white(2, 96000), 48000, codec, **muxer)
    assert sound.read_sound(file, "--audio").seconds == pytest.approx(2, abs=0.1)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 6 // 10])
    told = refusal(file)
    assert "cut off" in told or "is no whole sound file" in told


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_whose_length_is_open_is_taken(tmp_path, size):
    file = write_sound(tmp_path / "x.wav", tone(300, 44100), 44100)
    content, field = bytearray(file.read_bytes()), size.to_bytes(4, "little")
    at = content.index(b"data") + 4
    content[4:8], content[at : at + 4] = field, field
    file.write_bytes(content)
    assert sound.read_sound(file, "--audio").seconds == 1


def test_a_wav_that_is_cut_between_two_packets_is_refused(tmp_path):
    file = write_sound(tmp_path / "x.wav", tone(300, 44100), 44100)
    content = file.read_bytes()
    file.write_bytes(content[: content.index(b"data") + 8 + 16 * 4096])
    assert "is cut off after 0.74 seconds" in refusal(file)


def test_samples_that_cannot_be_read_are_told(tmp_path):
    file = write_sound(tmp_path / "x.wav", tone(300, 16000), 16000, "pcm_s64le")
    assert "holds samples in the format s64; give them in 16 bits" in refusal(file)


def test_a_cut_between_two_packets_is_found(tmp_path):
    for name, codec in (("x.m4a", "aac"), ("x.mp3", None), ("x.ogg", "libopus")):
        muxer = {"movflags": "faststart"} if name == "x.m4a" else {}
        file = write_sound(tmp_path / name, white(1, 96000), 48000, codec, **muxer)
        with av.open(str(file)) as container:
            ends = [packet.pos + packet.size for packet in container.demux(audio=0) if packet.size and packet.pos is not None]
        file.write_bytes(file.read_bytes()[: ends[len(ends) // 2]])
        assert "cut off" in refusal(file), name


def test_an_mp3_that_does_not_say_its_length_is_taken(tmp_path):
    file = write_sound(tmp_path / "x.mp3", white(1, 96000), 48000, write_xing="0")
    assert sound.read_sound(file, "--audio").seconds == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("num_bytes", [1, 64])
def test_damage_is_found(tmp_path, num_bytes):
    file = write_sound(tmp_path / "x.flac", white(1, 96000), 48000)
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + num_bytes)
    content[middle] = bytes(byte ^ 4 for byte in content[middle])
    file.write_bytes(content)
    assert "is damaged or cut off: 1.90 of its 2.00 seconds are there" in refusal(file)


def test_a_sound_that_changes_its_rate_is_refused(tmp_path):
    slow, fast = (write_sound(tmp_path / f"{rate}.mp3", tone(300, rate), rate) for rate in (32000, 48000))
    (tmp_path / "x.mp3").write_bytes(slow.read_bytes() + fast.read_bytes())
    assert "changes from " in refusal(tmp_path / "x.mp3")


# read once


def test_a_file_is_read_again_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = sound.read_sound(float_wav(tmp_path / "x.wav", tone(300, 16000)), "--audio")
    assert sound.read_sound(os.path.relpath(tmp_path / "x.wav"), "--other") is first
    with pytest.raises(ValueError, match="read-only"):
        first.samples[0] = 1
    float_wav(tmp_path / "x.wav", tone(300, 16000, 2.0))
    assert len(samples_of(tmp_path / "x.wav")) == 32000


# pieces


@pytest.mark.parametrize("fps", [16, 24, 29.97])
@pytest.mark.parametrize(("channels", "rate"), [(1, 44100), (2, 48000), (2, 7350)])
def test_pieces_are_as_long_as_frames_and_together_the_whole(tmp_path, fps, channels, rate):
    values = np.round(white(channels, rate * 2 + 17) * 32767).astype(np.int16)
    file = write_sound(tmp_path / "x.wav", values, rate, "pcm_s16le", "s16p")
    pieces = list(sound.pieces(file, fps, [rate]))
    edges = [round(number * rate / fps) for number in range(len(pieces))] + [values.shape[1]]
    assert [(piece.pts, piece.samples) for piece in pieces] == [(a, b - a) for a, b in pairwise(edges)]
    assert {(piece.sample_rate, piece.layout.name, piece.format.name) for piece in pieces} == {
        (rate, "mono" if channels == 1 else "stereo", "fltp")
    }
    assert (np.concatenate([piece.to_ndarray() for piece in pieces], 1) == values / np.float32(32768)).all()


def test_pieces_at_a_rate_that_is_not_taken(tmp_path):
    file = write_sound(tmp_path / "x.wav", tone(440, 44100), 44100)
    pieces = list(sound.pieces(file, 16, [16000, 48000]))
    assert {piece.sample_rate for piece in pieces} == {48000}
    joined = np.concatenate([piece.to_ndarray()[0] for piece in pieces])
    assert len(joined) == pytest.approx(48000, abs=2)
    assert abs(joined[500:47500] - tone(440, 48000)[500:47500]).max() < 1e-3


def test_six_channels_become_two_that_are_not_too_loud(tmp_path):
    file = write_sound(tmp_path / "x.wav", 1.9 * clicks([0.2], 48000, 0.5, channels=6), 48000)
    joined = np.concatenate([piece.to_ndarray() for piece in sound.pieces(file, 16, [48000])], 1)
    assert joined.shape[0] == 2 and joined.max() == pytest.approx(0.95, rel=1e-3)


def test_pieces_are_decoded_as_they_are_asked_for(tmp_path, monkeypatch):
    seen = []
    decoded = sound._decoded

    def counted(stream):
        for frame in decoded(stream):
            seen.append(frame.samples)
            yield frame

    monkeypatch.setattr(sound, "_decoded", counted)
    file = write_sound(tmp_path / "x.flac", white(1, 48000 * 20), 48000)
    pieces = list(islice(sound.pieces(file, 16, [48000]), 5))
    assert sum(piece.samples for piece in pieces) == 15000 and sum(seen) < 15000 + 2 * max(seen)


def test_a_sound_that_has_changed_is_told(tmp_path):
    file = tmp_path / "x.wav"
    file.write_bytes(b"no sound any more" * 20)
    with pytest.raises(WanFastError, match=r"sound .*x\.wav' has changed since it was read: it is no whole sound file"):
        next(sound.pieces(file, 16, [48000]))
    content = float_wav(file, tone(300, 16000)).read_bytes()
    file.write_bytes(content[: content.index(b"data") + 4] + bytes(4))
    with pytest.raises(WanFastError, match=r"it holds sound of no samples; start again"):
        next(sound.pieces(file, 16, [48000]))
