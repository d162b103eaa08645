"""Small sounds in files of many kinds."""

from fractions import Fraction

import av
import numpy as np

NAMES = {1: "mono", 2: "stereo", 6: "5.1"}


def tone(frequency, rate, seconds=1.0, level=0.5):
    """[n] fp64."""
    return level * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def clicks(times, rate, seconds, channels=1):
    """[channels, n] fp64: silence, and two milliseconds of a constant from each time on."""
    samples = np.zeros((channels, round(rate * seconds)))
    for time in times:
        samples[:, round(time * rate) : round(time * rate) + rate // 500] = 0.5
    return samples


def write_sound(path, samples, rate, codec=None, form="dblp", video=None, begin=0.0, **muxer):
    """A file of samples [channels, n] or [n], as floats in [-1, 1] or as integers of the format `form`.

    Args:
        codec: by default what the container of this suffix has for sound.
        begin: when the sound starts, in seconds.
        video: [F, H, W, 3] uint8 at 16 frames per second, shown beside it.
    """
    samples = np.atleast_2d(samples)
    if form == "dblp":
        samples = samples.astype(np.float64)
    layout = NAMES[len(samples)]
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec or {".mp4": "aac"}.get(path.suffix) or container.default_audio_codec, rate=rate)
        stream.layout = layout
        if video is not None:
            shown = container.add_stream("libx264", rate=Fraction(16))
            shown.height, shown.width, shown.pix_fmt = *video.shape[1:3], "yuv420p"
            for pixels in video:
                container.mux(shown.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(shown.encode())
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=form, layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(begin * rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def heard(path):
    """(samples [channels, n] fp32, rate, start in seconds) of the sound in a file, as a player hears it."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    assert all(frame.format.is_planar for frame in frames)
    return np.concatenate([frame.to_ndarray() for frame in frames], 1), frames[0].sample_rate, frames[0].time


def onsets(samples, rate, start):
    """When clicks begin, in seconds."""
    loud = np.flatnonzero(abs(samples) > 0.15)
    return [start + at / rate for before, at in zip([-rate, *loud], loud, strict=False) if at - before > rate / 20]
