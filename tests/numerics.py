"""The one accuracy rule, for every kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, exact: Tensor, baseline: Tensor, *, factor: float = 2.0) -> None:
    """Assert that a kernel is about as accurate as plain PyTorch in the same dtype.

    error(actual) <= factor * error(baseline) + one ulp of the largest value, where error(x) = max |x - exact|; NaN in
    `actual` where `exact` has none fails, and so does a difference in where infinities are. Integers must be equal, but for
    values in 8 bits that a scale goes with: these are within one step of `baseline`, and few of them, at the edge of two, are
    not equal; what they stand for is compared beside them.

    Args:
        actual: [...] result of the kernel.
        exact: [...] result of the reference on fp64 inputs.
        baseline: [...] result of the reference on the kernel's own inputs, in the dtype of `actual`.
        factor: how much more error than `baseline` is allowed.
    """
    assert actual.shape == baseline.shape == exact.shape, (actual.shape, baseline.shape, exact.shape)
    assert actual.dtype == baseline.dtype, (actual.dtype, baseline.dtype)
    if actual.dtype in (torch.int8, torch.float8_e4m3fn):
        steps = (_steps(actual.cpu()) - _steps(baseline.cpu())).abs()
        assert not steps.numel() or steps.max() <= 1, f"values are up to {steps.max()} steps away"
        assert (steps > 0).sum() <= max(1, 0.01 * steps.numel()), f"{(steps > 0).sum()} of {steps.numel()} values differ"
        return
    if not actual.dtype.is_floating_point:
        wrong = (actual != baseline).sum().item()
        assert wrong == 0, f"{wrong} of {actual.numel()} values differ from the reference"
        return
    actual, baseline = actual.detach().cpu(), baseline.detach().cpu()
    exact = exact.detach().cpu().double()
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite].nan_to_num(), exact[~finite].nan_to_num()), "NaN or infinity differs"
    if not finite.any():
        return
    exact = exact[finite]
    error = (actual.double()[finite] - exact).abs().max().item()
    allowed = factor * (baseline.double()[finite] - exact).abs().max().item()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    # written so that a NaN in error makes the comparison false
    assert error <= allowed + ulp, f"error {error:.3e} > {factor} x {allowed / factor:.3e} + ulp {ulp:.1e}"


def _steps(values: Tensor) -> Tensor:
    """Integers in the order of the values, one apart for neighbours; NaN beyond all."""
    if values.dtype == torch.int8:
        return values.int()
    bits = values.contiguous().view(torch.uint8).int()
    size = bits & 127
    return torch.where(size == 127, 127, torch.where(bits > 127, -size, size))
