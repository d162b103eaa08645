"""Small pictures and videos, with what real files have: rotations, uneven times, covers, sound."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image

LOSSLESS = {".mp4": ("libx264rgb", "rgb24"), ".mkv": ("ffv1", "bgr0"), ".gif": ("gif", "rgb8")}


def noise(frames=6, height=48, width=64, seed=0):
    """Frames [F, H, W, 3] uint8, no two alike, of large blocks that a lossy codec keeps."""
    blocks = np.random.default_rng(seed).integers(0, 256, (frames, -(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return blocks.repeat(16, 1).repeat(16, 2)[:, :height, :width]


def write_clip(
    path, frames, rate=16, times=None, codec=None, pix_fmt=None, rotation=0, sound=False, title="", options=None, **muxer
):
    """A video of frames [F, H, W, 3 or 4] uint8, lossless by default in MP4 and Matroska.

    Args:
        times: the start of each frame in seconds, to the millisecond; by default those of `rate`.
        rotation: degrees by which a player turns the frames clockwise (MP4).
        sound: adds a stream of silence before that of the video.
        options, muxer: for the codec and for the muxer.
    """
    default, default_format = LOSSLESS.get(path.suffix, (None, "yuv420p"))
    with av.open(str(path), "w", options=muxer) as container:
        container.metadata["title"] = title
        voice = container.add_stream("aac", rate=44100) if sound else None
        stream = container.add_stream(codec or default, rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or ("yuv420p" if codec else default_format)
        stream.options = {"crf": "0", **(options or {})} if stream.name.startswith("libx264") else options or {}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            _silence(container, voice)
    if rotation:
        path.write_bytes(_turned(path.read_bytes(), rotation))
    return path


def write_folder(folder, frames, *, size=(64, 48), face=32, rate=30, sound=(), picture=(64, 48), seed=0, **others):
    """The files that Animate's preprocessing makes, of noise; returns the frames [F, H, W, 3] uint8 by name.

    Args:
        sound: names of the videos that have any.
        others: lengths and sizes that differ, as `mask_frames` and `mask_size`.
    """
    folder.mkdir(exist_ok=True)
    clips = {}
    for number, name in enumerate(("pose", "face", "bg", "mask"), seed):
        width, height = others.get(f"{name}_size", (face, face) if name == "face" else size)
        clips[name] = noise(others.get(f"{name}_frames", frames), height, width, seed=number)
    clips["mask"] = np.where(clips["mask"][..., :1] > 99, np.uint8(255), np.uint8(0)).repeat(3, -1)
    for name, pixels in clips.items():
        write_clip(folder / f"src_{name}.mp4", pixels, rate=rate, sound=name in sound)
    pixels = np.random.default_rng(seed + 9).integers(0, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "src_ref.png")
    return clips


def write_sound(path, cover):
    """A FLAC file of silence, with a cover picture or without."""
    with av.open(str(path), "w") as container:
        _silence(container, container.add_stream("flac", rate=44100))
    if cover:
        picture = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(picture, "PNG")
        fields = (struct.pack(">II", 3, 9), b"image/png", struct.pack(">6I", 0, 32, 32, 24, 0, len(picture.getvalue())))
        block = b"".join((*fields, picture.getvalue()))
        content = path.read_bytes()
        # RFC 9639: a marker of 4 bytes, then blocks; the first is 38 bytes long, and a block of type 6 is a picture
        path.write_bytes(content[:42] + struct.pack(">I", 6 << 24 | len(block)) + block + content[42:])
    return path


def _silence(container, voice):
    kind = "fltp" if voice.codec_context.name == "aac" else "s16"
    for number in range(9):
        samples = np.zeros((2, 1024), np.float32) if kind == "fltp" else np.zeros((1, 2048), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format=kind, layout="stereo")
        frame.sample_rate, frame.pts = 44100, number * 1024
        container.mux(voice.encode(frame))
    container.mux(voice.encode())


def _turned(content, rotation):
    """The bytes of an MP4 with the display matrix of a clockwise turn, as phones write it, in the header of its one track."""
    # ISO 14496-12: the matrix is 40 bytes after the name of a track header of version 0
    at = content.index(b"tkhd") + 4 + 40
    assert content.count(b"tkhd") == 1 and content[at - 40] == 0
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}.get(rotation, (0.7, 0.7))
    one = 1 << 16
    matrix = struct.pack(">9i", *(int(x * one) for x in (cosine, sine, 0, -sine, cosine, 0, 0, 0)), 1 << 30)
    return content[:at] + matrix + content[at + 36 :]


def png(pixels, transparent=None):
    """The bytes of a PNG of 16 bits a sample: grey [H, W] or RGB [H, W, 3]; `transparent` is one value of grey."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 * (pixels.ndim == 3), 0, 0, 0))]
    chunks += [] if transparent is None else [(b"tRNS", struct.pack(">H", transparent))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
