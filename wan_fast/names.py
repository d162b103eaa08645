"""Tensor names: from those of the Diffusers layout and of GGUF to the native ones, by rules; which model they are of. Standard
library only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# pattern -> replacement, as re.sub takes it; None drops the tensor
Rules = Mapping[str, Any]


ATTENTION_NAMES: Rules = {
    r"attn1\.": "self_attn.",
    r"attn2\.": "cross_attn.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".o.",
}
# of Animate's encoders and its face adapter
_FACE_NAMES: Rules = {
    r"^motion_encoder\.motion_network\.": "motion_encoder.enc.fc.",
    r"^motion_encoder\.motion_synthesis_weight$": "motion_encoder.dec.direction.weight",
    r"^motion_encoder\.conv_in\.weight$": "motion_encoder.enc.net_app.convs.0.0.weight",
    r"^motion_encoder\.conv_in\.act_fn\.bias$": "motion_encoder.enc.net_app.convs.0.1.bias",
    r"^motion_encoder\.conv_out\.": "motion_encoder.enc.net_app.convs.8.",
    **{rf"^motion_encoder\.res_blocks\.{n}\.": f"motion_encoder.enc.net_app.convs.{n + 1}." for n in range(7)},
    r"(convs\.\d\.conv1)\.weight$": r"\1.0.weight",
    r"(convs\.\d\.conv1)\.act_fn\.bias$": r"\1.1.bias",
    r"(convs\.\d\.conv2)\.weight$": r"\1.1.weight",
    r"(convs\.\d\.conv2)\.act_fn\.bias$": r"\1.2.bias",
    r"(convs\.\d)\.conv_skip\.weight$": r"\1.skip.1.weight",
    r"^face_encoder\.(conv1_local|conv2|conv3)\.(?!conv)": r"face_encoder.\1.conv.",
    r"^face_adapter\.(\d+)\.to_([qkv])\.": r"face_adapter.fuser_blocks.\1.linear1_\2.",
    r"^face_adapter\.(\d+)\.to_out\.(?:0\.)?": r"face_adapter.fuser_blocks.\1.linear2.",
    r"^face_adapter\.(\d+)\.norm_([qk])\.": r"face_adapter.fuser_blocks.\1.\2_norm.",
}
# the native layout keeps the kernel of every blur, which is the same in all
_BLURS: Rules = {r"^motion_encoder\..*\.kernel$": None}
DIT_NAMES: Rules = {
    **_FACE_NAMES,
    r"^condition_embedder\.text_embedder\.linear_1\.": "text_embedding.0.",
    r"^condition_embedder\.text_embedder\.linear_2\.": "text_embedding.2.",
    r"^condition_embedder\.time_embedder\.linear_1\.": "time_embedding.0.",
    r"^condition_embedder\.time_embedder\.linear_2\.": "time_embedding.2.",
    r"^condition_embedder\.time_proj\.": "time_projection.1.",
    r"^condition_embedder\.image_embedder\.norm1\.": "img_emb.proj.0.",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.": "img_emb.proj.1.",
    r"^condition_embedder\.image_embedder\.ff\.net\.2\.": "img_emb.proj.3.",
    r"^condition_embedder\.image_embedder\.norm2\.": "img_emb.proj.4.",
    r"^condition_embedder\.image_embedder\.pos_embed$": "img_emb.emb_pos",
    r"^scale_shift_table$": "head.modulation",
    r"^proj_out\.": "head.head.",
    r"\.scale_shift_table$": ".modulation",
    r"^((?:vace_)?blocks\.\d+)\.norm2\.": r"\1.norm3.",
    **ATTENTION_NAMES,
    r"\.add_([kv])_proj\.": r".\1_img.",
    r"\.norm_added_k\.": ".norm_k_img.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
    r"^(vace_blocks\.\d+)\.proj_in\.": r"\1.before_proj.",
    r"^(vace_blocks\.\d+)\.proj_out\.": r"\1.after_proj.",
}
_VAE_NAMES: Rules = {
    r"^quant_conv\.": "conv1.",
    r"^post_quant_conv\.": "conv2.",
    r"\.conv_in\.": ".conv1.",
    r"\.norm_out\.": ".head.0.",
    r"\.conv_out\.": ".head.2.",
    r"\.mid_block\.attentions\.0\.": ".middle.1.",
    r"\.mid_block\.resnets\.(\d)\.": lambda m: f".middle.{2 * int(m[1])}.",
    r"\.conv_shortcut\.": ".shortcut.",
    r"(\d)\.norm1\.": r"\1.residual.0.",
    r"(\d)\.conv1\.": r"\1.residual.2.",
    r"(\d)\.norm2\.": r"\1.residual.3.",
    r"(\d)\.conv2\.": r"\1.residual.6.",
}
VAE21_NAMES: Rules = {
    r"\.down_blocks\.": ".downsamples.",
    r"\.up_blocks\.(\d)\.resnets\.(\d)\.": lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}.",
    r"\.up_blocks\.(\d)\.upsamplers\.0\.": lambda m: f".upsamples.{4 * int(m[1]) + 3}.",
    **_VAE_NAMES,
}
VAE22_NAMES: Rules = {
    r"\.down_blocks\.(\d)\.resnets\.": r".downsamples.\1.downsamples.",
    r"\.down_blocks\.(\d)\.downsampler\.": r".downsamples.\1.downsamples.2.",
    r"\.up_blocks\.(\d)\.resnets\.": r".upsamples.\1.upsamples.",
    r"\.up_blocks\.(\d)\.upsampler\.": r".upsamples.\1.upsamples.3.",
    **_VAE_NAMES,
}
TEXT_NAMES: Rules = {
    r"^encoder\.embed_tokens\.weight$": None,  # the same tensor as `shared`
    r"^shared\.": "token_embedding.",
    r"^encoder\.final_layer_norm\.": "norm.",
    r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.": r"blocks.\1.norm1.",
    r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.": r"blocks.\1.pos_embedding.embedding.",
    r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.": r"blocks.\1.attn.",
    r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.": r"blocks.\1.norm2.",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.": r"blocks.\1.ffn.gate.0.",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.": r"blocks.\1.ffn.fc1.",
    r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.": r"blocks.\1.ffn.fc2.",
}
# of a vision transformer in transformers, and of CLIP's file beside the native checkpoints
CLIP_NAMES: Rules = {
    r"^vision_model\.": "",
    r"^embeddings\.class_embedding$": "visual.cls_embedding",
    r"^embeddings\.position_embedding\.weight$": "visual.pos_embedding",
    r"^embeddings\.patch_embedding\.": "visual.patch_embedding.",
    r"^embeddings\.position_ids$": None,
    r"^pre_layrnorm\.": "visual.pre_norm.",
    r"^encoder\.layers\.(\d+)\.": r"visual.transformer.\1.",
    r"\.self_attn\.([qkv])_proj\.": r".attn.\1.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
    r"\.layer_norm([12])\.": r".norm\1.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    # the text tower, and what follows the layer whose tokens are taken
    r"^(?:textual\.|log_scale$|logit_scale$|text_model\.|visual_projection\.|text_projection\.)": None,
    r"^(?:post_layernorm\.|visual\.post_norm\.|visual\.head$)": None,
}
# of wav2vec2 in transformers; the names are those of version 5
AUDIO_NAMES: Rules = {
    r"^wav2vec2\.": "",
    r"\.pos_conv_embed\.conv\.weight_g$": ".pos_conv_embed.conv.parametrizations.weight.original0",
    r"\.pos_conv_embed\.conv\.weight_v$": ".pos_conv_embed.conv.parametrizations.weight.original1",
    # of recognising text, and of training
    r"^(?:lm_head\.|masked_spec_embed$)": None,
}
GGUF_TEXT_NAMES: Rules = {
    r"^token_embd\.": "token_embedding.",
    r"^enc\.output_norm\.": "norm.",
    r"^enc\.blk\.(\d+)\.": r"blocks.\1.",
    r"\.attn_([qkvo])\.": r".attn.\1.",
    r"\.attn_rel_b\.": ".pos_embedding.embedding.",
    r"\.attn_norm\.": ".norm1.",
    r"\.ffn_norm\.": ".norm2.",
    r"\.ffn_gate\.": ".ffn.gate.0.",
    r"\.ffn_up\.": ".ffn.fc1.",
    r"\.ffn_down\.": ".ffn.fc2.",
}


# what a tensor that only such a model has begins with, by its native name
_SIGNS = {
    "DiT": "blocks.0.self_attn.q.",
    "VAE": "decoder.middle.0.residual.0.gamma",
    "text encoder": "blocks.0.attn.q.",
    "image encoder": "visual.transformer.0.norm1.",
    "audio encoder": "feature_extractor.conv_layers.0.conv.",
}
_LORA = re.compile(r"[._](?:lora_(?:A|B|up|down)\b|lora\.(?:up|down)\.|(?:hada|lokr)_w)|\.diff(?:_[bm])?$")


def model_of(stored: Collection[str]) -> str | None:
    """Which model tensors of these names, less their prefix, are: "DiT", "VAE", "text encoder", "image encoder",
    "audio encoder", "LoRA" or "UniAnimate file"."""
    if any(_LORA.search(name) for name in stored):
        return "UniAnimate file" if any("dwpose_embedding." in name for name in stored) else "LoRA"
    rules = rules_for(stored)
    native = [native_name(name, rules) or "" for name in stored]
    return next((what for what, sign in _SIGNS.items() if any(name.startswith(sign) for name in native)), None)


def rules_for(stored: Collection[str]) -> Rules:
    """The rules by which the tensors of a model are renamed, told from their names."""
    if any(".attn1." in name for name in stored):
        return DIT_NAMES
    if any(name.startswith("encoder.block.") for name in stored):
        return TEXT_NAMES
    # before CLIP's, with which it has names in common
    if any(name.removeprefix("wav2vec2.").startswith("feature_extractor.conv_layers.") for name in stored):
        return AUDIO_NAMES
    if any(name.startswith(("visual.", "vision_model.", "encoder.layers.")) for name in stored):
        return CLIP_NAMES
    if any(".mid_block.resnets." in name for name in stored):
        # 2.2 nests its layers by level on the way down too
        nested = any(re.match(r"encoder\.down_blocks\.\d\.resnets\.", name) for name in stored)
        return VAE22_NAMES if nested else VAE21_NAMES
    if any(name.startswith("motion_encoder.enc.") for name in stored):
        return _BLURS
    return GGUF_TEXT_NAMES if any(name.startswith("enc.blk.") for name in stored) else {}


def native_name(stored: str, names: Rules) -> str | None:
    """Rename a tensor by the rules that match, in order; None where it repeats another tensor."""
    for pattern, replacement in names.items():
        if replacement is None:
            if re.search(pattern, stored):
                return None
        else:
            stored = re.sub(pattern, replacement, stored)
    return stored
