"""What the operators refuse: each says what it was given and what it wants, and changes nothing."""

import pytest
import torch

from wan_fast import kernels

B, L, D, N, K = 2, 6, 96, 4, 24
FP8 = torch.float8_e4m3fn
GRID = (1, 2, 3)


def good(op):
    """Arguments that are taken."""

    def rows(R=1):
        return torch.zeros(B, R, D)

    x, latents = torch.ones(B, L, D), [torch.ones(3, 2, 4, 6) for _ in range(6)]
    convolution = {"x": frames(3, 5, 4, 6), "past": frames(2, 5, 4, 6), "weight": kernel(8, 5, 3, 3), "bias": torch.ones(8)}
    return {
        "adaln_modulate": {"x": x, "shift": rows(), "scale": rows(), "split": 0},
        "gated_residual_adaln": {"x": x, "y": x.clone(), "gate": rows(2), "shift": rows(), "scale": rows(), "split": 3},
        "qk_norm_rope": {
            "x": torch.ones(B, L, 3, D),
            "weight": torch.ones(2, D),
            "table": kernels.rope_table(3, K),
            "grid": GRID,
            "offset": 0,
            "heads": N,
        },
        "gelu_tanh": {"x": x, "bias": torch.ones(D)},
        "guidance_step": {
            **dict(zip(("latents", "sample", "older", "oldest", "conditional", "unconditional"), latents, strict=True)),
            "weights": torch.ones(11),
            "known": torch.ones(3, 1, 4, 6),
            "noise": torch.ones(3, 2, 4, 6),
        },
        "patchify": {"latents": torch.ones(B, 3, 2, 4, 6)},
        "unpatchify": {"tokens": torch.ones(B, 12, 12), "shape": (2, 4, 6)},
        "causal_conv3d": {**convolution, "skip": frames(3, 8, 4, 6)},
        "causal_conv3d_add": {**convolution, "out": frames(3, 8, 4, 6)},
        "rms_norm_silu": {"x": frames(3, 5, 4, 6), "gamma": torch.ones(5)},
        "rms_norm_silu_": {"x": frames(3, 5, 4, 6), "gamma": torch.ones(5)},
        "frames_to_uint8": {"frames": frames(2, 12, 4, 6)},
        "attention_8bit": attend(),
        "keys_center": projected(),
        "qk_norm_rope_quantized": {**projected(), "center": torch.ones(B, N, K), "dtype": torch.int8},
        "quantize_values": {"v": torch.ones(B, L, 3, N, 32)[:, :, 2]},
    }[op]


def projected():
    return {
        "x": torch.ones(B, L, 3, D),
        "weight": torch.ones(2, D),
        "table": kernels.rope_table(3, K),
        "grid": GRID,
        "heads": N,
    }


def by_token(tokens):
    return {"table": kernels.rope_table_of(torch.ones(tokens, 3), K), "grid": None}


def attend(S=5, narrow=True):
    """Queries, keys and values of 2 heads of 64."""
    values = torch.ones(B, 2, 64, 16).to(FP8) if narrow else torch.ones(B, S, 3, 2, 64).bfloat16()[:, :, 2]
    scales = {"v_scale": torch.ones(B, 2, 64), "v_center": torch.ones(B, 2, 64)} if narrow else {}
    return {
        "q": torch.ones(B, L, 2, 64).to(torch.int8),
        "q_scale": torch.ones(B, 2, L),
        "k": torch.ones(B, S, 2, 64).to(torch.int8),
        "k_scale": torch.ones(B, 2, S),
        "v": values,
        **scales,
        "dtype": torch.bfloat16,
    }


def frames(*shape):
    return torch.ones(shape).contiguous(memory_format=torch.channels_last)


def kernel(out, into, KT, K):
    return kernels.conv_weight(torch.ones(out, into, KT, K, K))


def turned(*shape):
    """Not contiguous: its last two dimensions lie the other way round."""
    return torch.ones(*shape[:-2], shape[-1], shape[-2]).mT


BAD = [
    ("adaln_modulate", {"x": torch.ones(L, D)}, r"x \[B, L, D\].*got x \(6, 96\)"),
    ("adaln_modulate", {"shift": torch.ones(B, 3, D)}, r"1 or 2.*shift \(2, 3, 96\)"),
    (
        "adaln_modulate",
        {"shift": torch.ones(B, 2, D)},
        r"as many rows of scale as of shift; got shift \(2, 2, 96\), scale \(2, 1",
    ),
    ("adaln_modulate", {"scale": torch.ones(B, 1, D - 1)}, r"scale \(2, 1, 95\)"),
    ("adaln_modulate", {"scale": torch.ones(B + 1, 1, D)}, r"scale \(3, 1, 96\)"),
    ("adaln_modulate", {"scale": torch.ones(B, 1, D).bfloat16()}, r"scale in float32, got bfloat16"),
    ("adaln_modulate", {"shift": turned(B, 2, D)[:, :1]}, r"rows of shift dense"),
    ("adaln_modulate", {"x": torch.ones(B, L, D).double()}, r"x in float32 or bfloat16 or float16, got float64"),
    ("adaln_modulate", {"x": turned(B, L, D)}, r"x contiguous, got strides \(576, 1, 6\).*call .contiguous\(\)"),
    ("adaln_modulate", {"split": L + 1}, r"split from 0 to 6, the number of tokens; got 7"),
    ("adaln_modulate", {"split": -1}, r"got -1"),
    ("adaln_modulate", {"dtype": torch.int8}, r"result in float32 or bfloat16 or float16, got int8"),
    ("gated_residual_adaln", {"y": torch.ones(B, L - 1, D)}, r"y shaped as x; got x \(2, 6, 96\), y \(2, 5, 96\)"),
    ("gated_residual_adaln", {"y": turned(B, L, D)}, r"y contiguous"),
    ("gated_residual_adaln", {"x": torch.ones(B, L, D, dtype=torch.int32)}, r"x in float32 .*got int32"),
    ("gated_residual_adaln", {"gate": torch.ones(B, 3, D)}, r"gate \[B, 1 or 2, D\]; got x \(2, 6, 96\), gate \(2, 3, 96\)"),
    ("gated_residual_adaln", {"split": 7}, r"got 7"),
    ("gated_residual_adaln", {"dtype": torch.float64}, r"result in .*got float64"),
    ("qk_norm_rope", {"x": torch.ones(B, L, D)}, r"x \[B, L, M, D\]"),
    ("qk_norm_rope", {"x": torch.ones(B, L, 1, D)}, r"P <= M"),
    ("qk_norm_rope", {"x": turned(B, L, 3, D)}, r"x contiguous"),
    ("qk_norm_rope", {"weight": torch.ones(2, D).double()}, r"weight in .*got float64"),
    ("qk_norm_rope", {"heads": 5}, r"heads of an even width, got 5 heads of a width of 96"),
    ("qk_norm_rope", {"heads": 32}, r"even width, got 32"),
    ("qk_norm_rope", {"grid": (1, 2, 2)}, r"tokens within the grid \(1, 2, 2\), got 6 from number 0 on"),
    ("qk_norm_rope", {"offset": 1}, r"from number 1 on"),
    ("qk_norm_rope", {"table": kernels.rope_table(2, K)}, r"a table \[2, 3 or more, 12\]; got table \(2, 2, 12\)"),
    ("qk_norm_rope", {"table": kernels.rope_table(3, K).bfloat16()}, r"table in float32, got bfloat16"),
    ("qk_norm_rope", by_token(L - 1), r"tokens within the table of 5, got 6 from number 0 on"),
    ("qk_norm_rope", {**by_token(L), "offset": 1}, r"within the table of 6, got 6 from number 1 on"),
    ("qk_norm_rope", {**by_token(L), "offset": -1}, r"from number -1 on"),
    ("qk_norm_rope", {**by_token(L), "table": torch.ones(2, L, K)}, r"a table \[2, tokens, 12\]; got table \(2, 6, 24\)"),
    ("gelu_tanh", {"bias": torch.ones(D + 1)}, r"bias \[F\]; got x \(2, 6, 96\), bias \(97,\)"),
    ("gelu_tanh", {"x": turned(B, L, D)}, r"x contiguous"),
    ("gelu_tanh", {"x": torch.ones(B, L, D).long()}, r"got int64"),
    ("guidance_step", {"sample": torch.ones(3, 2, 4, 5)}, r"all others so; got latents \(3, 2, 4, 6\), sample \(3, 2, 4, 5\)"),
    ("guidance_step", {"weights": torch.ones(10)}, r"weights \[11\]; got weights \(10,\)"),
    ("guidance_step", {"noise": torch.ones(3, 1, 4, 6)}, r"all others so; .*noise \(3, 1, 4, 6\)"),
    ("guidance_step", {"noise": torch.ones(3, 2, 4, 6).bfloat16()}, r"noise in float32, got bfloat16"),
    ("guidance_step", {"noise": turned(3, 2, 4, 6)}, r"noise contiguous"),
    ("guidance_step", {"known": torch.ones(3, 3, 4, 6)}, r"known \[C, t <= T, H, W\]"),
    ("guidance_step", {"conditional": torch.ones(3, 2, 4, 6).half()}, r"conditional in float32, got float16"),
    ("guidance_step", {"latents": turned(3, 2, 4, 6)}, r"latents contiguous"),
    ("patchify", {"latents": torch.ones(B, 3, 2, 5, 6)}, r"H and W even; got latents \(2, 3, 2, 5, 6\)"),
    ("patchify", {"latents": turned(B, 3, 2, 4, 6)}, r"latents contiguous"),
    ("patchify", {"dtype": torch.int32}, r"result in .*got int32"),
    ("unpatchify", {"shape": (2, 4, 8)}, r"tokens \[B, 16, 4 C\] for latents of \(2, 4, 8\); got tokens \(2, 12, 12\)"),
    ("unpatchify", {"tokens": torch.ones(B, 12, 13)}, r"got tokens \(2, 12, 13\)"),
    ("unpatchify", {"tokens": turned(B, 12, 12)}, r"tokens contiguous"),
    ("causal_conv3d", {"x": torch.ones(3, 5, 4)}, r"x \[F, Cin, H, W\].*got x \(3, 5, 4\)"),
    ("causal_conv3d", {"weight": kernel(8, 4, 3, 3)}, r"weight \[Cout, Cin, KT, K, K\].*weight \(8, 4, 3, 3, 3\)"),
    ("causal_conv3d", {"bias": torch.ones(7)}, r"bias \(7,\)"),
    ("causal_conv3d", {"weight": torch.ones(8, 5, 2, 3, 3)}, r"kernels of 1 or 3; got weight \(8, 5, 2, 3, 3\)"),
    ("causal_conv3d", {"weight": torch.ones(8, 5, 3, 3, 3)}, r"weight as conv_weight lays it out, got strides"),
    ("causal_conv3d", {"past": frames(1, 5, 4, 6)}, r"past of 2 frames shaped as x's; .*past \(1, 5, 4, 6\)"),
    ("causal_conv3d", {"past": frames(2, 5, 4, 5)}, r"past \(2, 5, 4, 5\)"),
    ("causal_conv3d", {"past": frames(2, 5, 4, 6).half()}, r"past in float32, got float16"),
    ("causal_conv3d", {"x": torch.ones(3, 5, 4, 6)}, r"x \[F, C, H, W\] with the channels innermost"),
    ("causal_conv3d", {"x": frames(3, 5, 4, 6).double()}, r"x in float32 or bfloat16 or float16, got float64"),
    ("causal_conv3d", {"form": kernels.Form(stride=2)}, r"stride 2 for kernels of 1 x 3 x 3 alone.*got stride 2"),
    ("causal_conv3d", {"form": kernels.Form(stride_t=2)}, r"stride_t 2 for 3 x 1 x 1.*stride_t 2, up 1 for 3 x 3 x 3"),
    ("causal_conv3d", {"form": kernels.Form(up=2)}, r"up 2 for one frame; got .*up 2 for 3 x 3 x 3"),
    ("causal_conv3d", {"form": kernels.Form(interleave=1)}, r"a skip that fits .*and none where interleaved"),
    ("causal_conv3d", {"skip": frames(3, 8, 4, 5)}, r"a skip that fits a result \(3, 8, 4, 6\).*skip \(3, 8, 4, 5\)"),
    ("causal_conv3d", {"skip": frames(2, 8, 2, 3)}, r"skip \(2, 8, 2, 3\)"),
    ("causal_conv3d", {"skip": torch.ones(3, 8, 4, 6)}, r"skip \[F, C, H, W\] with the channels innermost"),
    (
        "causal_conv3d",
        {"weight": kernel(8, 5, 3, 1), "past": None, "form": kernels.Form(stride_t=2), "skip": None},
        r"pairs of them behind a history at stride_t 2.*got 3 frames, 8 channels, no history",
    ),
    (
        "causal_conv3d",
        {"weight": kernel(7, 5, 3, 1), "bias": torch.ones(7), "form": kernels.Form(interleave=1), "skip": None},
        r"pairs of channels to interleave; got 3 frames, 7 channels",
    ),
    ("causal_conv3d", {"x": frames(0, 5, 4, 6), "skip": None}, r"frames, pairs of them.*got 0 frames"),
    ("causal_conv3d_add", {"out": frames(3, 8, 4, 5)}, r"out \(3, 8, 4, 6\); got out \(3, 8, 4, 5\)"),
    ("causal_conv3d_add", {"out": torch.ones(3, 8, 4, 6)}, r"out \[F, C, H, W\] with the channels innermost"),
    ("rms_norm_silu", {"gamma": torch.ones(4)}, r"x \[F, C, H, W\] and gamma \[C\]; .*gamma \(4,\)"),
    ("rms_norm_silu", {"x": torch.ones(3, 5, 4, 6)}, r"channels innermost"),
    ("rms_norm_silu_", {"x": frames(3, 5, 4, 6).double()}, r"x in float32 .*got float64"),
    ("attention_8bit", {"q": torch.ones(B, L, 2, 128).to(torch.int8)}, r"q \[B, L, N, K\] and k .*got q \(2, 6, 2, 128\), k"),
    ("attention_8bit", {"k": torch.ones(B, 0, 2, 64).to(torch.int8)}, r"k \[B, S, N, K\].*k \(2, 0, 2, 64\)"),
    ("attention_8bit", {"q": torch.ones(B, L, 2, 64)}, r"q in float8_e4m3fn or int8, got float32"),
    ("attention_8bit", {"k": torch.ones(B, 5, 2, 64).to(FP8)}, r"k in int8, got float8_e4m3fn"),
    ("attention_8bit", {"k": turned(B, 5, 2, 64).to(torch.int8)}, r"k contiguous"),
    (
        "attention_8bit",
        {"q_scale": torch.ones(B, L, 2)},
        r"q_scale \(2, 2, 6\) and k_scale \(2, 2, 5\); got q_scale \(2, 6, 2\)",
    ),
    ("attention_8bit", {"k_scale": torch.ones(B, 2, 5).half()}, r"k_scale in float32, got float16"),
    ("attention_8bit", {"v": torch.ones(B, 2, 64, 5).to(FP8)}, r"v \(2, 2, 64, 16\); got v \(2, 2, 64, 5\)"),
    ("attention_8bit", {"v": torch.ones(B, 2, 64, 16).bfloat16()}, r"v in float8_e4m3fn, got bfloat16"),
    ("attention_8bit", {"v_scale": torch.ones(B, 2, 63)}, r"v_scale and v_center \(2, 2, 64\)"),
    ("attention_8bit", {"v_center": None}, r"v_scale and v_center together"),
    (
        "attention_8bit",
        {"v": attend(narrow=False)["v"].float(), "v_scale": None, "v_center": None},
        r"v in bfloat16 or float16",
    ),
    (
        "attention_8bit",
        {"v": torch.ones(B, 5, 64, 2).bfloat16().mT, "v_scale": None, "v_center": None},
        r"v \[B, S, N, K\] dense along N and K, got strides",
    ),
    ("attention_8bit", {**attend(narrow=False), "v_scale": None, "v_center": None, "interleaved": True}, r"interleaved values"),
    ("attention_8bit", {"skip": 1.0}, r"skip from 0 to below 1, got 1.0"),
    ("attention_8bit", {"dtype": torch.float64}, r"result in .*got float64"),
    ("keys_center", {"weight": torch.ones(1, D)}, r"weight \[2, D\], of queries and keys; got weight \(1, 96\)"),
    ("keys_center", {"x": torch.ones(B, L, 1, D)}, r"P <= M"),
    ("keys_center", {"offset": 1}, r"from number 1 on"),
    ("keys_center", by_token(L - 1), r"tokens within the table of 5"),
    ("qk_norm_rope_quantized", {"center": torch.ones(B, K, N)}, r"center \(2, 4, 24\); got center \(2, 24, 4\)"),
    ("qk_norm_rope_quantized", {"center": torch.ones(B, N, K).half()}, r"center in float32, got float16"),
    ("qk_norm_rope_quantized", {"dtype": torch.bfloat16}, r"result in float8_e4m3fn or int8, got bfloat16"),
    ("qk_norm_rope_quantized", {"x": turned(B, L, 3, D)}, r"x contiguous"),
    ("qk_norm_rope_quantized", by_token(L - 1), r"tokens within the table of 5"),
    (
        "quantize_values",
        {"v": torch.ones(B, 0, N, 32)},
        r"v \[B, S, N, K\] with S of 1 or more and K a power of 2; got v \(2, 0, 4, 32\)",
    ),
    ("quantize_values", {"v": torch.ones(B, L, N, K)}, r"K a power of 2; got v \(2, 6, 4, 24\)"),
    ("quantize_values", {"v": torch.ones(B, L, 32, N).mT}, r"v dense along N and K, got strides"),
    ("quantize_values", {"v": torch.ones(B, L, N, 32).double()}, r"v in float32 .*got float64"),
    ("frames_to_uint8", {"frames": frames(2, 6, 4, 6)}, r"frames \[F, 3 p p, h, w\]; got frames \(2, 6, 4, 6\)"),
]


@pytest.mark.parametrize("op", sorted({op for op, _, _ in BAD}))
def test_what_is_right_is_taken(op):
    getattr(kernels, op)(**good(op))


@pytest.mark.parametrize(("op", "change", "said"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_wrong_is_refused(op, change, said):
    arguments = good(op) | change
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=f"{op} wants .*{said}"):
        getattr(kernels, op)(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value)


@pytest.mark.parametrize("op", ["keys_center", "qk_norm_rope", "qk_norm_rope_quantized"])
def test_a_table_by_token_is_taken(op):
    getattr(kernels, op)(**good(op) | by_token(L + 1) | {"offset": 1})


def test_a_head_width_that_is_not_there_is_refused():
    q = torch.ones(B, L, 2, 96).to(torch.int8)
    with pytest.raises(ValueError, match="attention_8bit wants heads of a width of 64 or 128, got 96; take attention in bf16"):
        kernels.attention_8bit(**attend() | {"q": q, "k": q[:, :5].contiguous()})


def test_values_that_are_not_in_8_bits_are_taken():
    kernels.attention_8bit(**attend(narrow=False))


@pytest.mark.parametrize("op", ["adaln_modulate", "gelu_tanh", "rms_norm_silu"])
def test_tensors_of_two_devices_are_refused(op):
    first, *_, last = (name for name, value in good(op).items() if isinstance(value, torch.Tensor))
    with pytest.raises(ValueError, match=rf"{op} wants all tensors on one device, got {first} on cpu, .*{last} on meta"):
        getattr(kernels, op)(**good(op) | {last: good(op)[last].to("meta")})
