import json
from pathlib import Path

import pytest
import torch

from wan_fast import manifest
from wan_fast.dit import WanDiT
from wan_fast.encoders import TextEncoder
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
    "ti2v-5B": 4_999_787_712,
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
    [("t2v-1.3B", 32760, 283.0), ("t2v-14B", 75600, 6523.4), ("ti2v-5B", 27280, 517.0), ("t2i-14B", 4096, 115.6)],
)
def test_dit_flops(task, tokens, tflop):
    dims = DiTDims.of_task(TASKS[task])
    assert (manifest.dit_flops(dims, tokens) + manifest.dit_text_flops(dims)) / TERA == pytest.approx(tflop, abs=0.06)


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


def test_text_flops():
    assert manifest.text_flops(read("umt5-xxl-encoder"), 512) / TERA == pytest.approx(4.84, abs=0.01)
