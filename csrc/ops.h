// Launchers behind wan_fast._cuda. Addresses are device addresses; no PyTorch header is needed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

enum class DType { kFloat32, kBFloat16, kFloat16 };

// frames: [3, F, H, W] in [-1, 1]; stride_c and stride_f in elements, rows dense.  pixels: [F, H, W, 3].
cudaError_t frames_to_uint8(const void* frames, DType dtype, uint8_t* pixels, int64_t F, int64_t H, int64_t W,
                            int64_t stride_c, int64_t stride_f, bool rounding, cudaStream_t stream);

// Success when the driver can run this build's kernels on the current device.
cudaError_t probe();
