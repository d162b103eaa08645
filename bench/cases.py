"""The registry: every case there is, in the order in which a short visit to a machine is best spent.

Later work adds rows to `operations.py`, `gemm.py`, `attention.py`, `presets.py`, `graphs.py` and `networks.py`; kernels come by
themselves with their REAL_CASES.
"""

from __future__ import annotations

from bench import attention, gemm, graphs, networks, operations, presets
from bench.registry import Case

CASES: tuple[Case, ...] = (
    *operations.KERNEL_CASES,
    *networks.GPU_DIT_CASES,
    *networks.GPU_VAE_CASES,
    *attention.ATTENTION_CASES,
    *attention.STEP_CASES[:1],
    *gemm.GPU_PRECISION_CASES[:1],
    *presets.GPU_FEW_STEPS_CASES,
    *graphs.GPU_GRAPH_CASES,
    *gemm.GEMM_CASES,
    *operations.CONV_CASES,
    *networks.GPU_14B_CASES,
    *gemm.GPU_PRECISION_CASES[1:],
    *attention.STEP_CASES[1:],
    *presets.GPU_PRESET_CASES,
    *networks.GPU_RUN_CASES,
    *networks.GPU_COMPILED_CASES,
    *networks.CPU_CASES,
    *presets.CPU_FEW_STEPS_CASES,
    *presets.CPU_PRESET_CASES,
    *gemm.CPU_PRECISION_CASES,
)
