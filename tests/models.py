"""Small random models and checkpoints, and the measure by which outputs are compared."""

import json
import shutil
from dataclasses import replace
from math import prod

import torch
from safetensors.torch import save_file

from wan_fast.checkpoint import locate, open_checkpoint, read_tensors
from wan_fast.dit import WanDiT
from wan_fast.manifest import ClipDims, DiTDims, VaeDims, clip_shapes
from wan_fast.manifest.animate import FaceDims
from wan_fast.manifest.pose import PoseDims
from wan_fast.manifest.speech import SpeechDims
from wan_fast.steps import sigma_grid
from wan_fast.tasks import TASKS, VACE_DIM, VAES
from wan_fast.vae import WanVAE


def relative_error(actual, expected):
    """|actual - expected| / |expected| in fp64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random_dit(dims, seed=0):
    """Seeded weights of ordinary size; gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    model = WanDiT(dims).requires_grad_(False).eval()
    for name, parameter in model.state_dict().items():
        scale = 0.1 if parameter.ndim == 1 else (parameter.shape[0] / parameter.numel()) ** 0.5
        if name.startswith("motion_encoder.") and parameter.ndim > 1:  # scaled as they are used
            scale = 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return model


def random_vae(version, *, encoder_dim=8, decoder_dim=8, seed=0):
    """Seeded weights; gains around 1."""
    torch.manual_seed(seed)
    dims = VaeDims(version=version, encoder_dim=encoder_dim, decoder_dim=decoder_dim, channels=VAES[version].channels)
    return WanVAE(dims).requires_grad_(False).eval()


def write_native(folder, task, *, shards=1, dtype=torch.float32, layers=2, width=256):
    """A small native checkpoint of a task's kind, with tiny's text encoder and tokenizer. Returns the folder."""
    spec = TASKS[task]
    tiny = open_checkpoint(locate("tiny", spec))
    text = dict(read_tensors(tiny.text_encoder))
    dims = small_dims(task, layers=layers, width=width, text_dim=text["token_embedding.weight"].shape[1])
    for seed, expert in enumerate(spec.experts):
        state = {n: t.to(dtype) for n, t in random_dit(dims, seed).state_dict().items()}
        write_dit(folder if expert == "model" else folder / f"{expert}_model", state, dims, shards)
    torch.save(random_vae(spec.vae).state_dict(), folder / spec.vae_spec.file)
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if spec.image_tokens:
        torch.save(random_clip(), folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    if spec.kind == "speech":
        write_audio_encoder(folder / "wav2vec2-large-xlsr-53-english")
    shutil.copytree(tiny.tokenizer, folder / "google" / "umt5-xxl")
    return folder


def small_dims(task, *, layers=2, width=256, text_dim=64):
    """A narrow model of a task's kind."""
    spec, speech = TASKS[task], SpeechDims(layers=tuple(range(0, layers, 2)), audio_layers=4, audio_dim=32)
    return DiTDims(
        dim=width,
        ffn_dim=320,
        num_heads=width // 128,
        num_layers=layers,
        in_dim=spec.in_dim,
        out_dim=spec.out_dim,
        text_dim=text_dim,
        image_dim=CLIP.dim if spec.image_tokens else 0,
        image_positions=spec.image_tokens if spec.kind == "first_last" else 0,
        vace_layers=tuple(range(0, layers, 2)) if spec.vace_layers else (),
        vace_dim=VACE_DIM if spec.vace_layers else 0,
        speech=speech if spec.extension == "speech" else None,
        face=FaceDims(**FACE, layers=tuple(range(0, layers, 5))) if spec.extension == "face" else None,
    )


# of faces of 16 x 16
FACE = dict(channels=(4, 6, 8), motion_dim=12, directions=5, width=16, heads=2)


def write_audio_encoder(folder, seed=0):
    """A small wav2vec2 of the released form, as transformers writes it."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "conv_dim": [16] * 7}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    form = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **positions, **form)).save_pretrained(folder)


def write_poses(file, width=128, seed=2):
    """A small UniAnimate file: encoders of poses, whose tokens are of the size of a clip's, and a LoRA. Returns the file."""
    generator, name = torch.Generator().manual_seed(seed), "blocks.0.ffn.0.lora"
    sizes = {**PoseDims(width=4).shapes(width), f"{name}_A.weight": (2, width), f"{name}_B.weight": (320, 2)}
    state = {}
    for name, size in sizes.items():
        scale = 0.2 if name.startswith("blocks") else 1.5 * (size[0] / prod(size)) ** 0.5
        state[name] = scale * torch.randn(size, generator=generator)
    save_file(state, file)
    return file


# two of its layers run; as many tokens as the released one has
CLIP = ClipDims(dim=160, ffn_dim=320, num_heads=2, num_layers=2, patch=14, size=224)


def random_clip(seed=0):
    """A small CLIP as its native file has it: a layer more than runs, and the text tower's tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = clip_shapes(replace(CLIP, num_layers=CLIP.num_layers + 1))
    shapes |= {"visual.cls_embedding": (1, 1, CLIP.dim), "visual.pos_embedding": (1, CLIP.tokens, CLIP.dim)}
    state = {}
    for name, shape in {**shapes, "visual.post_norm.weight": (CLIP.dim,), "textual.norm.weight": (8,), "log_scale": ()}.items():
        scale = 0.1 if len(shape) < 2 else (shape[0] / prod(shape)) ** 0.5
        state[name] = torch.randn(shape, generator=generator) * scale + ("norm" in name and name.endswith("weight"))
    return state


def write_dit(folder, state, dims, shards=1):
    """config.json and the weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "WanModel",
        "dim": dims.dim,
        "num_heads": dims.num_heads,
        "num_layers": dims.num_layers,
        "text_len": 512,
        "eps": 1e-6,
        **({"vace_layers": list(dims.vace_layers), "vace_in_dim": dims.vace_dim} if dims.vace_layers else {}),
        **({"audio_inject_layers": list(dims.speech.layers)} if dims.speech else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        save_file({n: t for n, t in state.items() if place[n] == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def official_grid(steps, shift, solver="unipc"):
    """diffusers' UniPC on the official sigma grid."""
    from diffusers import UniPCMultistepScheduler

    sigmas = sigma_grid(solver, steps, shift)

    class Official(UniPCMultistepScheduler):
        def set_timesteps(self, num_inference_steps, device=None, **_):
            super().set_timesteps(num_inference_steps, device=device)
            self.sigmas = torch.tensor(sigmas)
            self.timesteps = torch.tensor([int(s * 1000) for s in sigmas[:-1]])

    return Official(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
