// Launchers behind wan_fast._cuda. Addresses are device addresses; no PyTorch header is needed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

enum class DType { kFloat32, kBFloat16, kFloat16 };

// frames: [F, h, w, 3 patch patch] in [-1, 1], patch 1 or 2.  pixels: [F, patch h, patch w, 3].
cudaError_t frames_to_uint8(const void* frames, DType dtype, uint8_t* pixels, int64_t F, int64_t h, int64_t w, int patch,
                            bool rounding, cudaStream_t stream);

// Success when the driver can run this build's kernels on the current device.
cudaError_t probe();
