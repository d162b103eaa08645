// Launchers behind wan_fast._cuda. Addresses are device addresses; no PyTorch header is needed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

enum class DType { kFloat32, kBFloat16, kFloat16 };

// frames: [F, h, w, 3 patch patch] in [-1, 1], patch 1 or 2.  pixels: [F, patch h, patch w, 3].
cudaError_t frames_to_uint8(const void* frames, DType dtype, uint8_t* pixels, int64_t F, int64_t h, int64_t w, int patch,
                            bool rounding, cudaStream_t stream);

// Attention with 8-bit products on Hopper; the formula is in attention_sm90.cu. Only heads of width K = 128.
enum class ScoreType { kInt8, kFloat8 };  // of q and k; kFloat8 is e4m3

// B batch, L queries, S keys, N heads. The strides are of q and k in elements: batch, token; that of heads is K.
struct AttentionShape {
  int64_t B, L, S, N, K, q_strides[2], k_strides[2];
};

struct AttentionArguments {
  AttentionShape shape;
  ScoreType scores;
  DType out_dtype;
  float skip;             // leave a tile of keys out if all its x are smaller than the largest so far by more; log2 units
  const void* q;          // [B, L, N, K]
  const float* q_scale;   // [B, N, L], 0 or more
  const void* k;          // [B, S, N, K]
  const float* k_scale;   // [B, N, S]
  // e4m3 [B, N, K, S rounded up to 16], the rest zero. Of every 16 tokens, position p holds token
  // 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 [p], as the tensor cores return scores and take probabilities.
  const void* v;
  const float* v_scale;   // [B, N, K]
  const float* v_center;  // [B, N, K], was subtracted from v
  void* out;              // [B, L, N, K]
  float* lse;             // [B, N, L], or null
};

// A tensor of bytes as the copies see it: the fastest dimension first, strides in bytes, that of the first being 1.
struct TensorBoxes {
  uint64_t dims[4], strides[3];
  uint32_t box[4];
};

struct AttentionLaunch {
  unsigned grid[3], threads, shared_bytes;  // all 0 if there is nothing to compute
  TensorBoxes q, k, v;
};

// Pure. Throws std::invalid_argument for shapes that the kernel does not take.
AttentionLaunch attention_sm90_launch(const AttentionShape& shape);

// Throws std::invalid_argument, before it calls CUDA if the arguments are at fault.
cudaError_t attention_sm90(const AttentionArguments& arguments, int device, cudaStream_t stream);

// Why attention_sm90 cannot run on a device, or an empty string.
std::string attention_sm90_unusable(int device);

// Success when the driver can run this build's kernels on the current device.
cudaError_t probe();
