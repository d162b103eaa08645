"""Pictures and videos that a user gives: read right, or refused in a sentence. PIL reads pictures, PyAV videos."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_fast.errors import WanFastError

if TYPE_CHECKING:
    import numpy as np
    from av import VideoFrame
    from av.video.stream import VideoStream
    from PIL import Image
    from torch import Tensor

# the further pictures in files of these formats are versions of the first: a depth map, layers
ONE_OF_SEVERAL = ("MPO", "PSD")
# pictures in the container of MP4
STILL_BRANDS = ("avif", "avis", "heic", "heix", "mif1", "msf1")
# FFmpeg plays text files as video
TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")
ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC


@dataclass(frozen=True, slots=True)
class Footage:
    """What is known of a video that decodes to its end.

    size: (width, height) of the upright frames in pixels.
    times: per frame, in the order shown, (start, end) in seconds; the first starts at 0.
    """

    path: Path
    size: tuple[int, int]
    times: tuple[tuple[float, float], ...]


def read_image(path: Path) -> Image.Image:
    """The picture in a file, upright (EXIF), as RGB of 8 bits.

    What is transparent becomes white: the colours that files keep under transparent pixels are arbitrary. Colour profiles are
    not applied.

    Raises:
        WanFastError: the file is no picture, only part of one, or several.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    what = f"picture {str(path)!r}"
    try:
        if not path.stat().st_size:
            raise WanFastError(f"{what} is an empty file; give a whole PNG, JPEG or WebP")
        with Image.open(path) as image:
            if (count := getattr(image, "n_frames", 1)) > 1 and image.format not in ONE_OF_SEVERAL:
                raise WanFastError(f"{what} is an animation or a document of {count} pictures; give one picture")
            image.load()
            upright: Image.Image = image
            with suppress(SyntaxError):  # EXIF that cannot be read names no orientation
                upright = ImageOps.exif_transpose(image)
            return _rgb(upright, image.format)
    except Image.DecompressionBombError as error:
        raise WanFastError(f"{what} is too large ({error}); scale it down") from error
    except UnidentifiedImageError as error:
        raise WanFastError(f"{what} is no picture, or of no known format; give a whole PNG, JPEG or WebP") from error
    except WanFastError:
        raise
    except Exception as error:  # PIL's readers let through whatever they stumble on
        why = (isinstance(error, OSError) and error.strerror) or error
        raise WanFastError(f"{what} cannot be read ({why}); give a whole PNG, JPEG or WebP") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of a picture that can be read whole, upright."""
    return read_image(path).size


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image, file_format)).convert("RGB")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _eight_bits(image: Image.Image, file_format: str | None) -> np.ndarray:
    """Grey values [H, W] uint8 of a picture with more bits, which PIL's own conversion clips to 255.

    Raises:
        ValueError: the values span no range that a picture's have.
    """
    import numpy as np

    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    # not (...): true of NaN too
    if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):
        raise ValueError(f"its values go from {low} to {high}, not from 0 to 1, 255 or 65535")
    if image.mode == "F":
        return np.rint(pixels * (255 if high <= 1 else 1)).astype(np.uint8)
    # of the formats that PIL reads as I, these hold 16 bits, however dark the picture
    if image.mode == "I" and high <= 255 and file_format not in ("PNG", "PPM"):
        return pixels.astype(np.uint8)
    grey = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(pixels == transparent, np.uint8(255), grey)


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def examine(path: Path, flag: str) -> Footage:
    """Decode a video once from end to end, to know its frames and that none is damaged.

    The first video stream counts, cover pictures apart. The size is that of the coded pixels, turned upright; pixels that are
    not square are read as if they were (as decord does).

    Args:
        flag: the option that gave the path, named in errors.

    Raises:
        WanFastError: the file is no video, or is damaged.
    """
    path = Path(path)
    try:
        about = path.stat()
        return _examine(path.absolute(), about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise WanFastError(f"{flag} {str(path)!r} cannot be read ({error.strerror}); give a video") from error
    except WanFastError as error:
        raise WanFastError(f"{flag} {str(path)!r} {error}") from error


@lru_cache(maxsize=16)
def _examine(path: Path, mtime_ns: int, num_bytes: int) -> Footage:
    if not num_bytes:
        raise WanFastError("is an empty file; give a video")
    starts: list[Fraction | None] = []
    durations: dict[int | None, Fraction] = {}
    with _opened(path) as stream:
        for frame in _decoded(stream, durations):
            if not starts:
                size = _upright_size(frame)
            elif _upright_size(frame) != size:
                raise WanFastError(
                    f"changes its size, from {size} to {_upright_size(frame)} in frame {len(starts)}; encode it with one size"
                )
            starts.append(None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base)
            last = durations.get(frame.pts, Fraction(0))
        rate = stream.guessed_rate or stream.average_rate
        declared = _declared_end(stream)
    if not starts:
        raise WanFastError("holds no frames; give another video")
    times = _spans(starts, last, Fraction(rate or 25))  # FFmpeg's own default
    end, interval = float(starts[0] or 0) + times[-1][1], times[-1][1] / len(times)
    # of an interlaced frame, half may count
    if declared is not None and declared - end > 0.75 * interval:
        raise WanFastError(f"is cut off: it ends after {end:.2f} of {declared:.2f} seconds; give all of it, or encode it again")
    return Footage(path, size, times)


def _spans(starts: list[Fraction | None], last: Fraction, rate: Fraction) -> tuple[tuple[float, float], ...]:
    """(start, end) in seconds of each frame, from 0.

    Args:
        starts: what the file says, in seconds; a frame with none, or that does not start after the one before, follows that
            one at `rate` (frames per second).
        last: the duration of the last frame in seconds; 0 if the file does not say: then the average of the others.
    """
    known: list[Fraction] = []
    for start in starts:
        if not known:
            known.append(Fraction(0) if start is None else start)
        else:
            known.append(start if start is not None and start > known[-1] else known[-1] + 1 / rate)
    first = known[0]
    average = (known[-1] - first) / (len(known) - 1) if len(known) > 1 else 1 / rate
    edges = [float(edge - first) for edge in (*known, known[-1] + (last or average))]
    return tuple(pairwise(edges))


def read_frames(footage: Footage, indices: Iterable[int]) -> Iterator[Tensor]:
    """The frames of a video, one at a time.

    The conversion to RGB is swscale's; what is transparent becomes white.

    Args:
        indices: ascending frame numbers; one that repeats gives the same tensor again.

    Yields:
        [H, W, 3] uint8, upright.

    Raises:
        WanFastError: the file is not what was examined.
    """
    import torch

    shown = -1
    try:
        with _opened(footage.path) as stream:
            frames = _decoded(stream, {})
            for index in indices:
                if not max(shown, 0) <= index < len(footage.times):
                    raise IndexError(f"frame {index} of {len(footage.times)} was asked for after {shown}")
                frame = None
                while shown < index:
                    frame, shown = next(frames, None), shown + 1
                    if frame is None:
                        raise WanFastError(f"has {shown} frames, not {len(footage.times)}; start again")
                if frame is not None:
                    if _upright_size(frame) != footage.size:
                        raise WanFastError(f"is {_upright_size(frame)} pixels in size, not {footage.size}; start again")
                    tensor = torch.from_numpy(_upright(frame))
                yield tensor
    except WanFastError as error:
        raise WanFastError(f"video {str(footage.path)!r} has changed since it was examined: it {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[VideoStream]:
    """The video of a file; what fails while it is open is told in a sentence that lacks its subject."""
    import av

    try:
        # metadata may be of any encoding
        with av.open(str(path), metadata_errors="replace") as container:
            kind = container.format.name
            if re.search(r"_pipe$|^image2|^ico$", kind) or container.metadata.get("major_brand") in STILL_BRANDS:
                raise WanFastError("is a picture, or an animation of a picture format; give a video, such as MP4, WebM or GIF")
            stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
            if stream is None:
                holds = "only sound" if container.streams.audio else "no video"
                raise WanFastError(f"holds {holds}; give a video")
            if stream.codec_context is None or stream.codec_context.name in TEXT_CODECS:
                raise WanFastError("is no video that can be decoded; give one as MP4 (H.264)")
            # threads that work on several frames at once lose the errors of the last ones
            stream.thread_type = "SLICE"
            yield stream
    except av.FFmpegError as error:
        raise WanFastError(f"is no whole video ({error.strerror}); give another, or encode it again") from error


def _is_cover(stream: VideoStream) -> bool:
    """Whether a stream is the cover picture of its file."""
    if hasattr(stream, "disposition"):
        return bool(stream.disposition.value & ATTACHED_PICTURE)
    # PyAV 14.0: a picture that has no rate
    codec = stream.codec_context
    return stream.average_rate is None and codec is not None and codec.name in ("png", "mjpeg", "bmp")


def _decoded(stream: VideoStream, durations: dict[int | None, Fraction]) -> Iterator[VideoFrame]:
    """The frames in the order shown; fills `durations`, in seconds by time stamp, where the file gives them."""
    number = 0
    container: Any = stream.container
    # in MPEG-TS the mark is also that of a place where files were joined
    marked = container.format.name != "mpegts"
    for packet in container.demux(stream):
        if packet.duration:
            durations[packet.pts] = packet.duration * packet.time_base
        if marked and packet.is_corrupt:
            raise WanFastError(f"is damaged or cut off after frame {number}; give another video, or encode it again")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise WanFastError(f"is damaged in frame {number}; give another video, or encode it again")
            yield frame
            number += 1


def _declared_end(stream: VideoStream) -> float | None:
    """When the last frame ends, in seconds, by the tag that Matroska and WebM have; the end of such a file may be missing."""
    if "matroska" not in stream.container.format.name:  # a tag copied from another file
        return None
    match = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else None


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d), each -1, 0 or 1: the pixel at (x, y) is shown at (a * x + c * y, b * x + d * y), y pointing down."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")  # frame.rotation knows no mirrors, and is not in PyAV 14.0
    if data is None:
        return 1, 0, 0, 1
    # libavutil/display.h: nine integers, a b u c d v x y w, of which a to d have 16 bits of fraction
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    small = max(abs(a), abs(b), abs(c), abs(d)) / 100
    a, b, c, d = ((value > small) - (value < -small) for value in (a, b, c, d))
    if (abs(a), abs(b), abs(c), abs(d)) not in ((1, 0, 0, 1), (0, 1, 1, 0)):
        raise WanFastError("is to be shown at an angle that is no quarter turn; encode it upright")
    return a, b, c, d


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _display_matrix(frame)[0] else (frame.height, frame.width)


def _upright(frame: VideoFrame) -> np.ndarray:
    """The pixels [H, W, 3] uint8 as they are shown."""
    import numpy as np
    from PIL import Image

    if any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(_on_white(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    a, b, c, d = _display_matrix(frame)
    if not a:
        pixels = pixels.swapaxes(0, 1)
    return np.array(pixels[:: d or b, :: a or c], order="C")
