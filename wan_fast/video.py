"""Clips out: PIL for pictures, PyAV for video and sound. A file appears under its name only when it is whole."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from wan_fast import sound as sounds
from wan_fast.config import WanFastError

if TYPE_CHECKING:
    from av import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from PIL import Image
    from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg")
# of the frames and of the sound
_CODECS = {".mp4": ("libx264", "aac"), ".webm": ("libvpx-vp9", "libopus")}


def check_output(path: Path, num_frames: int, image_only: bool) -> None:
    """Raise unless a clip of `num_frames` can be written to `path`.

    Raises:
        WanFastError: the suffix does not suit, or the folder cannot be written to.
    """
    allowed = IMAGE_SUFFIXES if image_only else VIDEO_SUFFIXES + (IMAGE_SUFFIXES if num_frames == 1 else ())
    if path.suffix.lower() not in allowed:
        what = "one picture" if image_only else f"{num_frames} frame{'s' * (num_frames != 1)}"
        raise WanFastError(
            f"--save_file {str(path)!r} ends in {path.suffix or 'nothing'!r}; for {what} it must be one of {' '.join(allowed)}"
        )
    check_folder(path, "--save_file")


def check_folder(path: Path, flag: str) -> None:
    """Raise unless a file can be made at `path`."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise WanFastError(f"{flag} {str(path)!r}: the folder {str(folder)!r} does not exist; create it first")
    if path.is_dir():
        raise WanFastError(f"{flag} {str(path)!r} is a folder; give a file name")
    scratch = _scratch(path)
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise WanFastError(f"{flag} {str(path)!r} cannot be written there ({error.strerror}); choose another place") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch name beside `path`, renamed to it when the block ends well and removed when it does not."""
    scratch = _scratch(path)
    try:
        with _told(path):
            yield scratch
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What fails in writing a file is told in a sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.startswith("av.") or type(error).__name__ == "SafetensorError":
            raise WanFastError(f"{str(path)!r} cannot be written ({error}); free space, or choose another place") from error
        raise


def _scratch(path: Path) -> Path:
    # absolute: a name such as a:b.mp4 is else taken for a protocol
    return path.absolute().with_name(f".{os.getpid()}.{path.name}")


def write(frames: Tensor, path: Path, fps: float, sound: Path | None = None) -> None:
    """Write frames [F, H, W, 3] uint8 as H.264, VP9, GIF, PNG or JPEG, by the suffix of `path`, with the sound of a file."""
    with writing(path, fps, sound) as add:
        add(frames)


@contextmanager
def writing(path: Path, fps: float, sound: Path | None = None) -> Iterator[Callable[[Tensor], None]]:
    """Write a clip that comes in chunks, while the next one is made.

    Args:
        sound: a file whose sound goes into an MP4 (AAC) or a WebM (Opus), from its start on and up to the last frame. GIFs and
            pictures have none.

    Yields a function that takes frames [f, H, W, 3] uint8 on the CPU, not to be changed afterwards. It returns at once, unless
    two chunks are still to be written; what fails in writing is raised by the next call, or at the end.
    """
    suffix, scratch = path.suffix.lower(), _scratch(path)
    images = suffix in IMAGE_SUFFIXES or suffix == ".gif"
    encode = _images(scratch, fps) if images else _video(scratch, fps, sound)
    next(encode)
    waiting: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as worker:

            def add(frames: Tensor) -> None:
                if len(waiting) == 2:
                    with _told(path):
                        waiting.popleft().result()
                waiting.append(worker.submit(_send, encode, frames))

            try:
                yield add
                with _told(path):
                    for job in (*waiting, worker.submit(_send, encode, None)):
                        job.result()
                    os.replace(scratch, path)
            except BaseException:
                worker.shutdown(cancel_futures=True)
                raise
    finally:
        encode.close()  # and with it the file
        scratch.unlink(missing_ok=True)


def _send(encode: Generator[None, Tensor | None], frames: Tensor | None) -> None:
    with suppress(StopIteration):  # it ends with the file, or has failed before
        encode.send(frames)


def _images(path: Path, fps: float) -> Generator[None, Tensor | None]:
    """Takes frames by send; writes what it was sent, as one GIF or picture, when it is sent None."""
    from PIL import Image

    images: list[Image.Image] = []
    while (frames := (yield)) is not None:
        images += [Image.fromarray(frame.numpy()) for frame in frames]
    first, *rest = images
    if path.suffix.lower() == ".gif":
        first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    else:
        first.save(path, quality=95)


def _video(path: Path, fps: float, sound: Path | None) -> Generator[None, Tensor | None]:
    """Takes frames by send and writes them, each with the sound it lasts; ends the file when it is sent None."""
    import av

    codec, sound_codec = _CODECS[path.suffix.lower()]
    frames = yield
    assert frames is not None
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        # the quality the official writer asks for
        stream.options = {"crf": "10"} if codec == "libx264" else {"crf": "20", "b:v": "0"}
        voice: AudioStream | None = None
        pieces: Iterator[AudioFrame] = iter(())
        if sound is not None:
            rates = av.Codec(sound_codec, "w").audio_rates or ()
            voice, pieces = _voice(container, sound_codec, sounds.pieces(sound, fps, rates))
        while frames is not None:
            for frame in frames:
                if voice is not None and (piece := next(pieces, None)) is not None:
                    container.mux(voice.encode(piece))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
            frames = yield
        container.mux(stream.encode())
        if voice is not None:
            container.mux(voice.encode())


def _voice(container: OutputContainer, codec: str, pieces: Iterator[AudioFrame]) -> tuple[AudioStream, Iterator[AudioFrame]]:
    """A stream for sound, and the pieces of it, of which the first says how it is made."""
    first = next(pieces)
    stream = cast("AudioStream", container.add_stream(codec, rate=first.sample_rate))
    stream.layout = first.layout
    stream.bit_rate = 192_000  # as officially
    return stream, chain([first], pieces)
