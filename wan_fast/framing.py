"""How large and how long a clip is, and which frames of footage it takes, by what a request brings along.

One function per kind of task, in `FRAME`. Standard library only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from pathlib import Path

from wan_fast.config import Resolved, WanFastError
from wan_fast.media import Footage, examine, image_size
from wan_fast.tasks import TaskSpec

Size = tuple[int, int]
# pictures that VACE takes as references; each is a latent frame more
MAX_REFERENCES = 8


@dataclass(frozen=True, slots=True)
class Framing:
    """size: (width, height) in pixels. leading: latent frames before the clip's own, not decoded. frames: indices of the
    footage's, one per frame of the clip. note: what whoever asked should know."""

    size: Size
    num_frames: int
    leading: int = 0
    frames: tuple[int, ...] = ()
    note: str = ""


def as_asked(request: Resolved, spec: TaskSpec, at_most: int | None) -> Framing:
    return Framing(request.size, request.num_frames)


def by_picture(request: Resolved, spec: TaskSpec, at_most: int | None) -> Framing:
    """TI2V: of a picture's shape, where there is one."""
    if request.image is None:
        return as_asked(request, spec, at_most)
    return Framing(best_size(request.size, image_size(Path(request.image)), spec.vae_spec.grid), request.num_frames)


def by_area(request: Resolved, spec: TaskSpec, at_most: int | None) -> Framing:
    """I2V: of a picture's shape, in the area of the size asked for."""
    assert request.image is not None
    return Framing(size_by_area(request.size, image_size(Path(request.image)), spec.vae_spec.stride[1]), request.num_frames)


def by_first_frame(request: Resolved, spec: TaskSpec, at_most: int | None) -> Framing:
    """FLF2V: as `by_area` of the first frame; the last one has to have its size."""
    assert request.first_frame is not None and request.last_frame is not None
    first, last = (image_size(Path(path)) for path in (request.first_frame, request.last_frame))
    if first != last:
        raise WanFastError(
            f"--first_frame is {first[0]}x{first[1]} pixels, --last_frame {last[0]}x{last[1]}; crop or scale one to the other"
        )
    if request.num_frames < 5:
        raise WanFastError(f"task {spec.name} needs 5 frames or more between two pictures, got {request.num_frames}; take 81")
    size, count = size_by_area(request.size, first, spec.vae_spec.stride[1]), request.num_frames
    note = "" if count == spec.num_frames else f"{count} frames: the official code makes {spec.num_frames} between two pictures"
    return Framing(size, count, note=note)


def by_footage(request: Resolved, spec: TaskSpec, at_most: int | None) -> Framing:
    """VACE: of the video's shape, in the area of the size asked for, as long as the video, as far as the tokens of the size and
    length asked for go."""
    references = len(request.src_ref_images)
    if references > MAX_REFERENCES:
        raise WanFastError(
            f"--src_ref_images names {references} pictures, the most that are taken is {MAX_REFERENCES}; name fewer"
        )
    if request.src_video is None:
        if request.src_mask is not None:
            raise WanFastError("--src_mask says what of --src_video to change, and there is none; give both, or leave it out")
        _check_references(request, request.size)
        return Framing(request.size, request.num_frames, references)
    video = examine(Path(request.src_video), "--src_video")
    if request.src_mask is not None:
        _check_mask(video, examine(Path(request.src_mask), "--src_mask"))
    size, frames = sampled(video.size, video.times, request.size, request.num_frames, at_most)
    _check_references(request, size)
    note = "" if len(frames) >= request.num_frames else f"--src_video has {len(video.times)} frames, enough for {len(frames)}"
    return Framing(size, len(frames), references, frames, note)


# at_most: frames that a clip must not exceed, where that was said
FRAME: dict[str, Callable[[Resolved, TaskSpec, int | None], Framing]] = {
    "text": as_asked,
    "text_image": by_picture,
    "image": by_area,
    "first_last": by_first_frame,
    "vace": by_footage,
}


def best_size(area_size: Size, image: Size, grid: int) -> Size:
    """(width, height) on the grid, within the area of `area_size`, closest to the shape of a picture.

    Of the two candidates (width floored first, or height) the one whose aspect ratio is closer wins; the second on a tie.
    """
    area, ratio = area_size[0] * area_size[1], image[0] / image[1]
    width = sqrt(area * ratio)
    height = area / width
    candidates = []
    for side, flip in ((width, False), (height, True)):
        first = floor(side / grid) * grid
        second = floor(area / first / grid) * grid if first else 0
        candidates.append((second, first) if flip else (first, second))
    fitting = [c for c in candidates if min(c) >= grid]
    if not fitting:
        raise _too_small(area_size, image, grid)
    error = [max(ratio / (w / h), (w / h) / ratio) for w, h in fitting]
    return fitting[0] if error[0] < error[-1] else fitting[-1]


def size_by_area(area_size: Size, image: Size, stride: int) -> Size:
    """(width, height) of a picture's shape in the area of `area_size`: both sides floored to twice the VAE's stride.

    As officially, in double precision: 832x480 in its own area is 479.99999999999994 high, and becomes 832x464.
    """
    area, aspect = area_size[0] * area_size[1], image[1] / image[0]
    height, width = (round(side // stride // 2 * 2) * stride for side in (sqrt(area * aspect), sqrt(area / aspect)))
    if not min(width, height):
        raise _too_small(area_size, image, 2 * stride)
    return width, height


def _too_small(area_size: Size, image: Size, grid: int) -> WanFastError:
    return WanFastError(
        f"an area of {area_size[0]}*{area_size[1]} is too small for a picture of {image[0]}*{image[1]} on the {grid}-pixel "
        "grid; give a larger --size"
    )


def sampled(
    video: Size, times: Sequence[tuple[float, float]], area_size: Size, num_frames: int, at_most: int | None = None
) -> tuple[Size, tuple[int, ...]]:
    """(width, height) of a clip that follows a video, and the indices of the frames it takes of it.

    Args:
        video: (width, height) in pixels.
        times: of each of its frames, from and to, seconds.
        area_size: sides of the largest area.
        num_frames: of a clip of that area; a smaller one has as many more as come to the same number of tokens, as officially.
        at_most: but no more than these.

    Raises:
        WanFastError: the video is smaller than a token.
    """
    (width, height), cell = video, 16
    largest = area_size[0] * area_size[1] // cell**2
    tokens = largest * ((num_frames - 1) // 4 + 1)
    area = min(tokens, largest, (height // cell) * (width // cell))
    if not area:
        raise WanFastError(f"--src_video is {width}x{height} pixels, smaller than {cell}x{cell}; give a larger one")
    latent_frames = min((len(times) - 1) // 4 + 1, tokens // area, ((at_most or len(times)) - 1) // 4 + 1)
    area = min(area, tokens // latent_frames)
    rows = max(1, round(sqrt(area * (height / width))))
    columns = max(1, int(area / rows))
    count = 4 * (latent_frames - 1) + 1
    last = sum(times[-1]) / 2
    ends = [end for _, end in times]
    step = last / max(count - 1, 1)
    wanted = [*(i * step for i in range(count - 1)), last if count > 1 else 0.0]
    frames = tuple(min(bisect_left(ends, time), len(times) - 1) for time in wanted)
    return (columns * cell, rows * cell), frames


def fitted_size(picture: Size, size: Size) -> Size:
    """Sides of a picture that is scaled to fit into a size."""
    scale = min(size[0] / picture[0], size[1] / picture[1])
    return int(picture[0] * scale), int(picture[1] * scale)


def _check_references(request: Resolved, size: Size) -> None:
    for path in request.src_ref_images:
        picture = image_size(Path(path))
        if not min(fitted_size(picture, size)):
            raise WanFastError(
                f"--src_ref_images {str(path)!r} is {picture[0]}x{picture[1]} pixels, of which nothing is left in a clip of "
                f"{size[0]}x{size[1]}; cut it to what is to be seen"
            )


def _check_mask(video: Footage, mask: Footage) -> None:
    for of_video, of_mask in ((_sides(video), _sides(mask)), (_length(video), _length(mask))):
        if of_video != of_mask:
            raise WanFastError(f"--src_mask has {of_mask}, --src_video {of_video}; make the mask from the video")


def _sides(footage: Footage) -> str:
    return f"{footage.size[0]}x{footage.size[1]} pixels"


def _length(footage: Footage) -> str:
    return f"{len(footage.times)} frame{'s' * (len(footage.times) != 1)}"
