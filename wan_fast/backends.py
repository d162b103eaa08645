"""Which implementation every operation uses on a device, and why: part of the plan. No torch on a CPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from wan_fast import manifest, schemes
from wan_fast.checkpoint import Checkpoint
from wan_fast.config import ATTENTION_8BIT, EngineConfig
from wan_fast.device import Device
from wan_fast.schemes import Form

# of two choices of attention the second
IN_8_BITS = "attention in 8 bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """Which implementation an operation uses on this device, and why."""

    op: str
    backend: str
    why: str


# those of wan_fast.kernels, which only a GPU's plan imports
FUSED = (
    *("adaln_modulate", "causal_conv3d", "causal_conv3d_add", "frames_to_uint8", "gated_residual_adaln", "gelu_tanh"),
    *("guidance_step", "patchify", "qk_norm_rope", "rms_norm_silu", "rms_norm_silu_", "unpatchify"),
)
# those of linears in 8 bits; gemm_8bit_add is for other programs, as it moves as many bytes as gated_residual_adaln after it
FUSED_8BIT = (
    *("adaln_modulate_quantized", "gated_residual_adaln_quantized", "gelu_tanh_quantized", "gemm_8bit", "gemm_8bit_add"),
    *("gemm_8bit_gelu", "quantize_rows"),
)
# those of attention in 8 bits, but for sageattention
OF_ATTENTION = ("attention_8bit", "keys_center", "qk_norm_rope_quantized", "quantize_values")


def settle_forms(
    config: EngineConfig, device: Device, dtype: str, opened: Checkpoint | None
) -> tuple[dict[str, dict[str, Form]], str]:
    """Which linears of each expert compute in 8 bits, and that in words."""
    parts = dict(opened.experts) if opened else dict.fromkeys(config.spec.experts)
    forms, said = {}, {}
    for name, part in parts.items():
        shapes = part.shapes if part else manifest.dit_shapes(manifest.DiTDims.of_task(config.spec))
        forms[name], why = schemes.settle(
            config.precision,
            config.scaling,
            config.keep_blocks,
            device.capability,
            shapes,
            part.stored_8bit if part else {},
            {weight: {kind: info.shape for kind, info in kinds.items()} for weight, kinds in part.scales.items()}
            if part
            else {},
            config.attention in ATTENTION_8BIT,
        )
        how = schemes.described(forms[name], shapes) if forms[name] else dtype
        said[name] = f"{how} ({why})"
    if len({*said.values()}) == 1:
        return forms, next(iter(said.values()))
    return forms, "; ".join(f"{name}: {words}" for name, words in said.items())


def kernel_plan(
    config: EngineConfig, device: Device, dtype: str, head_dim: int, used: Collection[Form], why: str
) -> tuple[KernelChoice, ...]:
    """The backend of every operation; attention first, exact before that in 8 bits. `used`: the forms that linears have in 8
    bits, and `why`."""
    narrow = sorted({form.precision for form in used})
    choices = [_fused(op, config.kernels, device) for op in (*FUSED, *_ops_of(used))]
    # as kernels/gemm_8bit.py chooses
    by_cublas = any(form.precision == "fp8" and form.weight == "row" and form.input != "block" for form in used)
    if by_cublas and dtype == "bf16" and device.capability and device.capability[0] == 10 and config.kernels == "auto":
        said = KernelChoice(
            op="gemm_8bit", backend="cublaslt", why="auto: it sums FP8 in true fp32 here; where scales are per row"
        )
        choices = [said if choice.op == "gemm_8bit" else choice for choice in choices]
    attention = _attention(config, device, dtype, head_dim)
    if len(attention) > 1 and attention[1].backend != "sageattention":
        choices += [_fused(op, config.kernels, device) for op in OF_ATTENTION]
        if attention[1].backend.endswith("cuda") and config.kernels == "auto":
            said = KernelChoice(op="attention_8bit", backend="cuda", why="asked for")
            choices = [said if choice.op == "attention_8bit" else choice for choice in choices]
    return (
        *attention,
        KernelChoice(op="linear", backend=" and ".join([*narrow, f"torch {dtype}"]), why=why),
        *choices,
    )


def _ops_of(used: Collection[Form]) -> list[str]:
    """Those of FUSED_8BIT that linears of such forms need."""
    if not used:
        return []
    ops = ["adaln_modulate_quantized", "gated_residual_adaln_quantized", "gemm_8bit", "quantize_rows"]
    # a scale of the whole row is not known before the row is
    ops += ["gelu_tanh_quantized"] if any(form.input == "row" for form in used) else []
    return ops + (["gemm_8bit_gelu"] if any(form.input != "row" for form in used) else [])


def _attention(config: EngineConfig, device: Device, dtype: str, head_dim: int) -> list[KernelChoice]:
    asked = config.attention
    if device.type == "cpu" and asked in ("auto", "sdpa"):
        return [KernelChoice(op="attention", backend="sdpa", why="PyTorch's own, the one for a CPU")]
    from wan_fast.attention import choose

    # a row for a CPU, if there is one
    capability = device.capability or (0, 0)
    if asked not in ATTENTION_8BIT:
        best = choose(asked, capability, dtype, head_dim)[0]
        return [KernelChoice(op="attention", backend=best.name, why=_best(capability) if asked == "auto" else "asked for")]
    best = choose(asked, capability, dtype, head_dim, config.skip_softmax)[0]
    exact = choose("auto", capability, dtype, head_dim)[0]
    return [
        KernelChoice(op="attention", backend=exact.name, why=f"to text, and where it is kept; {_best(capability)}"),
        KernelChoice(op=IN_8_BITS, backend=best.name, why="asked for"),
    ]


def _best(capability: tuple[int, int]) -> str:
    return f"auto: the best of what is installed for compute capability {capability[0]}.x"


def _fused(op: str, asked: str, device: Device) -> KernelChoice:
    if device.type == "cpu":
        return KernelChoice(op=op, backend="reference", why="the device is a CPU")
    if asked == "reference":
        return KernelChoice(op=op, backend="reference", why="asked for")
    from wan_fast.kernels import KERNELS, backend, why_no_extension

    if not device.here:
        also = "; in CUDA C++ where the extension is built for it" if KERNELS[op].has_cuda else ""
        return KernelChoice(op=op, backend="triton", why=f"auto{also}")
    chosen = backend(device.name, op)
    if not KERNELS[op].has_cuda:
        why = "auto: it exists in Triton alone"
    elif chosen == "cuda":
        why = "auto: the extension is built for this GPU"
    else:
        why = f"auto: {why_no_extension(device.name)}"
    return KernelChoice(op=op, backend=chosen, why=why)
