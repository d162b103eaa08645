"""Fused operators, one per file. `_op.py` says how each is dispatched."""

# With the repository root on sys.path this folder also answers to `import kernels`, which transformers tries in search
# of another package of that name: then it stays empty, as operators must not be registered twice.
if __name__ == "wan_fast.kernels":
    from ._op import KERNELS, backend, why_no_extension
    from .frames_to_uint8 import frames_to_uint8

    __all__ = ["KERNELS", "backend", "frames_to_uint8", "why_no_extension"]
