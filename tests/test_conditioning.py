"""What models are given, against the document's rules written out; the encoders are stand-ins that tell what they saw."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from clips_of import noise, write_clip
from models import random_vae, relative_error
from PIL import Image
from torch.nn import functional as F

from wan_fast.conditioning import PREPARE
from wan_fast.conditioning.image import grey_but_for, mask_of
from wan_fast.conditioning.vace import covering, fitted, mask_channels
from wan_fast.config import Request
from wan_fast.framing import FRAME
from wan_fast.resolving import resolve
from wan_fast.tasks import TASKS

SIZE, FRAMES = (96, 64), 9


class Seen:
    """Encoders that keep what they are given, and return something of the right shape."""

    def __init__(self):
        self.texts, self.videos, self.pictures = [], [], []

    def encode_text(self, texts):
        self.texts.append(texts)
        return {name: torch.zeros(3, 8) for name in texts}

    def encode_image(self, pictures):
        self.pictures.append(pictures)
        return torch.zeros(len(pictures), 257, 160)

    def encode_video(self, chunks, num_frames):
        lengths, frames = [], []
        for chunk in chunks:
            lengths.append(chunk.shape[1])
            frames.append(chunk.clone())
        assert lengths == [1] + [4] * ((num_frames - 1) // 4)
        self.videos.append(torch.cat(frames, dim=1))
        number = len(self.videos)
        return torch.full((16, (num_frames + 3) // 4, frames[0].shape[2] // 8, frames[0].shape[3] // 8), float(number))


@pytest.fixture
def prepared(tmp_path):
    """(task, **request) -> the conditioning, and what the encoders saw."""
    rng = np.random.default_rng(0)
    for name, size in {"a": SIZE, "b": SIZE, "tall": (40, 100), "wide": (200, 50)}.items():
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    write_clip(tmp_path / "video.mkv", noise(FRAMES, 64, 96))
    write_clip(
        tmp_path / "mask.mkv", np.where(noise(FRAMES, 64, 96, seed=1)[..., :1].repeat(3, -1) > 90, 255, 0).astype(np.uint8)
    )

    def prepared(task, seen=None, **given):
        files = {
            n: tuple(str(tmp_path / e) for e in v) if isinstance(v, tuple) else str(tmp_path / v) for n, v in given.items()
        }
        spec, seen = TASKS[task], seen or Seen()
        request = resolve(spec, Request(prompt="x", size=SIZE, num_frames=FRAMES, seed=0, **files))
        framing = FRAME[spec.kind](request, spec, Request())
        request = replace(request, size=framing.size, num_frames=framing.num_frames)
        return PREPARE[spec.kind](request, framing, seen)(framing.clips[0], None), seen

    prepared.folder = tmp_path
    return prepared


def pixels(folder, name):
    return torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize(("task", "clip"), [("i2v-14B", True), ("i2v-A14B", True)])
def test_a_picture_begins_a_clip_of_grey(prepared, task, clip):
    made, seen = prepared(task, image="a.png")
    (video,), (pictures,) = seen.videos, seen.pictures
    a = pixels(prepared.folder, "a")
    assert torch.allclose(video[:, 0], F.interpolate(a[None], size=(64, 96), mode="bicubic")[0], atol=1e-6)
    assert video.shape[1] == FRAMES and not video[:, 1:].any()
    assert len(pictures) == 1 and torch.allclose(pictures[0], a, atol=1e-6)  # at its own resolution
    mask, latents = made.inputs.channels.split([4, 16])
    assert (latents == 1).all() and mask.shape == (4, 3, 8, 12)
    assert (mask[:, 0] == 1).all() and not mask[:, 1:].any()
    assert made.known is None and made.split == 0 and made.inputs.control is None


def test_first_and_last_frame(prepared):
    made, seen = prepared("flf2v-14B", first_frame="a.png", last_frame="b.png")
    (video,), (pictures,) = seen.videos, seen.pictures
    a, b = pixels(prepared.folder, "a"), pixels(prepared.folder, "b")
    assert torch.allclose(video[:, 0], a, atol=1e-5) and torch.allclose(video[:, -1], b, atol=1e-5)
    assert not video[:, 1:-1].any() and [p.shape for p in pictures] == [a.shape, b.shape]
    mask = made.inputs.channels[:4]
    assert (mask[:, 0] == 1).all() and not mask[:, 1].any()
    assert mask[:, 2, 0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("num_frames", [1, 5, 81, 121])
def test_the_mask_is_the_official_packing(num_frames):
    frames = {0: None, num_frames - 1: None}
    plain = torch.zeros(1, num_frames, 2, 3)
    plain[:, [0, -1]] = 1
    packed = torch.cat([plain[:, :1].repeat_interleave(4, dim=1), plain[:, 1:]], dim=1)
    packed = packed.view(1, packed.shape[1] // 4, 4, 2, 3).transpose(1, 2)[0]
    assert torch.equal(mask_of(frames, num_frames, torch.empty(16, (num_frames + 3) // 4, 2, 3)), packed)


def test_chunks_of_grey_are_one_tensor():
    first, last = torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0)
    chunks = list(grey_but_for({0: first, 12: last}, 13))
    assert [c.shape[1] for c in chunks] == [1, 4, 4, 4] and chunks[1] is chunks[2] and chunks[3] is not chunks[2]
    assert not chunks[1].any() and torch.equal(chunks[3][:, -1], last) and not chunks[3][:, :-1].any()
    assert [len({id(c) for c in grey_but_for({0: first}, n)}) for n in (1, 5, 81)] == [1, 2, 2]


def test_pictures_are_resized_as_officially(prepared):
    _, seen = prepared("i2v-14B", image="tall.png")
    expected = F.interpolate(pixels(prepared.folder, "tall")[None], size=seen.videos[0].shape[2:], mode="bicubic")[0]
    assert torch.allclose(seen.videos[0][:, 0], expected, atol=1e-6)
    assert seen.videos[0].shape[2:] == (112, 48)  # 96 * 64 in the shape of 40 x 100


# --- VACE -----------------------------------------------------------------------------------------------------------------


def official_mask(mask, k):
    """[F, H, W] -> [64, k + T, h, w], by the document: 8 x 8 pixels to channels, nearest in time, nothing for references."""
    Fr, H, W = mask.shape
    m = mask.float().view(Fr, H // 8, 8, W // 8, 8).permute(2, 4, 0, 1, 3).reshape(64, Fr, H // 8, W // 8)
    m = F.interpolate(m[None], size=((Fr + 3) // 4, H // 8, W // 8), mode="nearest-exact")[0]
    return torch.cat([torch.zeros(64, k, H // 8, W // 8), m], dim=1)


@pytest.mark.parametrize("frames", [1, 5, 9, 33, 81, 121])
def test_mask_channels_are_the_official_ones(frames):
    mask = torch.rand(frames, 16, 24) > 0.5
    assert torch.equal(mask_channels(iter(mask), frames), official_mask(mask, 0))


def test_nothing_to_follow(prepared):
    made, seen = prepared("vace-1.3B")
    control = made.inputs.control
    assert control.shape == (96, 3, 8, 12) and len(seen.videos) == 1 and not seen.videos[0].any()
    assert (control[:32] == 1).all() and (control[32:] == 1).all()  # of the one clip encoded; all of it is to be made


def test_a_video_alone_is_made_anew_all_of_it(prepared):
    made, seen = prepared("vace-1.3B", src_video="video.mkv")
    kept, changed = seen.videos
    assert not kept.any() and torch.allclose(changed, torch.from_numpy(noise(FRAMES, 64, 96)).permute(3, 0, 1, 2) / 127.5 - 1)
    assert (made.inputs.control[:16] == 1).all() and (made.inputs.control[16:32] == 2).all()
    assert (made.inputs.control[32:] == 1).all()


def test_a_mask_says_what_is_made_anew_and_references_come_first(prepared):
    made, seen = prepared("vace-1.3B", src_video="video.mkv", src_mask="mask.mkv", src_ref_images=("a.png", "wide.png"))
    kept, changed, first, second = seen.videos
    video = torch.from_numpy(noise(FRAMES, 64, 96)).permute(3, 0, 1, 2) / 127.5 - 1
    mask = torch.from_numpy(noise(FRAMES, 64, 96, seed=1)[..., 0] > 90)
    assert 0.2 < mask.float().mean() < 0.8
    assert torch.allclose(kept, video * ~mask) and torch.allclose(changed, video * mask)
    control = made.inputs.control
    assert control.shape == (96, 2 + 3, 8, 12)
    assert [control[0, i, 0, 0].item() for i in range(5)] == [3, 4, 1, 1, 1]  # in the order given
    assert [control[16, i, 0, 0].item() for i in range(5)] == [0, 0, 2, 2, 2]
    assert torch.equal(control[32:], official_mask(mask, 2))
    assert torch.allclose(first[:, 0], pixels(prepared.folder, "a"), atol=1e-6)
    # 200 x 50 in 96 x 64: 96 x 24 on white
    scaled = F.interpolate(pixels(prepared.folder, "wide")[None], size=(24, 96), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(second[:, 0, 20:44], scaled, atol=1e-6)
    assert (second[:, 0, :20] == 1).all() and (second[:, 0, 44:] == 1).all()


def test_a_reference_of_the_clips_size_is_taken_as_it_is(prepared):
    picture = Image.open(prepared.folder / "a.png")
    assert torch.allclose(fitted(picture, SIZE)[:, 0], pixels(prepared.folder, "a"), atol=1e-6)
    tall = fitted(Image.open(prepared.folder / "tall.png"), SIZE)  # 40 x 100 -> 25 x 64
    assert (tall[:, 0, :, :35] == 1).all() and (tall[:, 0, :, 60:] == 1).all() and (tall[:, 0, :, 35:60] != 1).any()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 192), (200, 100), (50, 300), (63, 95)])
def test_frames_cover_the_clip(height, width):
    frame = torch.from_numpy(noise(1, height, width)[0])
    made = covering(frame, SIZE)
    assert made.dtype == torch.uint8 and made.shape == (3, 64, 96)
    scale = max(96 / width, 64 / height)
    sides = round(scale * height), round(scale * width)
    plain = F.interpolate(frame.permute(2, 0, 1)[None].float(), size=sides, mode="bicubic", antialias=True)[0]
    top, left = (sides[0] - 64) // 2, (sides[1] - 96) // 2
    wanted = plain[:, top : top + 64, left : left + 96].clamp(0, 255)
    # in 8 bits what one direction overshoots by is cut off before the other
    difference = (made.float() - wanted).abs()
    assert difference.mean() < 0.5 and difference.flatten().quantile(0.99) < 4


def test_latents_of_references_are_those_of_single_pictures(prepared):
    """Each goes through the VAE on its own: a clip of them would remember the ones before."""
    vae = random_vae("2.1")

    class Real(Seen):
        def encode_video(self, chunks, num_frames):
            return vae.encode_stream(chunks, num_frames)

    made, _ = prepared("vace-1.3B", Real(), src_ref_images=("a.png", "b.png"))
    for index, name in enumerate("ab"):
        alone = vae.encode(pixels(prepared.folder, name)[:, None])
        assert relative_error(made.inputs.control[:16, index], alone[:, 0]) < 1e-5
        assert not made.inputs.control[16:, index].any()


def test_texts_are_encoded_once_per_branch(prepared):
    for task, given in (("i2v-14B", {"image": "a.png"}), ("vace-1.3B", {})):
        _, seen = prepared(task, **given)
        assert [sorted(texts) for texts in seen.texts] == [["conditional", "unconditional"]]
        assert seen.texts[0]["unconditional"] == TASKS[task].negative_prompt
