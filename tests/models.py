"""Small random models and checkpoints, and the measure by which outputs are compared."""

import json
import shutil

import torch
from safetensors.torch import save_file

from wan_fast.checkpoint import locate, open_checkpoint, read_tensors
from wan_fast.dit import WanDiT
from wan_fast.manifest import DiTDims, VaeDims
from wan_fast.steps import sigma_grid
from wan_fast.tasks import TASKS, VAES
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
    dims = DiTDims(
        dim=width,
        ffn_dim=320,
        num_heads=width // 128,
        num_layers=layers,
        in_dim=spec.in_dim,
        out_dim=spec.out_dim,
        text_dim=text["token_embedding.weight"].shape[1],
    )
    for seed, expert in enumerate(spec.experts):
        state = {n: t.to(dtype) for n, t in random_dit(dims, seed).state_dict().items()}
        write_dit(folder if expert == "model" else folder / f"{expert}_model", state, dims, shards)
    torch.save(random_vae(spec.vae).state_dict(), folder / spec.vae_spec.file)
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(tiny.tokenizer, folder / "google" / "umt5-xxl")
    return folder


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
