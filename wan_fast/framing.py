"""How large and how long a clip is, and which frames of footage it takes, by what a request brings along.

One function per kind of task, in `FRAME`. Standard library only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from pathlib import Path

from wan_fast.config import Request, WanFastError
from wan_fast.manifest.speech import MOTION_FRAMES
from wan_fast.media import Footage, examine, image_size
from wan_fast.resolving import Resolved
from wan_fast.sound import examine_sound, features, frames_at_30, has_sound, num_clips, read_sound
from wan_fast.tasks import TaskSpec

Size = tuple[int, int]
# latent frames, and `changing` as in `manifest.vae_flops`
Encoded = tuple[int, int | None]
# pictures that VACE and Phantom take as references; each is a latent frame more
MAX_REFERENCES, MAX_SUBJECTS = 8, 4
PICTURE: Encoded = (1, None)
# what Animate's preprocessing writes into a folder, the last two where a person is to be replaced
PERSON, POSE, FACE, BACKGROUND, MASK = "src_ref.png", "src_pose.mp4", "src_face.mp4", "src_bg.mp4", "src_mask.mp4"


@dataclass(frozen=True, slots=True)
class Segment:
    """One of the clips that a video is made of, one after the other.

    start: the first frame that it covers, of what drives it. offset: the first that it gives to the video, and count: how many.
    skip: frames at the beginning of what is decoded that are left out.
    """

    index: int
    start: int
    offset: int
    skip: int
    count: int


@dataclass(frozen=True, slots=True)
class Framing:
    """How a video is put together.

    size: (width, height) in pixels. num_frames: of the video. leading: latent frames of a clip before its own, not decoded.
    trailing: latent frames behind it for which noise is drawn, and which are not denoised. frames: indices of the footage's,
    one per frame of the video. note: what whoever asked should know. latent_frames: that a clip denoises, `leading` not among
    them; None: as many as the video's frames come to. segments: the clips of a chain. history: frames at the end of what is
    there that the next clip is given. fps: frames per second where footage says it. sound: a file whose sound the video has.
    samples: of it at 16 kHz, where the model hears it. shown: frames that the file has, where it ends with its sound.
    encoded: all that is given to the VAE's encoder, one after the other.
    """

    size: Size
    num_frames: int
    leading: int = 0
    trailing: int = 0
    frames: tuple[int, ...] = ()
    note: str = ""
    latent_frames: int | None = None
    segments: tuple[Segment, ...] = ()
    history: int = 0
    fps: float | None = None
    sound: Path | None = None
    samples: int = 0
    shown: int | None = None
    encoded: tuple[Encoded, ...] = ()

    @property
    def clips(self) -> tuple[Segment, ...]:
        """The clips, of which a video that is no chain has one."""
        return self.segments or (Segment(index=0, start=0, offset=0, skip=0, count=self.num_frames),)

    @property
    def clip_frames(self) -> int:
        """Frames that are denoised at a time, for which others of a chain stand as well."""
        return 4 * self.latent_frames if self.latent_frames else self.num_frames

    @property
    def decoded(self) -> int:
        """Frames that are decoded of a clip, at most."""
        return max(segment.skip + segment.count for segment in self.clips)

    @property
    def noises(self) -> tuple[str, ...]:
        """What the noise of each clip is called in a file."""
        return tuple(f"noise_{segment.index}" for segment in self.segments) or ("noise",)


def as_asked(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    return Framing(request.size, request.num_frames)


def by_picture(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """TI2V: of a picture's shape, where there is one."""
    if request.image is None:
        return as_asked(request, spec, asked)
    size = best_size(request.size, image_size(Path(request.image)), spec.vae_spec.grid)
    return Framing(size, request.num_frames, encoded=(PICTURE,))


def by_area(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """I2V: of a picture's shape, in the area of the size asked for."""
    assert request.image is not None
    size, count = size_by_area(request.size, image_size(Path(request.image)), spec.vae_spec.stride[1]), request.num_frames
    return Framing(size, count, encoded=((spec.vae_spec.latent_frames(count), 0),))


def by_first_frame(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
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
    return Framing(size, count, note=note, encoded=((spec.vae_spec.latent_frames(count), 1),))


def by_footage(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
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
        grey = (spec.vae_spec.latent_frames(request.num_frames), 0)
        return Framing(request.size, request.num_frames, leading=references, encoded=(grey, *[PICTURE] * references))
    video = examine(Path(request.src_video), "--src_video")
    if request.src_mask is not None:
        _check_mask(video, examine(Path(request.src_mask), "--src_mask"))
    size, frames = sampled(video.size, video.times, request.size, request.num_frames, asked.num_frames)
    _check_references(request, size)
    note = "" if len(frames) >= request.num_frames else f"--src_video has {len(video.times)} frames, enough for {len(frames)}"
    latent_frames = spec.vae_spec.latent_frames(len(frames))
    encoded = ((latent_frames, 0 if request.src_mask is None else None), (latent_frames, None), *[PICTURE] * references)
    return Framing(size, len(frames), leading=references, frames=frames, note=note, encoded=encoded)


def by_references(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """Phantom: as asked; each reference is a latent frame more behind the clip."""
    count = len(request.src_ref_images)
    if count > MAX_SUBJECTS:
        raise WanFastError(
            f"--src_ref_images names {count} pictures, {spec.name} was trained on {MAX_SUBJECTS} at most; name fewer"
        )
    _check_references(request, request.size, boxed_size)
    return Framing(request.size, request.num_frames, trailing=count, encoded=(PICTURE,) * count)


def by_poses(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """UniAnimate: of a picture's shape, in the area of the size asked for; a frame for each pose, as long as these last."""
    assert request.pose_video is not None
    size, video = by_area(request, spec, asked).size, examine(Path(request.pose_video), "--pose_video")
    there, count = len(video.times), request.num_frames
    if asked.num_frames is not None and there < count:
        longest = (there - 1) // 4 * 4 + 1
        raise WanFastError(
            f"--pose_video has {_length(video)}, --frame_num asks for {count}; take {longest}, or a longer video"
        )
    count, notes = min(count, (there - 1) // 4 * 4 + 1), []
    if count < request.num_frames:
        notes.append(f"--pose_video has {_length(video)}, enough for {count}")
    posed = {"--pose_video": video.size}
    if request.pose_image is None:
        notes.append("without --pose_image the model does not know the picture's own pose, from which the clip goes on")
    else:
        posed["--pose_image"] = image_size(Path(request.pose_image))
    for flag, sides in posed.items():
        if abs(sides[0] / sides[1] * size[1] / size[0] - 1) > 0.05:
            notes.append(f"{flag} of {sides[0]}x{sides[1]} is stretched to the clip's shape, {size[0]}x{size[1]}")
    return Framing(
        size,
        count,
        frames=tuple(range(count)),
        note="; ".join(notes),
        fps=round(there / video.times[-1][1], 3),
        encoded=((spec.vae_spec.latent_frames(count), 0),),
    )


def by_speech(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """S2V: of a picture's shape, as long as the sound, in clips that go on one from the other."""
    assert request.image is not None and request.audio is not None
    if asked.num_frames is not None:
        raise WanFastError(
            f"task {spec.name} makes a video as long as its sound, got --frame_num {asked.num_frames}; leave it out, or take "
            "--num_clip"
        )
    if request.fps != spec.fps:
        raise WanFastError(
            f"task {spec.name} goes with the sound at {spec.fps} frames per second, got --fps {request.fps:g}; leave it out"
        )
    sound, picture = read_sound(Path(request.audio), "--audio"), image_size(Path(request.image))
    size, length = size_below(request.size, picture), request.infer_frames or spec.num_frames
    needed = num_clips(frames_at_30(features(len(sound.samples))), length, spec.fps)
    count = min(needed, request.num_clip or needed)
    # what is decoded begins with the picture and three frames that are not good yet, or with the frames before the clip
    skip, dropped = (MOTION_FRAMES, 0) if request.start_from_ref else (1 + 3, 3)
    first = Segment(index=0, start=0, offset=0, skip=skip, count=length - dropped)
    others = (Segment(k, k * length, k * length - dropped, MOTION_FRAMES, length) for k in range(1, count))
    num_frames = count * length - dropped
    frames, notes = _poses(request, size, min(sound.seconds, num_frames / spec.fps), count * length, spec.fps)
    notes += _notes_on_picture(request.size, picture, size)
    if count < needed:
        notes.append(f"--num_clip {count} is {num_frames / spec.fps:.2f} of the {sound.seconds:.2f} seconds of --audio")
    lacks = round(sound.seconds * spec.fps - num_frames, 6)
    if lacks > 0 and count == needed:
        longer = 4 * ceil((num_frames + lacks + dropped) / count / 4)
        notes.append(
            f"--audio lasts {sound.seconds:.2f} seconds, and the file ends after {num_frames / spec.fps:.2f}, as officially: "
            f"the first clip has {dropped} frames less; --infer_frames {longer} has room for all"
        )
    enough = 4 * ceil((sound.seconds * spec.fps + dropped) / 4)
    if enough < length:
        notes.append(
            f"--audio lasts {sound.seconds:.2f} seconds, and a clip of {length} frames is made for it; --infer_frames {enough} "
            "is as many as it needs"
        )
    before: Encoded = (spec.vae_spec.latent_frames(MOTION_FRAMES), None)
    poses: list[Encoded] = [(length // 4 + 1, None)] * (count * (request.pose_video is not None))
    return Framing(
        size,
        num_frames,
        frames=frames,
        note="; ".join(notes),
        latent_frames=length // 4,
        segments=(first, *others),
        history=MOTION_FRAMES,
        fps=spec.fps,
        sound=sound.path,
        samples=len(sound.samples),
        shown=min(num_frames, ceil(round(sound.seconds * spec.fps, 6))),
        encoded=(PICTURE, *[before] * (count - (not request.start_from_ref)), *poses),
    )


def by_folder(request: Resolved, spec: TaskSpec, asked: Request) -> Framing:
    """Animate: as large and as long as the video of poses, in clips that each begin with the last frames of the one before."""
    folder, footage = folder_of(request), _driving(request)
    where, pose, picture = f"--src_root_path {str(folder)!r}", footage[POSE], image_size(folder / PERSON)
    grid, (width, height) = spec.vae_spec.grid, pose.size
    if width % grid or height % grid:
        raise WanFastError(f"{where}: {POSE} has {_sides(pose)}, not multiples of {grid}; run the preprocessing again")
    if asked.size not in (None, pose.size):
        size = "*".join(map(str, request.size))
        raise WanFastError(f"--size {size} is not that of {POSE}, {width}*{height}, which the video takes; leave it out")
    if not min(boxed_size(picture, pose.size)):
        raise WanFastError(
            f"{where}: {PERSON} is {picture[0]}x{picture[1]} pixels, of which nothing is left in {width}x{height}; crop it"
        )
    length, history, count = request.num_frames, request.refert_num or 1, len(pose.times)
    if length <= history:
        raise WanFastError(
            f"--frame_num {length}, the frames of a clip, must be more than the {history} that it takes over (--refert_num); "
            f"take {spec.num_frames}"
        )
    enough = 4 * ceil((max(count, history + 1) - 1) / 4) + 1
    segments, latent_frames = chain(count, length, history), spec.vae_spec.latent_frames(length)
    # poses, and what is there of the clip
    of_clip: list[Encoded] = [(latent_frames, None), (latent_frames, None if request.replace_flag else 1)]
    return Framing(
        pose.size,
        count,
        leading=1,
        note=f"{POSE} has {_length(pose)}, a clip {length}; --frame_num {enough} is as many as it needs" * (enough < length),
        latent_frames=latent_frames,
        segments=segments,
        history=history,
        fps=round(count / pose.times[-1][1], 3),
        sound=_sound_of(request, folder),
        encoded=(PICTURE, *of_clip * len(segments)),
    )


# of a request with every default filled in, the task, and the request as it was made
FRAME: dict[str, Callable[[Resolved, TaskSpec, Request], Framing]] = {
    "text": as_asked,
    "text_image": by_picture,
    "image": by_area,
    "first_last": by_first_frame,
    "vace": by_footage,
    "animate": by_folder,
    "speech": by_speech,
    "subjects": by_references,
    "poses": by_poses,
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


def size_below(area_size: Size, image: Size, grid: int = 64) -> Size:
    """(width, height) of a picture's shape on the grid, not above the area of `area_size`, and not larger than the picture but
    for rounding up."""
    area, (width, height) = area_size[0] * area_size[1], image
    low, high = 0.1, 1.0
    if width * height > area:
        a, b, c = width * height, (grid - 1) * (width + height), (grid - 1) ** 2 - area
        # 2 a c and not 4 a c, as officially
        low, high = (sqrt(b * b - 2 * a * c) - b) / (2 * a), sqrt(area / a)
    for i in range(100):
        scale = high - (high - low) * i / 100
        columns, rows = (max(1, ceil(int(side * scale) / grid)) * grid for side in image)
        if columns * rows <= area:
            return columns, rows
    raise _too_small(area_size, image, grid)


def scaled_sides(picture: Size, size: Size) -> Size:
    """Sides of a picture that is scaled until its shorter one is as long as that of a size; the longer may fall short of it."""
    short = min(picture)
    width, height = (int(min(size) * side / short) for side in picture)
    return width, height


def _notes_on_picture(area_size: Size, picture: Size, size: Size) -> list[str]:
    notes, (width, height) = [], scaled_sides(picture, size)
    if width < size[0] or height < size[1]:
        notes.append(
            f"--image fills {min(width, size[0])}x{min(height, size[1])} of {size[0]}x{size[1]} pixels, and black the rest, as "
            f"officially; cut it to the shape of {size[0]}x{size[1]}"
        )
    if 2 * picture[0] * picture[1] < area_size[0] * area_size[1]:
        notes.append(
            f"--image has {picture[0]}x{picture[1]} pixels, and is not enlarged to an area of {area_size[0]}*{area_size[1]}; "
            "give a larger one for a larger video"
        )
    return notes


def _poses(request: Resolved, size: Size, seconds: float, count: int, fps: int) -> tuple[tuple[int, ...], list[str]]:
    """Indices of the frames of poses, `count` where there are so many, and what is to be said of them."""
    if request.pose_video is None:
        return (), []
    video = examine(Path(request.pose_video), "--pose_video")
    ends, (width, height) = [end for _, end in video.times], video.size
    if ends[-1] + 1 / fps < seconds:
        raise WanFastError(
            f"--pose_video lasts {ends[-1]:.2f} seconds, {seconds:.2f} of --audio are to be seen; give a longer one, cut the "
            "sound, or take a smaller --num_clip"
        )
    # a millisecond on, as files may round their times to one
    frames = tuple(bisect_right(ends, i / fps + 0.001) for i in range(count) if i / fps + 0.001 < ends[-1])
    notes = []
    if abs(width * size[1] / (height * size[0]) - 1) > 0.1:
        notes.append(f"--pose_video is {width}x{height} pixels, of another shape than {size[0]}x{size[1]}: its middle is taken")
    return frames, notes


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


def boxed_size(picture: Size, size: Size) -> Size:
    """Sides of a picture that is scaled to fit into a size; one of them is the size's own."""
    if picture[1] * size[0] > size[1] * picture[0]:
        return int(size[1] / picture[1] * picture[0]), size[1]
    return size[0], int(size[0] / picture[0] * picture[1])


def _check_references(request: Resolved, size: Size, fitted: Callable[[Size, Size], Size] = fitted_size) -> None:
    for path in request.src_ref_images:
        picture = image_size(Path(path))
        if not min(fitted(picture, size)):
            raise WanFastError(
                f"--src_ref_images {str(path)!r} is {picture[0]}x{picture[1]} pixels, of which nothing is left in a clip of "
                f"{size[0]}x{size[1]}; cut it to what is to be seen"
            )


def folder_of(request: Resolved) -> Path:
    """The folder of --src_root_path, or that of its file, as an official command line has it."""
    assert request.src_root_path is not None
    path = Path(request.src_root_path)
    return path if path.is_dir() else path.parent


def chain(count: int, length: int, history: int) -> tuple[Segment, ...]:
    """Clips of `length` frames that together have `count`, each beginning with the last `history` of the one before."""
    clips, step = [Segment(index=0, start=0, offset=0, skip=0, count=min(length, count))], length - history
    for start in range(step, count - history, step):
        offset = start + history
        clips.append(Segment(index=len(clips), start=start, offset=offset, skip=history, count=min(step, count - offset)))
    return tuple(clips)


def reflected(start: int, length: int, count: int) -> list[int]:
    """Indices of `length` frames from `start` on, of a video of `count` that goes back and forth."""
    period = max(1, 2 * (count - 1))
    return [min(index % period, period - index % period) for index in range(start, start + length)]


def _driving(request: Resolved) -> dict[str, Footage]:
    """The videos of Animate's folder, by name, of one length."""
    folder, names = folder_of(request), (POSE, FACE, BACKGROUND, MASK) if request.replace_flag else (POSE, FACE)
    where = f"--src_root_path {str(folder)!r}"
    for name in (*names, PERSON):
        if not (folder / name).is_file():
            without = ", or leave out --replace_flag" * (name in (BACKGROUND, MASK))
            raise WanFastError(f"{where} has no {name}; give the folder that the preprocessing wrote{without}")
    footage = {name: examine(folder / name, "--src_root_path") for name in names}
    for name, video in footage.items():
        told = [(_length(video), _length(footage[POSE]))]
        if name != FACE:
            told.append((_sides(video), _sides(footage[POSE])))
        for own, of_poses in told:
            if own != of_poses:
                raise WanFastError(f"{where}: {name} has {own}, {POSE} {of_poses}; run the preprocessing again")
    if footage[FACE].size[0] != footage[FACE].size[1]:
        raise WanFastError(f"{where}: {FACE} has {_sides(footage[FACE])}, faces are square; run the preprocessing again")
    return footage


def _sound_of(request: Resolved, folder: Path) -> Path | None:
    """The file that is given for its sound, else the first of the folder's videos that has any."""
    if request.audio is not None:
        return examine_sound(Path(request.audio), "--audio").path
    files = (folder / name for name in (POSE, FACE, BACKGROUND))
    sounding = next((file for file in files if file.is_file() and has_sound(file)), None)
    return None if sounding is None else examine_sound(sounding, "--src_root_path").path


def _check_mask(video: Footage, mask: Footage) -> None:
    for of_video, of_mask in ((_sides(video), _sides(mask)), (_length(video), _length(mask))):
        if of_video != of_mask:
            raise WanFastError(f"--src_mask has {of_mask}, --src_video {of_video}; make the mask from the video")


def _sides(footage: Footage) -> str:
    return f"{footage.size[0]}x{footage.size[1]} pixels"


def _length(footage: Footage) -> str:
    return f"{len(footage.times)} frame{'s' * (len(footage.times) != 1)}"
