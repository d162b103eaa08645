"""Models as files of their own, in the names and formats they are published in, beside a checkpoint's folder or without."""

import json
import re
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import write_native
from PIL import Image
from safetensors.torch import load_file, save_file

from wan_fast import single_files
from wan_fast.checkpoint import locate, open_checkpoint, open_part, read_tensors, read_tokenizer
from wan_fast.cli import main
from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.embeddings import Embeddings
from wan_fast.encoders import Tokenizer
from wan_fast.engine import Engine
from wan_fast.names import VAE21_NAMES, model_of, native_name
from wan_fast.setup import set_up
from wan_fast.tasks import TASKS

TINY = locate("tiny", TASKS["ti2v-5B"])
MANIFESTS = Path(__file__).with_name("manifests")
DIT, T5, VAE = "diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
PROMPT = "A red ball bounces, slowly - 一个红球 🙂"
needs_sentencepiece = pytest.mark.skipif(find_spec("sentencepiece") is None, reason="needs sentencepiece")


def config(task, checkpoint=None, **options):
    checkpoint = None if checkpoint is None else str(checkpoint)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return EngineConfig(task=task, checkpoint=checkpoint, device="cpu", no_cache=True, **options)


def clip_of(config, **options):
    """Frames and latents of a small clip."""
    request = Request(prompt=PROMPT, size=(32, 32), num_frames=5, num_steps=2, seed=1, **options)
    video = Engine(config).generate(request)
    return video.frames, video.latents


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the hub is looked up")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


# --- files as they are published ----------------------------------------------------------------------------------------


def varint(number):
    more, low = number >> 7, number & 127
    return bytes([low | 128]) + varint(more) if more else bytes([low])


def message(*fields):
    """A protobuf message of (field number, bytes, whole number or float)."""
    content = b""
    for number, value in fields:
        if isinstance(value, bytes):
            content += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            content += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            content += varint(number << 3) + varint(value)
    return content


def sentencepiece_model(end="</s>"):
    """tiny's tokenizer.json as a SentencePiece model: sentencepiece_model.proto of google/sentencepiece."""
    vocab = json.loads((TINY / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    kinds = {"<unk>": 2, **dict.fromkeys(("<pad>", "</s>", "<s>"), 3)}  # unknown, control
    pieces = []
    for piece, score in vocab:
        kind = kinds.get(piece, 6 if re.fullmatch("<0x..>", piece) else 1)  # byte, normal
        pieces.append((1, message((1, piece.encode()), (2, float(score)), (3, kind))))
    # unigram, with bytes for what is not in the vocabulary, and the piece that ends a text
    trainer = message((3, 1), (4, len(vocab)), (35, 1), (47, end.encode()))
    return message(*pieces, (2, trainer), (3, message((1, b"identity"))))


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """tiny's text encoder as ComfyUI has it: transformers' names, and the tokenizer's bytes as a tensor."""
    file = tmp_path_factory.mktemp("umt5") / "umt5_xxl.safetensors"
    state = load_file(TINY / "text_encoder" / "model.safetensors")
    spiece = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file({**state, "spiece_model": spiece}, file)
    return file


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("t2v"), "t2v-1.3B")


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("a14b"), "t2v-A14B")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("i2v"), "i2v-14B")


@pytest.fixture(scope="module")
def published(t2v, umt5, tmp_path_factory):
    """The parts of `t2v` as single files: a prefix on the DiT, the VAE's native names in safetensors."""
    folder = tmp_path_factory.mktemp("published")
    dit, vae = folder / "wan2.1_t2v.safetensors", folder / "wan_2.1_vae.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(t2v / DIT).items()}, dit)
    save_file({name: tensor.contiguous() for name, tensor in torch.load(t2v / VAE).items()}, vae)
    return {"dit": dit, "vae": vae, "text_encoder": umt5}


@pytest.fixture(scope="module")
def from_folder(t2v):
    return clip_of(config("t2v-1.3B", t2v))


def in_clip_names(state):
    """A native image tower in transformers' names, with what its file has besides."""
    rules = {
        r"^visual\.cls_embedding$": "embeddings.class_embedding",
        r"^visual\.pos_embedding$": "embeddings.position_embedding.weight",
        r"^visual\.patch_embedding\.": "embeddings.patch_embedding.",
        r"^visual\.pre_norm\.": "pre_layrnorm.",
        r"^visual\.post_norm\.": "post_layernorm.",
        r"^visual\.transformer\.(\d+)\.": r"encoder.layers.\1.",
        r"\.attn\.proj\.": ".self_attn.out_proj.",
        r"\.norm([12])\.": r".layer_norm\1.",
        r"\.mlp\.0\.": ".mlp.fc1.",
        r"\.mlp\.2\.": ".mlp.fc2.",
    }
    renamed = {"visual_projection.weight": torch.zeros(4, 4)}
    for name, tensor in state.items():
        if name.startswith("visual."):
            for pattern, replacement in rules.items():
                name = re.sub(pattern, replacement, name)
            if ".attn.to_qkv." in name:
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed["vision_model." + name.replace(".attn.to_qkv.", f".self_attn.{letter}_proj.")] = piece.clone()
            else:
                renamed[f"vision_model.{name}"] = tensor.squeeze().clone() if "_embedding" in name else tensor
    renamed["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    return renamed


# --- without a folder ---------------------------------------------------------------------------------------------------


@needs_sentencepiece
def test_files_alone_give_the_same_video(published, from_folder):
    assert_same(clip_of(config("t2v-1.3B", **published)), from_folder)


def test_official_files_bring_their_tokenizer_from_beside_them(t2v):
    files = {"dit": t2v / DIT, "vae": t2v / VAE, "text_encoder": t2v / T5}
    opened = set_up(config("t2v-1.3B", **files)).checkpoint
    assert opened.tokenizer == t2v / "google" / "umt5-xxl" and opened.path == t2v / DIT


def test_diffusers_folders_and_names(tmp_path):
    """Of tiny: folders of their own, and a VAE whose names alone tell what it is."""
    vae = shutil.copy(TINY / "vae" / DIT, tmp_path / "vae.safetensors")
    files = {"dit": TINY / "transformer", "vae": vae, "text_encoder": TINY / "text_encoder"}
    assert_same(clip_of(config("ti2v-5B", **files)), clip_of(config("ti2v-5B", "tiny")))
    opened = set_up(config("ti2v-5B", **files)).checkpoint
    assert opened.tokenizer == TINY / "tokenizer" and opened.defaults == {}


def test_a_vae_in_diffusers_names(t2v, tmp_path):
    native = torch.load(t2v / VAE)
    names = {
        name: native_name(name, VAE21_NAMES) for name in json.loads((MANIFESTS / "diffusers" / "vae-2.1.json").read_text())
    }
    save_file({name: native[to].contiguous() for name, to in names.items()}, tmp_path / "vae.safetensors")
    part = set_up(config("t2v-1.3B", t2v, vae=tmp_path / "vae.safetensors")).checkpoint.vae
    assert all(torch.equal(tensor, native.pop(name)) for name, tensor in read_tensors(part)) and not native


@needs_sentencepiece
def test_two_experts_are_two_files(a14b, umt5, tmp_path):
    for name in ("high", "low"):
        shutil.copy(a14b / f"{name}_noise_model" / DIT, tmp_path / f"{name}.safetensors")
    experts = f"low={tmp_path}/low.safetensors, high={tmp_path}/high.safetensors"
    files = config("t2v-A14B", dit=experts, vae=a14b / VAE, text_encoder=umt5)
    expected = clip_of(config("t2v-A14B", a14b))
    assert_same(clip_of(files), expected)
    swapped = f"high={tmp_path}/low.safetensors,low={tmp_path}/high.safetensors"
    assert not torch.equal(clip_of(config("t2v-A14B", dit=swapped, vae=a14b / VAE, text_encoder=umt5))[1], expected[1])


@needs_sentencepiece
def test_an_image_encoder_in_transformers_names(i2v, umt5, tmp_path):
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "picture.png")
    clip = tmp_path / "clip_vision_h.safetensors"
    save_file(in_clip_names(torch.load(i2v / CLIP)), clip)
    files = {"dit": i2v / DIT, "vae": i2v / VAE, "text_encoder": umt5}
    picture = str(tmp_path / "picture.png")
    expected = clip_of(config("i2v-14B", i2v), image=picture)
    assert_same(clip_of(config("i2v-14B", **files, image_encoder=clip), image=picture), expected)
    with pytest.raises(AssertionError, match="the hub is looked up"):
        set_up(config("i2v-14B", **files))


def test_what_is_not_given_comes_from_the_hub(published, monkeypatch):
    """What is given is looked at before anything is downloaded."""
    asked = []
    monkeypatch.setattr(single_files, "locate", lambda name, spec, download: asked.append((name, download)))
    assert set_up(config("t2v-1.3B", dit=published["dit"])).checkpoint is None
    assert asked == [(None, False)]
    with pytest.raises(
        WanFastError, match=r"task ti2v-5B does not fit the checkpoint .*t2v\.safetensors.*, which fits t2v-1\.3B"
    ):
        set_up(config("ti2v-5B", dit=published["dit"]))
    with pytest.raises(WanFastError, match=r"task ti2v-5B needs the Wan 2\.2 VAE"):
        set_up(config("ti2v-5B", vae=published["vae"]))


def test_an_engine_downloads_the_rest(t2v, published, from_folder, monkeypatch):
    def download(name, spec, download=True):
        return t2v if download or name == str(t2v) else None

    monkeypatch.setattr(single_files, "locate", download)
    assert_same(clip_of(config("t2v-1.3B", dit=published["dit"])), from_folder)


# --- beside a folder ----------------------------------------------------------------------------------------------------

PARTS = {"dit": (DIT, "config.json"), "vae": (VAE,), "text_encoder": (T5,), "image_encoder": (CLIP,)}


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "missing"])
@pytest.mark.parametrize("part", PARTS)
def test_a_file_takes_the_place_of_the_folders(i2v, tmp_path, part, there):
    folder, file = tmp_path / "folder", tmp_path / f"given{Path(PARTS[part][0]).suffix}"
    shutil.copytree(i2v, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    shutil.move(folder / PARTS[part][0], file)
    if there:  # what would be refused, were it read
        (folder / PARTS[part][0]).write_bytes(b"nothing")
    else:
        (folder / PARTS[part][-1]).unlink(missing_ok=True)
    opened = set_up(config("i2v-14B", folder, **{part: file})).checkpoint
    expected = set_up(config("i2v-14B", i2v)).checkpoint
    assert opened.tokenizer == folder / "google" / "umt5-xxl" and opened.path == (file if part == "dit" else folder)
    name = {"dit": "experts"}.get(part, part)
    found, own = (getattr(each, name) for each in (opened, expected))
    found, own = (found["model"], own["model"]) if part == "dit" else (found, own)
    assert {info.file for info in found.tensors.values()} == {file}
    theirs = dict(read_tensors(own))
    assert all(torch.equal(tensor, theirs.pop(name)) for name, tensor in read_tensors(found)) and not theirs


def test_one_expert_of_two(a14b):
    low = a14b / "low_noise_model" / DIT
    opened = set_up(config("t2v-A14B", a14b, dit=f"high={low}")).checkpoint
    files = {name: {info.file for info in part.tensors.values()} for name, part in opened.experts.items()}
    assert list(files) == ["high_noise", "low_noise"] and files == {name: {low} for name in files}
    assert opened.path == a14b


def test_a_folder_of_one_expert_lends_none_to_a_pair(t2v):
    with pytest.raises(WanFastError, match="has no low_noise DiT; give --dit high=FILE,low=FILE"):
        set_up(config("t2v-A14B", t2v, dit=f"high={t2v / DIT}"))


def test_a_vae_by_any_name_in_a_folder(t2v, published, tmp_path):
    shutil.copytree(t2v, tmp_path / "folder", ignore=shutil.ignore_patterns(VAE))
    vae = Path(shutil.copy(published["vae"], tmp_path / "folder"))
    assert set_up(config("t2v-1.3B", tmp_path / "folder")).checkpoint.vae.path == vae


def test_a_config_belongs_to_the_file_that_layouts_have_beside_it(t2v, tmp_path):
    assert open_part(t2v / DIT, "DiT").config["num_layers"] == 2
    shutil.copy(t2v / "config.json", tmp_path)
    assert open_part(Path(shutil.copy(t2v / DIT, tmp_path / "another.safetensors")), "DiT").config == {}


def test_sampling_settings_go_with_the_dit(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    assert set_up(config("ti2v-5B", folder, vae=folder / "vae")).checkpoint.defaults["size"] == (128, 128)
    opened = set_up(config("ti2v-5B", folder, dit=TINY / "transformer")).checkpoint
    assert opened.defaults == {} and opened.note == "" and opened.path == TINY / "transformer"


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(t2v, a14b, published, tmp_path_factory):
    """Files by what stands for them in the table."""
    folder = tmp_path_factory.mktemp("wrong")
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, folder / "lora.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    save_file({}, folder / "empty.safetensors")
    shutil.copy(published["dit"], folder / "wan-00001-of-00002.safetensors")
    (folder / "cut.safetensors").write_bytes(published["dit"].read_bytes()[:-9])
    (folder / "weights.ckpt").touch()
    (folder / "nothing").mkdir()
    save_file(
        {name: t for name, t in load_file(t2v / DIT).items() if "1.ffn.0.weight" not in name}, folder / "fewer.safetensors"
    )
    return {"wrong": folder, "t2v": t2v, "a14b": a14b, **published}


REFUSED = {
    "missing file": ("t2v-1.3B", {"vae": "{wrong}/no.safetensors"}, "--vae '*/no.safetensors' does not exist; check the path"),
    "no weights": ("t2v-1.3B", {"dit": "{wrong}/weights.ckpt"}, "must end in .safetensors .pth .gguf"),
    "empty": ("t2v-1.3B", {"dit": " "}, "--dit '' is empty"),
    "one file for two experts": (
        "t2v-A14B",
        {"dit": "{dit}"},
        "t2v-A14B has two experts, got --dit '*'; give --dit high=FILE,",
    ),
    "two files for one expert": (
        "t2v-1.3B",
        {"dit": "high={dit},low={dit}"},
        "has one expert, got --dit 'high=*; give --dit FILE",
    ),
    "an expert twice": ("t2v-A14B", {"dit": "high={dit},high={dit}"}, "gives an expert twice"),
    "an expert without a file": ("t2v-A14B", {"dit": "high={dit},low="}, "--dit '' is empty"),
    "image encoder for nothing": ("t2v-1.3B", {"image_encoder": "{vae}"}, "t2v-1.3B takes no --image_encoder"),
    "VAE as DiT": ("t2v-1.3B", {"dit": "{vae}"}, "--dit '*' looks like a VAE; give it as --vae"),
    "LoRA as DiT": ("t2v-1.3B", {"dit": "{wrong}/lora.safetensors"}, "--dit '*' looks like a LoRA; give it as --lora"),
    "text encoder as VAE": (
        "t2v-1.3B",
        {"vae": "{text_encoder}"},
        "--vae '*' looks like a text encoder; give it as --text_encoder",
    ),
    "DiT as text encoder": ("t2v-1.3B", {"text_encoder": "{dit}"}, "--text_encoder '*' looks like a DiT; give it as --dit"),
    "DiT as image encoder": ("i2v-14B", {"image_encoder": "{dit}"}, "--image_encoder '*' looks like a DiT"),
    "another model": ("t2v-1.3B", {"dit": "{wrong}/other.safetensors"}, "no model that this version knows: *double_blocks.0"),
    "no tensors": (
        "t2v-1.3B",
        {"dit": "{wrong}/empty.safetensors"},
        "holds no model that this version knows: it has no tensors",
    ),
    "empty folder": ("t2v-1.3B", {"dit": "{wrong}/nothing"}, "nor another file with a DiT"),
    "a shard": ("t2v-1.3B", {"dit": "{wrong}/wan-00001-of-00002.safetensors"}, "is one of several shards; give the folder"),
    "truncated": ("t2v-1.3B", {"dit": "{wrong}/cut.safetensors"}, "is truncated"),
    "lost tensor": (
        "t2v-1.3B",
        {"dit": "{wrong}/fewer.safetensors", "checkpoint": "{t2v}"},
        "1 missing: blocks.1.ffn.0.weight",
    ),
    "DiT of another task": (
        "ti2v-5B",
        {"dit": "{dit}", "checkpoint": "tiny"},
        "does not fit the checkpoint '*wan2.1_t2v.saf*--dit",
    ),
    "VAE of another model": ("ti2v-5B", {"vae": "{vae}", "checkpoint": "tiny"}, "needs the Wan 2.2 VAE, '*' is a 2.1 one"),
    "folder without the rest": (
        "t2v-1.3B",
        {"dit": "{dit}", "checkpoint": "{wrong}/nothing"},
        "'*nothing' holds no Wan checkpoint",
    ),
    "a file as folder": ("t2v-1.3B", {"checkpoint": "{dit}"}, "is a file, not a folder; give a file as --dit, --vae"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, wrong):
    task, options, says = REFUSED[case]
    with pytest.raises(WanFastError, match=re.escape(says).replace(r"\*", ".*")):
        set_up(config(task, **{name: value.format(**wrong) for name, value in options.items()}))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_what_a_folder_lacks_may_be_given(t2v, tmp_path, part):
    shutil.copytree(t2v, tmp_path / "folder")
    (tmp_path / "folder" / PARTS[part][0]).unlink()
    with pytest.raises(WanFastError, match=rf"has no {PARTS[part][0]}; download the whole repository, or give --{part} FILE"):
        set_up(config("t2v-1.3B", tmp_path / "folder"))


def test_gguf_without_a_tokenizer(t2v, published, tmp_path):
    gguf = pytest.importorskip("gguf")
    names = {"token_embedding.": "token_embd.", "blocks.": "enc.blk.", "pos_embedding.embedding.": "attn_rel_b."}
    names |= {"norm1.": "attn_norm.", "norm2.": "ffn_norm.", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v"}
    names |= {"attn.o": "attn_o", "ffn.gate.0.": "ffn_gate.", "ffn.fc1.": "ffn_up.", "ffn.fc2.": "ffn_down."}
    writer = gguf.GGUFWriter(tmp_path / "umt5.gguf", "t5encoder")
    for name, tensor in torch.load(t2v / T5).items():
        for native, other in names.items():
            name = name.replace(native, other)
        name = {"norm.weight": "enc.output_norm.weight"}.get(name, name)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = {**published, "text_encoder": tmp_path / "umt5.gguf"}
    says = r"umt5\.gguf' comes without a tokenizer; give --ckpt_dir a folder with google/umt5-xxl/tokenizer\.json, or take"
    with pytest.raises(WanFastError, match=says):
        set_up(config("t2v-1.3B", **files))
    # a folder with a tokenizer and nothing else
    shutil.copytree(t2v / "google", tmp_path / "folder" / "google")
    opened = set_up(config("t2v-1.3B", tmp_path / "folder", **files)).checkpoint
    assert opened.text_encoder.dialect == "gguf" and opened.tokenizer == tmp_path / "folder" / "google" / "umt5-xxl"


@pytest.mark.parametrize("name", sorted(str(file.relative_to(MANIFESTS)) for file in MANIFESTS.rglob("*.json")))
def test_released_models_are_told_from_their_names(name):
    stored = json.loads((MANIFESTS / name).read_text())
    kind = {"vae": "VAE", "umt5": "text encoder", "clip": "image encoder"}.get(Path(name).stem.split("-")[0], "DiT")
    assert model_of(stored) == kind


# --- formats ------------------------------------------------------------------------------------------------------------


def test_half_precision_is_widened_where_fp32_is_needed(t2v, tmp_path):
    state = {name: tensor.half() for name, tensor in load_file(t2v / DIT).items()}
    save_file(state, tmp_path / "fp16.safetensors")
    model = Engine(config("t2v-1.3B", t2v, dit=tmp_path / "fp16.safetensors", dtype="bf16")).models["model"]
    loaded = dict(model.named_parameters())
    for name in ("head.modulation", "blocks.1.modulation", "blocks.0.norm3.weight", "blocks.0.norm3.bias"):
        assert torch.equal(loaded[name], state[name].float()), name
    assert loaded["blocks.0.ffn.0.weight"].dtype == torch.bfloat16


def test_scaled_fp8(t2v, tmp_path, capsys):
    state, exact = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in load_file(t2v / DIT).items():
        if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            state[name] = (tensor / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
            exact[name] = state[name].float() * scale
        else:
            state[name] = tensor.half() if "modulation" in name else tensor
            exact[name] = state[name].float()
    save_file(state, tmp_path / "fp8_scaled.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    options = {"task": "t2v-1.3B", "checkpoint": t2v, "dit": tmp_path / "fp8_scaled.safetensors"}
    words = f"plan --task t2v-1.3B --ckpt_dir {t2v} --dit {options['dit']} --device cpu --prompt x".split()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"DiT         {options['dit']} (f16+f32+f8_e4m3)" in out and f"VAE         {t2v / VAE} (f32)" in out
    assert "linears     fp32 (auto: the checkpoint's FP8 e4m3 is converted as it is loaded" in out
    assert_same(clip_of(config(**options)), clip_of(config(**{**options, "dit": tmp_path / "exact.safetensors"})))
    # nothing of it is the folder's
    assert "exact" in str(set_up(config(**{**options, "dit": tmp_path / "exact.safetensors"})).checkpoint.path)


def test_loras_come_and_go(t2v, published, tmp_path):
    up, down = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((256, 4), (4, 256)))
    lora = {
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": up,
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": down,
    }
    save_file(lora, tmp_path / "lora.safetensors")
    engine = Engine(config("t2v-1.3B", t2v, dit=published["dit"]))
    before = {name: tensor.clone() for name, tensor in engine.models["model"].named_parameters()}
    engine.set_loras([str(tmp_path / "lora.safetensors")])
    after = dict(engine.models["model"].named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["blocks.0.self_attn.qkv.weight"]
    engine.set_loras([])
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.models["model"].named_parameters())


# --- the tokenizer in a file --------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "a",
    PROMPT,
    "  two   spaces, &amp; an entity ",
    "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止",
    "naïve Ünïcödé — “quotes” ... 1/2 €5",
    "日本語 한국어 العربية",
    "\N{ROCKET}\N{FAMILY}",
    "ball " * 30,
]


@needs_sentencepiece
@pytest.mark.parametrize("limit", [512, 20, 1])
def test_both_tokenizers_give_the_same_ids(umt5, limit):
    ours, official = Tokenizer(umt5, limit), Tokenizer(TINY / "tokenizer", limit)
    for text in TEXTS:
        ids = ours(text).tolist()
        assert ids == official(text).tolist(), text
        assert ids[-1] == 1 and len(ids) <= limit
    assert max(len(ours(text)) for text in TEXTS) == min(limit, 76)


@needs_sentencepiece
def test_tokenizers_that_are_none(umt5, tmp_path):
    for content, says in ((b"\xff" * 40, "cannot be read"), (sentencepiece_model("<s>"), "end with token 2, not 1")):
        save_file({"spiece_model": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, tmp_path / "x.safetensors")
        with pytest.raises(WanFastError, match=says):
            Tokenizer(tmp_path / "x.safetensors")
    save_file({"spiece_model": torch.zeros(9)}, tmp_path / "x.safetensors")
    with pytest.raises(WanFastError, match=r"is F32 \[9\], not bytes"):
        Tokenizer(tmp_path / "x.safetensors")


def test_the_package_that_is_missing(published, monkeypatch):
    monkeypatch.setattr("wan_fast.checkpoint.find_spec", lambda name: None)
    with pytest.raises(WanFastError, match=r"needs the package sentencepiece.*pip install 'wan-fast\[sentencepiece\]'"):
        set_up(config("t2v-1.3B", **published))


def test_which_tokenizer_is_taken(t2v, published, tmp_path):
    assert set_up(config("t2v-1.3B", t2v, **published)).checkpoint.tokenizer == t2v / "google" / "umt5-xxl"
    # a folder that has the encoder's file by any name, and no tokenizer
    shutil.copytree(t2v, tmp_path / "folder", ignore=shutil.ignore_patterns("google", T5))
    file = Path(shutil.copy(published["text_encoder"], tmp_path / "folder"))
    opened = set_up(config("t2v-1.3B", tmp_path / "folder")).checkpoint
    assert opened.tokenizer == file and read_tokenizer(file) == sentencepiece_model()
    assert open_checkpoint(tmp_path / "folder").tokenizer == file


def test_embeddings_tell_tokenizers_apart(t2v, umt5, tmp_path):
    text = set_up(config("t2v-1.3B", t2v)).checkpoint.text_encoder
    copy, other = Path(shutil.copy(umt5, tmp_path / "copy.safetensors")), tmp_path / "other.safetensors"
    save_file({**load_file(umt5), "spiece_model": torch.zeros(9, dtype=torch.uint8)}, other)
    kept = Embeddings(text, umt5, "fp32", folder=tmp_path / "kept")
    kept.put(PROMPT, torch.ones(3, 64))
    has = {file: Embeddings(text, file, "fp32", folder=kept.folder).has(PROMPT) for file in (copy, other, TINY / "tokenizer")}
    assert list(has.values()) == [True, False, False]


# --- the command line ---------------------------------------------------------------------------------------------------


@needs_sentencepiece
def test_run(published, from_folder, tmp_path, capsys):
    flags = [word for name, file in published.items() for word in (f"--{name}", str(file))]
    words = ["run", "--task", "t2v-1.3B", "--device", "cpu", "--no-cache", "--prompt", PROMPT, *flags, "--quiet"]
    small = ["--size", "32*32", "--frame_num", "5", "--sample_steps", "2", "--base_seed", "1"]
    latents, video = tmp_path / "latents.safetensors", tmp_path / "video.mp4"
    assert main([*words, *small, "--save-latents", str(latents), "--save_file", str(video)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint  " not in out and f"DiT         {published['dit']} (f32)\n" in out
    assert f"text        {published['text_encoder']} (bf16)\ntokenizer   {published['text_encoder']}\n" in out
    assert torch.equal(load_file(latents)["latents"], from_folder[1]) and video.stat().st_size > 0


def test_plan_before_the_download(published, monkeypatch, capsys):
    monkeypatch.setattr(single_files, "locate", lambda *arguments, **options: None)
    words = ["plan", "--task", "t2v-1.3B", "--on", "h200", "--prompt", "x", "--vae", str(published["vae"])]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"checkpoint  {TASKS['t2v-1.3B'].hub_id}, to be downloaded" in out and f"VAE         {published['vae']}\n" in out


def test_a_missing_file_is_said_in_a_line(capsys):
    assert main(["run", "--task", "t2v-1.3B", "--prompt", "x", "--vae", "no.safetensors"]) == 2
    assert capsys.readouterr().err == "wan-fast: error: --vae 'no.safetensors' does not exist; check the path\n"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("dit", ["kind: DiT", "fits: t2v-1.3B t2v-14B t2i-14B t2v-A14B"]),
        ("vae", ["kind: VAE", "version 2.1", "missing: none"]),
        ("text_encoder", ["kind: text encoder", "tokenizer: {file}", "surplus: none"]),
    ],
)
def test_inspect(published, part, says, capsys):
    assert main(["inspect", str(published[part])]) == 0
    out = capsys.readouterr().out
    assert all(words.format(file=published[part]) in out for words in says), out


def test_inspect_refuses(wrong, capsys):
    assert main(["inspect", str(wrong["wrong"] / "lora.safetensors")]) == 2
    assert "looks like a LoRA; give it as --lora" in capsys.readouterr().err
