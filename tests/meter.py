"""Counts the bytes of live tensors while a function runs, whatever the device, meta included."""

import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """`peak`: the most bytes alive at once of tensors made inside the block."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._seen:
                    self._seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key, count):
        self._seen.discard(key)
        self.live -= count


class ShapeOnlyAttention(TorchFunctionMode):
    """Attention that only allocates its output, as fused kernels do: on meta PyTorch would spell out the scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def peak_bytes(function):
    """Peak bytes of tensors alive while `function()` runs."""
    with torch.inference_mode(False), torch.no_grad(), ShapeOnlyAttention(), Meter() as meter:
        function()
    return meter.peak
