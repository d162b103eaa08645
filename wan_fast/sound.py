"""Sound that a user gives, of a sound file or of a video: read right, or refused in a sentence. PyAV decodes it.

To 16 kHz it goes through libswresample's polyphase filter: a sinc over 176 samples of the lower rate in a Kaiser window of beta
12; from higher rates it is at half its height at 0.957 of 8 kHz. Measured with FFmpeg 8 from 22.05, 44.1 and 48 kHz: less
than 0.0001 dB off up to 7 kHz, what lies above 9 kHz under -120 dB, no shift in time; 0.04 % off librosa's own, soxr_hq, on
noise of all frequencies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wan_fast.errors import WanFastError

if TYPE_CHECKING:
    import numpy as np
    from av import AudioFrame
    from av.audio.stream import AudioStream

# what wav2vec2 hears, in samples per second, and how it goes over them (arXiv 2006.11477)
RATE = 16000
KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
_TO_16K = f"{RATE}:filter_size=176:cutoff=0.957:filter_type=kaiser:kaiser_beta=12:exact_rational=1"
# containers that say how long their sound is; the others' length is guessed from their size
_DECLARING = ("w64", "aiff", "au", "caf", "flac", "mov,mp4,m4a,3gp,3g2,mj2")
# the mark of a frame in an MP3 file that says how many there are
_COUNTED = re.compile(rb"(?:Xing|Info)\0\0\0[\x01-\x0f]|VBRI")
# in seconds; encoders that lose something put more before and after, which what is declared may count
_TOLERANCE, _LOSSLESS_TOLERANCE = 0.1, 0.01


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """Sound as the audio encoder takes it.

    samples: [n] fp32 at 16 kHz, read-only; the mean over the channels of the file.
    seconds: how long the sound of the file is.
    """

    path: Path
    samples: np.ndarray
    seconds: float


def features(num_samples: int) -> int:
    """Frames that wav2vec2 makes of so many samples at 16 kHz, about 50 per second."""
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        num_samples = max(0, (num_samples - kernel) // stride + 1)
    return num_samples


def frames_at_30(num_features: int) -> int:
    """Frames that are left of wav2vec2's at 30 per second, rounded as officially."""
    return int(num_features / 50 * 30)


def num_clips(num_frames: int, clip_frames: int, fps: int = 16) -> int:
    """Clips of `clip_frames` frames for sound of `num_frames` at 30 per second, as officially: one more than it fills."""
    return int(num_frames / (clip_frames * (30 / fps))) + 1


def read_sound(path: Path, flag: str) -> Sound:
    """The first sound of a file, to be heard by the audio encoder.

    Raises:
        WanFastError: as `examine_sound`, and for silence, or too little.
    """
    sound = examine_sound(path, flag)
    try:
        _check(sound.samples, sound.seconds)
    except WanFastError as error:
        raise WanFastError(f"{flag} {str(path)!r} {error}") from error
    return sound


def has_sound(path: Path) -> bool:
    """Whether there is sound in a file that can be opened."""
    import av

    with suppress(av.FFmpegError), av.open(str(path), metadata_errors="replace") as container:
        return bool(container.streams.audio)
    return False


def examine_sound(path: Path, flag: str) -> Sound:
    """The first sound of a file, whatever its container, codec, rate and channels, decoded to its end.

    Samples count from the first on, wherever a video starts its sound. At 16 kHz they are taken as they are; else there are
    ceil(n * 16000 / rate), as librosa has it.

    Args:
        flag: the option that gave the path, named in errors.

    Raises:
        WanFastError: the file holds no sound, or only part of it, or values that are no numbers.
    """
    path = Path(path)
    try:
        about = path.stat()
        return _read(path.absolute(), about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise WanFastError(f"{flag} {str(path)!r} cannot be read ({error.strerror}); give a sound file") from error
    except WanFastError as error:
        raise WanFastError(f"{flag} {str(path)!r} {error}") from error


@lru_cache(maxsize=4)
def _read(path: Path, mtime_ns: int, num_bytes: int) -> Sound:
    import numpy as np

    if not num_bytes:
        raise WanFastError("is an empty file; give a sound file")
    chunks: list[np.ndarray] = []
    take: Callable[[np.ndarray | None], None]
    rate = length = 0
    with _opened(path) as stream:
        for frame in _decoded(stream):
            if not rate:
                rate = frame.sample_rate
                take = _keeper(chunks) if rate == RATE else _resampler(rate, chunks)
            chunk = _mono(frame)
            if not np.isfinite(chunk).all():
                value, where = chunk[~np.isfinite(chunk)][0], np.argmin(np.isfinite(chunk))
                raise WanFastError(f"has a sample of {value} after {(length + where) / rate:.2f} seconds; write it again")
            take(chunk)
            length += len(chunk)
        declared, kind = _declared(stream, path), stream.container.format.name
        lossless = re.match("pcm_|flac$", stream.codec_context.name)
    if not length:
        raise WanFastError("holds sound of no samples; give another sound file")
    if declared is not None and declared - length / rate > (_LOSSLESS_TOLERANCE if lossless else _TOLERANCE):
        raise WanFastError(
            f"is damaged or cut off: {length / rate:.2f} of its {declared:.2f} seconds are there; give all of it"
        )
    if (kind == "ogg" and not _has_last_page(path)) or (kind == "wav" and _lacks_bytes(path)):
        raise WanFastError(f"is cut off after {length / rate:.2f} seconds; give all of it")
    take(None)
    wanted = -(-length * RATE // rate)
    samples = np.concatenate(chunks)[:wanted]
    samples.setflags(write=False)
    return Sound(path, samples, length / rate)


def _check(samples: np.ndarray, seconds: float) -> None:
    if not frames_at_30(features(len(samples))):
        shortest = next(n for n in count() if frames_at_30(features(n))) / RATE
        raise WanFastError(f"lasts {seconds:.3f} seconds, and the audio encoder needs {shortest:.3f}; give more speech")
    low, high = samples.min(), samples.max()
    if low == high:
        raise WanFastError(f"is silent: each of its samples is {low:g}; give speech")


def _mono(frame: AudioFrame) -> np.ndarray:
    """[n] fp32, the mean of the channels; integers are in [-1, 1)."""
    import numpy as np

    try:
        values = frame.to_ndarray()
    except ValueError as error:
        raise WanFastError(f"holds samples in the format {frame.format.name}; give them in 16 bits") from error
    if not frame.format.is_planar:
        values = values.reshape(frame.samples, -1).T
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - 128) / 128
    elif values.dtype.kind == "i":
        values = values.astype(np.float32) / np.float32(2.0 ** (8 * values.itemsize - 1))
    return values.astype(np.float32).mean(0)


def _keeper(chunks: list[np.ndarray]) -> Callable[[np.ndarray | None], None]:
    """Like `_resampler`, of samples that are at 16 kHz already."""
    return lambda samples: None if samples is None else chunks.append(samples)


def _resampler(rate: int, chunks: list[np.ndarray]) -> Callable[[np.ndarray | None], None]:
    """A function that takes samples at `rate` and appends to `chunks` what comes of them at 16 kHz; None ends them."""
    import av
    import numpy as np

    through = _filter(rate, "mono", "fltp", _TO_16K)
    # a second before and after: at the ends the filter has mirrors, where there is silence
    silence, taken, skip = np.zeros(rate, np.float32), 0, RATE

    def take(samples: np.ndarray | None) -> None:
        nonlocal taken, skip
        for values in [samples] if samples is not None else [silence, None]:
            frame = None
            if values is not None:
                frame = av.AudioFrame.from_ndarray(values[None], format="fltp", layout="mono")
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), taken
                taken += len(values)
            for made in through(frame):
                chunks.append(made.to_ndarray()[0, skip:])
                skip = max(0, skip - made.samples)

    take(silence)
    return take


def _filter(rate: int, layout: str, form: str, options: str) -> Callable[[AudioFrame | None], list[AudioFrame]]:
    """libswresample with `options`, as a function from a frame, or None at the end, to what comes of it."""
    import av

    graph = av.filter.Graph()
    begin = graph.add("abuffer", f"sample_rate={rate}:sample_fmt={form}:channel_layout={layout}:time_base=1/{rate}")
    resample, end = graph.add("aresample", options), graph.add("abuffersink")
    begin.link_to(resample)
    resample.link_to(end)
    graph.configure()

    def through(frame: AudioFrame | None) -> list[AudioFrame]:
        graph.push(frame)  # and not begin.push, which does not keep the graph
        made: list[AudioFrame] = []
        while True:
            try:
                made.append(cast("AudioFrame", graph.pull()))
            except (av.BlockingIOError, av.EOFError):
                return made

    return through


def pieces(path: Path, fps: float, rates: Collection[int]) -> Iterator[AudioFrame]:
    """The sound of a file in pieces that each last as long as a frame of a video; the last may be shorter.

    They have one or two channels, in fp32, and the file's own rate if it is one of `rates`, else 48 kHz. Decoded as they are
    asked for.

    Raises:
        WanFastError: the file is not what was read before.
    """
    from av import AudioFifo

    fifo, number, rate, taken = AudioFifo(), 0, 0, 0
    through: Callable[[AudioFrame | None], list[AudioFrame]] = lambda frame: []  # noqa: E731
    try:
        with _opened(path) as stream:
            for frame in _followed_by_none(_decoded(stream)):
                if frame is not None:
                    if not rate:
                        rate = frame.sample_rate if frame.sample_rate in rates else 48000
                        layout = "mono" if len(frame.layout.channels) == 1 else "stereo"
                        # at rematrix_maxval 1 a sum of channels is never louder than the loudest
                        options = f"{rate}:ochl={layout}:osf=fltp:rematrix_maxval=1"
                        through = _filter(frame.sample_rate, frame.layout.name, frame.format.name, options)
                    frame.pts, frame.time_base = taken, Fraction(1, frame.sample_rate)
                    taken += frame.samples
                for part in through(frame):
                    part.pts = None
                    fifo.write(part)
                while rate:
                    begin, end = (round(edge * rate / fps) for edge in (number, number + 1))
                    piece = fifo.read(end - begin, partial=frame is None)
                    if piece is None:
                        break
                    piece.pts, piece.time_base = begin, Fraction(1, rate)
                    yield piece
                    number += 1
        if not rate:
            raise WanFastError("holds sound of no samples; start again")
    except WanFastError as error:
        raise WanFastError(f"sound {str(path)!r} has changed since it was read: it {error}") from error


def _followed_by_none(frames: Iterator[AudioFrame]) -> Iterator[AudioFrame | None]:
    yield from frames
    yield None


@contextmanager
def _opened(path: Path) -> Iterator[AudioStream]:
    """The first sound of a file; what fails while it is open is told in a sentence that lacks its subject."""
    import av

    try:
        # metadata may be of any encoding
        with av.open(str(path), metadata_errors="replace") as container:
            stream = next(iter(container.streams.audio), None)
            if stream is None:
                picture = re.search(r"_pipe$|^image2|^ico$|^gif$", container.format.name)
                holds = "is a picture" if picture else "holds no sound"
                raise WanFastError(f"{holds}; give a sound file, or a video with sound")
            if stream.codec_context is None:
                raise WanFastError("holds sound that cannot be decoded; give it as WAV, FLAC or MP3")
            if stream.codec_context.name == "flac":  # its sums are else not looked at
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            yield stream
    except av.FFmpegError as error:
        raise WanFastError(f"is no whole sound file ({error.strerror}); give another, or encode it again") from error


def _decoded(stream: AudioStream) -> Iterator[AudioFrame]:
    """The frames of the sound, all of one format."""
    seconds, known = 0.0, None
    container: Any = stream.container
    for packet in container.demux(stream):
        # of WAV the last packet too, where the length is left open
        if packet.is_corrupt and container.format.name != "wav":
            raise WanFastError(f"is damaged or cut off after {seconds:.2f} seconds; give another, or encode it again")
        for frame in packet.decode():
            form = f"{frame.sample_rate} Hz {frame.layout.name} {frame.format.name}"
            if known not in (None, form):
                raise WanFastError(f"changes from {known} to {form} after {seconds:.2f} seconds; encode it again")
            known = form
            if frame.is_corrupt:
                raise WanFastError(f"is damaged after {seconds:.2f} seconds; give another, or encode it again")
            yield frame
            seconds += frame.samples / frame.sample_rate


def _declared(stream: AudioStream, path: Path) -> float | None:
    """How long the sound is in seconds, where the file itself says so."""
    kind = stream.container.format.name
    if "matroska" in kind:  # a tag, and when it ends rather than how long it is
        match = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        end = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None
        return None if end is None else end - float((stream.start_time or 0) * (stream.time_base or 0))
    if kind == "mp3":
        with path.open("rb") as file:
            if not _COUNTED.search(file.read(1 << 20)):
                return None
    elif kind not in _DECLARING:
        return None
    return None if stream.duration is None or stream.time_base is None else float(stream.duration * stream.time_base)


def _lacks_bytes(path: Path) -> bool:
    """Whether a WAV file is shorter than it says; what is written as it is made leaves its length open."""
    with path.open("rb") as file:
        head = file.read(8)
    said = int.from_bytes(head[4:], "little")
    # a byte or two at the end may be missing or counted twice
    return head[:4] == b"RIFF" and said < 0x7FFFFF00 and said + 8 > path.stat().st_size + 16


def _has_last_page(path: Path) -> bool:
    """Whether an Ogg file has the page that is marked as the last of a stream (RFC 3533, 6)."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1 << 17), 2)  # a page has at most 65307 bytes
        tail = file.read()
    begin = tail.rfind(b"OggS")
    return begin >= 0 and len(tail) > begin + 5 and bool(tail[begin + 5] & 4)
