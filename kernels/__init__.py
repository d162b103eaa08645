"""Fused operators, one per file. `_op.py` says how each is dispatched."""

# With the repository root on sys.path this folder also answers to `import kernels`, which transformers tries in search
# of another package of that name: then it stays empty, as operators must not be registered twice.
if __name__ == "wan_fast.kernels":
    from ._op import KERNELS, backend, only_reference, why_no_extension
    from .adaln import adaln_modulate, adaln_modulate_quantized
    from .attention_8bit import attention_8bit
    from .causal_conv3d import Form, add_skip_, causal_conv3d, causal_conv3d_add, conv_weight, history
    from .frames_to_uint8 import frames_to_uint8
    from .gated_residual import gated_residual_adaln, gated_residual_adaln_quantized
    from .gelu_tanh import gelu_tanh
    from .gelu_tanh_quantized import gelu_tanh_quantized
    from .gemm_8bit import gemm_8bit, gemm_8bit_add, gemm_8bit_gelu
    from .guidance_step import guidance_step
    from .patchify import patchify, unpatchify
    from .qk_norm_rope import qk_norm_rope, rope_table, rope_table_of
    from .qk_norm_rope_quantized import keys_center, qk_norm_rope_quantized
    from .quantize_rows import Quantized, Quantizer, quantize_rows
    from .quantize_values import Values, quantize_values
    from .rms_norm_silu import rms_norm_silu, rms_norm_silu_

    __all__ = [
        "KERNELS",
        "Form",
        "Quantized",
        "Quantizer",
        "Values",
        "adaln_modulate",
        "adaln_modulate_quantized",
        "add_skip_",
        "attention_8bit",
        "backend",
        "causal_conv3d",
        "causal_conv3d_add",
        "conv_weight",
        "frames_to_uint8",
        "gated_residual_adaln",
        "gated_residual_adaln_quantized",
        "gelu_tanh",
        "gelu_tanh_quantized",
        "gemm_8bit",
        "gemm_8bit_add",
        "gemm_8bit_gelu",
        "guidance_step",
        "history",
        "keys_center",
        "only_reference",
        "patchify",
        "qk_norm_rope",
        "qk_norm_rope_quantized",
        "quantize_rows",
        "quantize_values",
        "rms_norm_silu",
        "rms_norm_silu_",
        "rope_table",
        "rope_table_of",
        "unpatchify",
        "why_no_extension",
    ]
