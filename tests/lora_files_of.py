"""One random LoRA, written in every style that LoRA files come in."""

import json
import re
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from wan_fast.manifest import DiTDims, dit_shapes

SIZES = dict(ffn_dim=20, num_heads=1, in_dim=4, out_dim=3, text_dim=10, freq_dim=6)
SHAPES = dit_shapes(DiTDims(dim=12, num_layers=2, **SIZES))
WITH_IMAGE = dit_shapes(DiTDims(dim=12, num_layers=2, image_dim=8, image_positions=6, **SIZES))
WITH_VACE = dit_shapes(DiTDims(dim=12, num_layers=2, vace_layers=(0, 1), vace_dim=7, **SIZES))
# suffixes of up and down
PAIRS = [
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]
KOHYA, PEFT, DIFFSYNTH = PAIRS[:3]
BLOCKS = ("blocks.", "vace_blocks.")
BIASES = ("attn.q.bias", "k_img.bias", "ffn.0.bias", "after_proj.bias", "head.head.bias")
OUTSIDE_BLOCKS = (
    *("patch_embedding", "text_embedding.2", "time_embedding.0", "time_projection.1", "head.head"),
    *("img_emb.proj.1", "img_emb.proj.3", "vace_patch_embedding"),
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(seed=0, shapes=SHAPES):
    return {name: random(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


@dataclass
class Known:
    """factors: module -> (up, down, alpha); diffs: tensor -> what is added to it."""

    factors: dict
    diffs: dict

    def added_to(self, state, strength=1.0):
        """The weights it makes of these, in fp64."""
        state = {name: weight.double() for name, weight in state.items()}
        for module, (up, down, alpha) in self.factors.items():
            product = torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1))
            name = f"{module}.weight"
            state[name] = state[name] + strength * alpha / len(down) * product.reshape(state[name].shape)
        for name, diff in self.diffs.items():
            state[name] = state[name] + strength * diff.double()
        return state

    def only(self, chosen):
        """Less the modules and tensors that a style has no words for."""
        return Known(
            {module: value for module, value in self.factors.items() if chosen(module)},
            {name: value for name, value in self.diffs.items() if chosen(name)},
        )


def known(seed=100, kinds=("factors", "diffs"), shapes=SHAPES):
    """Linears of the blocks with ranks 3 and 5 and other alphas, layers around the blocks, biases, norms, modulation."""
    factors, diffs = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(shape) > 1 and (name.startswith(BLOCKS) or module in OUTSIDE_BLOCKS):
            rank = 5 if "ffn" in name else 3
            up, down = random(shape[0], rank, seed=seed + i), random(rank, *shape[1:], seed=seed + i + 500)
            if len(shape) > 2:
                up = up.view(shape[0], rank, 1, 1, 1)
            factors[module] = (up, down, 2.0 + i % 3)
        elif leaf == "modulation" or "norm" in name or name.endswith(BIASES):
            diffs[name] = random(*shape, seed=seed + i)
    return Known(factors if "factors" in kinds else {}, diffs if "diffs" in kinds else {})


DIFFUSERS = [
    ("self_attn", "attn1"), ("cross_attn", "attn2"), (r"\.([qkv])$", r".to_\1"), (r"attn(\d)\.o$", r"attn\1.to_out.0"),
    (r"ffn\.0$", "ffn.net.0.proj"), (r"ffn\.2$", "ffn.net.2"), (r"\.norm3$", ".norm2"), (r"^head\.head$", "proj_out"),
    (r"text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1$", "condition_embedder.time_proj"), (r"norm_k_img$", "norm_added_k"), (r"k_img$", "add_k_proj"),
    (r"v_img$", "add_v_proj"), (r"\.before_proj$", ".proj_in"), (r"\.after_proj$", ".proj_out"),
    (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
]  # fmt: skip


def native(module):
    return module


def diffusers(module):
    for pattern, name in DIFFUSERS:
        module = re.sub(pattern, name, module)
    return module


def underscored(module):
    return module.replace(".", "_")


def in_blocks(name):
    return name.startswith((*BLOCKS, "img_emb.")) and "modulation" not in name


# style -> (prefix, spelling of a module, suffixes of factors, has alpha, words for norms and biases, what it has words for)
STYLES = {
    "comfy": ("diffusion_model.", native, PEFT, True, "diff", lambda name: True),
    "lightx2v": ("diffusion_model.", native, KOHYA, False, "diff", lambda name: True),
    "full-comfy": ("model.diffusion_model.", native, KOHYA, True, "diff", lambda name: True),
    "diffsynth": ("", native, DIFFSYNTH, False, None, lambda name: True),
    "old-diffsynth": ("pipe.dit.", native, DIFFSYNTH, False, None, lambda name: True),
    "peft": ("base_model.model.", native, PEFT, False, "lora_B", lambda name: True),
    "diffusers": ("transformer.", diffusers, PEFT, False, "lora_B", lambda name: True),
    "old-diffusers": ("unet.", diffusers, PAIRS[4], True, None, lambda name: True),
    "finetrainers": ("", lambda module: diffusers(module).removesuffix(".0"), DIFFSYNTH, False, None, lambda name: True),
    "kohya": ("lora_unet_", underscored, KOHYA, True, None, in_blocks),
    "kohya-diffusers": ("lora_unet_", lambda module: underscored(diffusers(module)), KOHYA, True, "w_norm", in_blocks),
    "videox-fun": ("lora_unet__", underscored, KOHYA, True, None, in_blocks),
    "lycoris": ("lycoris_", underscored, KOHYA, True, "w_norm", in_blocks),
}


def written(update, style="comfy", pair=None):
    """The keys of a Known in a style, and the part of it that the style can express."""
    prefix, spelling, suffixes, has_alpha, words, chosen = STYLES[style]
    update, state = update.only(chosen), {}
    up_suffix, down_suffix = pair or suffixes
    for module, (up, down, alpha) in update.factors.items():
        path = prefix + spelling(module)
        state[path + up_suffix] = up if has_alpha else up * (alpha / len(down))
        state[path + down_suffix] = down
        if has_alpha:
            state[f"{path}.alpha"] = torch.tensor(alpha)
    said = {}
    for name, diff in update.diffs.items():
        module, _, leaf = name.rpartition(".")
        path = prefix + spelling(module)
        norm = "norm" in module
        key = {
            ("diff", "weight"): f"{path}.diff",
            ("diff", "bias"): f"{path}.diff_b",
            ("diff", "modulation"): f"{path}.diff_m",
            ("lora_B", "bias"): f"{path}.lora_B.bias" if module in update.factors else None,
            ("w_norm", "weight"): f"{path}.w_norm",
            ("w_norm", "bias"): f"{path}.b_norm" if norm else f"{path}.diff_b",
        }.get((str(words), leaf))
        if key:
            state[key], said[name] = diff, diff
    return state, Known(update.factors, said)


def save(path, state, metadata=None):
    """A file of these tensors; metadata become JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path, texts)
    else:
        torch.save(state, path)
    return str(path)
