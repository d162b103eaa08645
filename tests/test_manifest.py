import json
import re
from pathlib import Path

import pytest
import torch

from wan_fast import manifest
from wan_fast.counting import counted
from wan_fast.dit import WanDiT
from wan_fast.encoders import ImageEncoder, TextEncoder
from wan_fast.manifest import DiTDims, VaeDims
from wan_fast.names import DIT_NAMES, TEXT_NAMES, VAE21_NAMES, VAE22_NAMES, native_name
from wan_fast.tasks import TASKS, VAES
from wan_fast.vae import WanVAE

MANIFESTS = Path(__file__).parent / "manifests"
COUNTS = {
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "t2i-14B": 14_288_491_584,
    "t2v-A14B": 14_288_491_584,
    "i2v-A14B": 14_288_901_184,
    "i2v-14B": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
    "vace-1.3B": 2_153_972_032,
    "vace-14B": 17_337_592_896,
    "ti2v-5B": 4_999_787_712,
    "s2v-14B": 16_295_755_609,
}
TERA = 1e12


def read(name):
    return {key: tuple(shape) for key, shape in json.loads((MANIFESTS / f"{name}.json").read_text()).items()}


def shapes_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("task", COUNTS)
def test_dit_has_exactly_the_released_tensors(task):
    dims = DiTDims.of_task(TASKS[task])
    released = read(task.replace("t2i", "t2v"))
    with torch.device("meta"):
        built = shapes_of(WanDiT(dims))
    assert built == released == manifest.dit_shapes(dims)
    assert manifest.num_parameters(built) == COUNTS[task]
    assert DiTDims.of_shapes(released, {}) == dims
    assert DiTDims.of_shapes(released, {"vace_layers": list(dims.vace_layers)}) == dims


@pytest.mark.parametrize(("version", "count"), [("2.1", 126_892_531), ("2.2", 704_688_668)])
def test_vae_has_exactly_the_released_tensors(version, count):
    dims = VaeDims.of_spec(VAES[version])
    with torch.device("meta"):
        built = shapes_of(WanVAE(dims))
    assert built == read(f"vae-{version}") == manifest.vae_shapes(dims)
    assert manifest.num_parameters(built) == count
    assert VaeDims.of_shapes(built) == dims


def test_text_encoder_has_exactly_the_released_tensors():
    released = read("umt5-xxl-encoder")
    assert manifest.text_shapes_like(released) == released
    assert manifest.num_parameters(released) == 5_680_910_336
    with torch.device("meta"):
        encoder = TextEncoder(released)
        encoder.load_state_dict({name: torch.empty(shape) for name, shape in released.items()}, assign=True)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("t2v-1.3B", DIT_NAMES),
        ("t2v-14B", DIT_NAMES),
        ("ti2v-5B", DIT_NAMES),
        *((name, DIT_NAMES) for name in ("i2v-14B", "flf2v-14B", "i2v-A14B", "vace-1.3B", "vace-14B")),
        ("vae-2.1", VAE21_NAMES),
        ("vae-2.2", VAE22_NAMES),
        ("umt5-xxl-encoder", TEXT_NAMES),
    ],
)
def test_diffusers_names_map_to_native_ones(name, rules):
    mapped = {native_name(stored, rules): shape for stored, shape in read(f"diffusers/{name}").items()}
    mapped.pop(None, None)
    assert mapped == read(name)


@pytest.mark.parametrize(
    ("task", "tokens", "tflop"),
    [
        ("t2v-1.3B", 32760, 283.0),
        ("t2v-14B", 75600, 6523.4),
        ("ti2v-5B", 27280, 517.0),
        ("t2i-14B", 4096, 115.6),
        ("i2v-14B", 32760, 1686.4),
        ("i2v-14B", 75600, 6540.5),
        ("flf2v-14B", 75600, 6557.5),
        ("i2v-A14B", 75600, 6523.5),
        ("vace-1.3B", 32760, 427.0),
        ("vace-1.3B", 35880, 498.6),
        ("vace-14B", 75600, 7864.1),
        ("vace-14B", 82800, 9198.8),
    ],
)
def test_dit_flops(task, tokens, tflop):
    dims, images = DiTDims.of_task(TASKS[task]), TASKS[task].image_tokens
    once = manifest.dit_text_flops(dims) + manifest.dit_inputs_flops(dims, (16, 1, 2, 2 * tokens), images)
    assert (manifest.dit_flops(dims, tokens, images) + once) / TERA == pytest.approx(tflop, abs=0.06)


@pytest.mark.parametrize(
    ("version", "part", "latents", "tflop"),
    [
        ("2.1", "decoder", (21, 60, 104), 275.4),
        ("2.1", "decoder", (21, 90, 160), 639.2),
        ("2.1", "decoder", (1, 90, 160), 10.2),
        ("2.1", "encoder", (21, 90, 160), 381.7),
        ("2.1", "encoder", (1, 90, 160), 6.5),
        ("2.2", "decoder", (31, 44, 80), 2011.1),
        ("2.2", "decoder", (2, 44, 80), 86.9),
        ("2.2", "encoder", (31, 44, 80), 382.6),
        ("2.2", "encoder", (1, 44, 80), 4.2),
    ],
)
def test_vae_flops(version, part, latents, tflop):
    dims = VaeDims.of_spec(VAES[version])
    assert manifest.vae_flops(dims, part, *latents, with_zeros=True) / TERA == pytest.approx(tflop, abs=0.06)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize(("frames", "changing"), [(2, 0), (9, 0), (33, 0), (33, 1)])
def test_flops_of_a_grey_clip_are_those_of_what_is_computed(version, frames, changing):
    dims = VaeDims(version=version, encoder_dim=8, decoder_dim=8, channels=VAES[version].channels)
    with torch.device("meta"):
        vae = WanVAE(dims).requires_grad_(False)
        grey, other = (torch.empty(3, 4, *(4 * side for side in VAES[version].stride[1:])) for _ in range(2))
    chunks = [grey[:, :1], *[grey] * (frames - 1 - changing), *[other] * changing]
    done = sum(work.flops for work in counted(lambda: vae.encode_stream(chunks, 4 * frames - 3)).values())
    assert done == pytest.approx(manifest.vae_flops(dims, "encoder", frames, 4, 4, changing=changing))


def test_clip_has_exactly_the_tensors_that_are_used_of_the_released_one():
    released = read("clip-xlm-roberta-vit-h-14")
    used = manifest.clip_shapes(manifest.CLIP)
    assert manifest.num_parameters({n: s for n, s in released.items() if n.startswith("visual.")}) == 632_076_800
    squeezed = {name: tuple(side for side in released[name] if side > 1 or len(released[name]) < 3) for name in used}
    assert {n: squeezed[n] if "embedding" in n and "patch" not in n else released[n] for n in used} == used
    left = {name for name in released if name.startswith("visual.")} - set(used)
    assert left and all(re.match(r"visual\.(?:transformer\.31\.|post_norm\.|head)", name) for name in left)
    assert manifest.clip_flops(manifest.CLIP) / TERA == pytest.approx(0.324, abs=0.001)
    with torch.device("meta"):
        encoder = ImageEncoder(manifest.CLIP)
        encoder.load_state_dict({name: torch.empty(shape) for name, shape in used.items()}, assign=True)


def test_text_flops():
    assert manifest.text_flops(read("umt5-xxl-encoder"), 512) / TERA == pytest.approx(4.84, abs=0.01)
