import json
import shutil
from dataclasses import replace
from functools import partial
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from models import relative_error
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from wan_fast import checkpoint, names, sound
from wan_fast.conditioning.audio import bucketed, to_30_hz
from wan_fast.encoders import AudioEncoder
from wan_fast.errors import WanFastError
from wan_fast.headers import TensorInfo
from wan_fast.loading import load_model
from wan_fast.manifest import num_parameters
from wan_fast.manifest.audio import AUDIO, AudioDims, audio_flops, audio_shapes
from wan_fast.manifest.speech import SpeechDims
from wan_fast.tasks import TASKS

FOLDER = "wav2vec2-large-xlsr-53-english"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [16, 16, 24, 16, 16, 16, 32],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@pytest.fixture(scope="module")
def official():
    """transformers' model with a small configuration of the released form, whose gains are not all 1."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(**SIZES, feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True)
    model = Wav2Vec2ForCTC(config).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            tensor += 0.2 * torch.randn_like(tensor)
        elif "original0" not in name:
            tensor += 0.05 * torch.randn_like(tensor)
    return model


def write_encoder(folder, official, *, naming="hub", **config):
    """A folder as it lies on the hub, with weights under one of the names that they go by."""
    state = dict(official.state_dict())
    if naming == "hub":
        for new, old in (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")):
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
    elif naming == "bare":
        state = {name.removeprefix("wav2vec2."): tensor for name, tensor in state.items() if not name.startswith("lm_head")}
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    told = {**official.config.to_dict(), "transformers_version": "4.7.0.dev0", **config}  # as the released folder has it
    (folder / "config.json").write_text(json.dumps(told, default=str))
    return folder


@pytest.fixture
def folder(tmp_path, official):
    """A checkpoint of another task, with an audio encoder beside its models."""
    shutil.copytree(checkpoint.locate("tiny", TASKS["t2v-1.3B"]), tmp_path / "checkpoint")
    write_encoder(tmp_path / "checkpoint" / FOLDER, official)
    return tmp_path / "checkpoint"


def encoder_of(part):
    return load_model(partial(AudioEncoder, AudioDims.of_config(part.config)), part, "cpu", lambda name: torch.float32)


def voice(n=8000):
    generator = np.random.default_rng(0)
    return np.float32(0.1 + 0.3 * np.sin(np.arange(n) * 0.1) + 0.1 * generator.standard_normal(n))


# the encoder


@pytest.mark.parametrize("naming", ["hub", "new", "bare"])
def test_the_encoder_is_that_of_transformers(tmp_path, official, naming):
    write_encoder(tmp_path / FOLDER, official, naming=naming)
    part = checkpoint.open_part(tmp_path / FOLDER, "audio encoder")
    expected_values = Wav2Vec2FeatureExtractor(do_normalize=True)(
        voice(), sampling_rate=16000, return_tensors="pt"
    ).input_values
    expected = official.wav2vec2(expected_values, output_hidden_states=True)
    found = encoder_of(part)(torch.tensor(voice()))
    assert found.shape == (4, sound.features(8000), 48) and found.dtype == torch.float32
    assert relative_error(found[:3], torch.cat(expected.hidden_states[:3])) < 1e-6
    # officially the last state is behind the last norm
    assert relative_error(found[3], expected.last_hidden_state[0]) < 1e-6
    normed = official.wav2vec2.encoder.layer_norm(found[3])
    assert relative_error(normed, found[3]) > 1e-3  # the norm is no identity here


@pytest.mark.parametrize("version", ["5.0.0", "5.23.0.dev0", "10.1.0"])
def test_a_folder_of_transformers_5_has_the_last_state_before_the_norm(tmp_path, official, version):
    def states(name, **config):
        folder = write_encoder(tmp_path / name, official, **config)
        return encoder_of(checkpoint.open_part(folder, "audio encoder"))(torch.tensor(voice()))

    normed, raw = states("released"), states("later", transformers_version=version)
    assert torch.equal(states("unnamed", transformers_version=None), normed)
    assert torch.equal(raw[:3], normed[:3])
    assert relative_error(official.wav2vec2.encoder.layer_norm(raw[3]), normed[3]) < 1e-6


def test_the_encoder_does_not_mind_loudness_and_gives_the_same_twice(tmp_path, official):
    model = encoder_of(checkpoint.open_part(write_encoder(tmp_path / FOLDER, official), "audio encoder"))
    once = model(torch.tensor(voice()))
    assert torch.equal(once, model(torch.tensor(voice())))
    assert relative_error(model(torch.tensor(3 * voice() + 1)), once) < 1e-4


@pytest.mark.parametrize("n", [400, 719, 720, 5000, 17600])
def test_as_many_frames_as_are_planned(official, n):
    assert official.wav2vec2.feature_extractor(torch.zeros(1, n)).shape[-1] == sound.features(n)


def test_the_table_of_tensors(official):
    dims = AudioDims.of_config(official.config.to_dict())
    native = {names.native_name(name, names.AUDIO_NAMES): tuple(t.shape) for name, t in official.state_dict().items()}
    del native[None]
    assert audio_shapes(dims) == native
    # the hub's page of the released model: 315 million, with the head and the mask
    assert num_parameters(audio_shapes(AUDIO)) == 315_437_696


def test_flops(official):
    dims = AudioDims.of_config(official.config.to_dict())
    eager = Wav2Vec2ForCTC._from_config(official.config, attn_implementation="eager").eval().wav2vec2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(torch.zeros(1, 16000))
    assert audio_flops(dims, 16000) == pytest.approx(counter.get_total_flops(), rel=0.01)


# in step with frames


@pytest.mark.parametrize("length", [2, 54, 71, 400])
def test_to_30_hz(length):
    hidden = torch.randn(3, length, 4, dtype=torch.float64)
    found, n = to_30_hz(hidden), int(length / 50 * 30)
    assert found.shape == (3, n, 4)
    at = np.arange(n) * ((length - 1) / (n - 1) if n > 1 else 0)
    for layer in range(3):
        for channel in range(4):
            expected = np.interp(at, np.arange(length), hidden[layer, :, channel].numpy())
            assert found[layer, :, channel].numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("length", "clip_frames", "fps"), [(32, 8, 16), (42, 8, 16), (149, 80, 16), (150, 80, 16), (31, 7, 8)])
def test_bucketed(length, clip_frames, fps):
    features = torch.randn(2, length, 3).bfloat16()
    found = bucketed(features, clip_frames, fps)
    clips = 1
    while clips * clip_frames * 30 / fps <= length:
        clips += 1
    assert found.shape == (2, 3, clips * clip_frames) and found.dtype == torch.bfloat16
    for i in range(clips * clip_frames):
        exact = 30 * i / fps
        nearest = floor(exact + 0.5)
        if exact % 1 == 0.5 and nearest % 2:
            nearest -= 1  # of two that are as near, the even one
        expected = features[:, nearest] if nearest < length else torch.zeros(2, 3)
        assert torch.equal(found[..., i], expected), i


# in a checkpoint


def test_a_checkpoint_has_one(folder):
    opened = checkpoint.open_checkpoint(folder)
    part = opened.audio_encoder
    assert part.path == folder / FOLDER and part.dtypes == "f32"
    assert part.shapes == audio_shapes(AudioDims.of_config(part.config))
    less = checkpoint.open_checkpoint(folder, less=["audio_encoder"])
    assert less.audio_encoder is None and opened.num_bytes - less.num_bytes == part.num_bytes > 0
    assert checkpoint.open_checkpoint(checkpoint.locate("tiny", TASKS["t2v-1.3B"])).audio_encoder is None


def test_it_is_found_under_another_name_and_in_the_diffusers_layout(folder, official, tmp_path):
    (folder / FOLDER).rename(folder / "audio_encoder")
    assert checkpoint.open_checkpoint(folder).audio_encoder.path == folder / "audio_encoder"
    write_encoder(folder / "another", official)
    with pytest.raises(WanFastError, match=r"several folders with an audio encoder: another/, audio_encoder/; keep one"):
        checkpoint.open_checkpoint(folder)
    write_encoder(folder / FOLDER, official)  # the usual name goes before
    assert checkpoint.open_checkpoint(folder).audio_encoder.path == folder / FOLDER
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "model_index.json").write_text("{}")
    write_encoder(tmp_path / "diffusers" / "audio_encoder", official)
    less = ["model", "high_noise", "low_noise"]
    assert checkpoint.open_checkpoint(tmp_path / "diffusers", less).audio_encoder.path.name == "audio_encoder"


def test_alone_it_makes_a_folder_that_others_may_add_to(official, tmp_path):
    write_encoder(tmp_path / FOLDER, official)
    assert checkpoint.open_checkpoint(tmp_path, ["model", "high_noise", "low_noise"]).audio_encoder is not None


def test_it_is_taken_for_no_other_model(official, tmp_path):
    write_encoder(tmp_path / "hub", official)
    write_encoder(tmp_path / "bare", official, naming="bare")
    for name in ("hub", "bare"):
        assert checkpoint.model_in([tmp_path / name / "model.safetensors"]) == "audio encoder"
        for other in ("image encoder", "text encoder", "DiT"):
            with pytest.raises(WanFastError, match=rf"looks like an audio encoder; give it as {FOLDER}/ in --ckpt_dir"):
                checkpoint.open_part(tmp_path / name / "model.safetensors", other)


def test_inspect_shows_it(folder):
    about = checkpoint.describe(checkpoint.open_checkpoint(folder))["parts"]["audio encoder"]
    assert (about["missing"], about["surplus"], about["wrong shape"]) == ("none", "none", "none")
    assert "dim 48" in about["sizes"] and about["file"] == str(folder / FOLDER)
    alone = checkpoint.describe_file(folder / FOLDER / "model.safetensors")
    assert (alone["kind"], alone["fits"]) == ("audio encoder", ["s2v-14B"])
    plain = checkpoint.open_checkpoint(folder, less=["audio_encoder"])
    assert "audio encoder" not in checkpoint.describe(plain)["parts"]
    speech = replace(plain, experts={"model": speaking(next(iter(plain.experts.values())))})
    assert checkpoint.describe(speech)["parts"]["audio encoder"] == {"missing": "the whole part"}


def speaking(dit, layers=4, width=48):
    """A DiT with the tensors that take what the audio encoder gives."""
    shapes = SpeechDims(layers=(0,), audio_layers=layers, audio_dim=width).shapes(256)
    more = {name: TensorInfo(name, name, shape, "F32", Path("x")) for name, shape in shapes.items()}
    return replace(dit, tensors={**dit.tensors, **more}, config={**dit.config, "audio_inject_layers": [0]})


def check(opened):
    """What `check` has to say of the audio encoder alone."""
    speech = TASKS["s2v-14B"]
    checkpoint.check(replace(opened, experts={}, vae=None, text_encoder=None, tokenizer=None), speech, whole=False)


def test_a_whole_one_is_accepted_where_it_is_needed(folder):
    opened = checkpoint.open_checkpoint(folder)
    check(opened)
    for layout, called in (("native", FOLDER), ("diffusers", "audio_encoder")):
        with pytest.raises(WanFastError, match=rf"has no {called}/; download the whole repository"):
            checkpoint._check_whole(replace(opened, layout=layout, audio_encoder=None), TASKS["s2v-14B"])
    checkpoint._check_whole(opened, TASKS["s2v-14B"])
    checkpoint._check_whole(replace(opened, audio_encoder=None), TASKS["t2v-1.3B"])


def test_it_must_be_of_the_width_and_depth_that_the_dit_takes(folder):
    opened = checkpoint.open_checkpoint(folder)
    dit = next(iter(opened.experts.values()))
    checkpoint._check_audio_encoder(opened.audio_encoder, replace(opened, experts={"model": speaking(dit)}))
    for other in (speaking(dit, layers=25), speaking(dit, width=1024)):
        with pytest.raises(WanFastError, match=r"makes 4 states, 48 wide, the DiT takes (25 of 48|4 of 1024); take the parts"):
            checkpoint._check_audio_encoder(opened.audio_encoder, replace(opened, experts={"model": other}))


def without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("encoder.layers.2.attention.v_proj.bias"), "1 missing: encoder.layers.2.attention.v_proj.bias"),
        (lambda tensors: tensors.update({"adapter.0.weight": tensors["encoder.layer_norm.weight"]}), "1 surplus: adapter.0"),
        (
            lambda tensors: tensors.update({"encoder.layer_norm.bias": tensors["feature_projection.layer_norm.bias"]}),
            r"encoder.layer_norm.bias is \[32\], expected \[48\]",
        ),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_tensors_are_checked(folder, change, says):
    opened = checkpoint.open_checkpoint(folder)
    tensors = dict(opened.audio_encoder.tensors)
    change(tensors)
    with pytest.raises(WanFastError, match=rf"audio encoder .*{says}"):
        check(replace(opened, audio_encoder=replace(opened.audio_encoder, tensors=tensors)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"feat_extract_norm": "group"}, "feat_extract_norm 'group' where the audio encoder has 'layer'"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 3]}, "conv_stride"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm False"),
        ({"model_type": "hubert"}, "model_type 'hubert'"),
        ({"hidden_size": "48"}, "hidden_size '48', not a positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"conv_dim": [16] * 6}, "conv_dim .*, not 7 widths"),
        ({"num_attention_heads": 7}, "hidden_size 48, which is no multiple of its num_attention_heads 7"),
        ({"num_conv_pos_embedding_groups": 5}, "no multiple of its num_conv_pos_embedding_groups 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_are_checked(folder, official, config, says):
    shutil.rmtree(folder / FOLDER)
    write_encoder(folder / FOLDER, official, **config)
    with pytest.raises(
        WanFastError, match=rf"{FOLDER}' is no part of a Wan checkpoint: its config.json has .*{says}.*; download"
    ):
        check(checkpoint.open_checkpoint(folder))


def test_a_folder_without_weights_is_refused(folder):
    (folder / FOLDER / "model.safetensors").unlink()
    with pytest.raises(WanFastError, match=r"nor another file with an audio encoder; download the whole repository"):
        checkpoint.open_checkpoint(folder)


def test_a_folder_without_a_config_is_refused(folder):
    (folder / FOLDER / "config.json").unlink()
    with pytest.raises(WanFastError, match=r"config\.json' does not exist; download the whole repository"):
        checkpoint.open_checkpoint(folder)
