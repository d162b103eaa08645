"""A chain of clips takes no more memory the longer it is."""

import gc

import pytest
from clips_of import write_folder
from meter import Meter
from models import write_native
from PIL import Image
from sounds_of import tone, write_sound

from wan_fast.config import EngineConfig, Request
from wan_fast.engine import Engine

CLIPS, FEW = 10, 5
# latents of a clip, which the video has in the end: fp32, 16 channels of 8 x 8
FRAME = 4 * 16 * 8 * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chains")
    for task in ("s2v-14B", "animate-14B"):
        write_native(made / task, task, layers=1, width=128)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(made / "picture.png")
    write_sound(made / "sound.wav", tone(220, 16000, 18.0), 16000)
    for clips in (FEW, CLIPS):
        write_folder(made / f"driving-{clips}", 4 * clips + 1, size=(64, 64), face=16)
    return made


# what is asked for, and latent frames of a clip; after three of 28 frames there are all 73 that S2V's next one is given
CASES = {
    "s2v": ("s2v-14B", dict(image="picture.png", audio="sound.wav", infer_frames=28, num_clip=CLIPS), 7),
    "animate": ("animate-14B", dict(src_root_path="driving-10", num_frames=5, guidance_scale=3.0, replace_flag=True), 2),
}


def bytes_by_clip(folder, name, take=lambda pixels: None, **changes):
    """Of each clip what is alive at its first step, and the most from there on; without the latents of those before."""
    task, given, frames = CASES[name]
    given = given | changes
    files = {key: str(folder / value) for key, value in given.items() if isinstance(value, str)}
    request = Request(**{**given, **files}, prompt="a red ball", size=(64, 64), num_steps=1, seed=0)
    engine = Engine(EngineConfig(task=task, checkpoint=str(folder / task), device="cpu", no_cache=True))
    alive, most = [], []

    def note_peak():
        if alive:
            most.append(meter.peak - (len(alive) - 1) * frames * FRAME)

    def on_step(step):
        if step.index == 0:
            note_peak()
            gc.collect()
            alive.append(meter.live - len(alive) * frames * FRAME)
            meter.peak = meter.live

    with Meter() as meter:
        engine.generate(request, on_step=on_step, on_pixels=take)
    note_peak()
    return alive, most


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_chain_is_flat(folder, name):
    alive, most = bytes_by_clip(folder, name)
    assert len(alive) == len(most) == CLIPS
    assert len({*alive[3:]}) == 1, "more is alive from clip to clip"
    assert len({*most[3:]}) == 1, "a later clip takes more"


def test_frames_that_are_kept_are_noticed(folder):
    kept = []
    alive, _ = bytes_by_clip(folder, "animate", take=kept.append, src_root_path=f"driving-{FEW}")
    assert len(alive) == FEW and alive[-1] - alive[2] == 2 * 4 * 64 * 64 * 3
