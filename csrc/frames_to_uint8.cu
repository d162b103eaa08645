// Decoded frames to 8-bit pixels: y = uint8((clamp(x, -1, 1) + 1) / 2 * 255 [+ 0.5]), patches of pixels to interleaved RGB.
//
// F frames, h w positions, each a patch of kPatch x kPatch pixels: colour, column, row, the row fastest. NaN becomes 0.
#include "ops.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <type_traits>

namespace {

constexpr int kThreads = 256;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// The _rn intrinsics are never contracted into a fused multiply-add, which would round once where PyTorch rounds twice.
__device__ uint8_t to_uint8(float x, float bias) {
  x = fminf(fmaxf(x, -1.0f), 1.0f);  // fmaxf(NaN, -1) is -1
  const float y = __fmul_rn(__fmul_rn(__fadd_rn(x, 1.0f), 0.5f), 255.0f);
  return static_cast<uint8_t>(__fadd_rn(y, bias));
}

// Positions of a thread: four pixels of a row, 12 bytes of each row of pixels.
template <int kPatch>
constexpr int kPositionsPerThread = 4 / kPatch;

// One block converts kThreads * kPositionsPerThread positions of one frame. kVector: every address is aligned for wide
// loads and stores, and no thread's positions lie in two rows.
template <typename T, int kPatch, bool kVector>
__global__ void __launch_bounds__(kThreads)
    frames_to_uint8_kernel(const T* __restrict__ frames,  // [F, h, w, kChannels]
                           uint8_t* __restrict__ pixels,  // [F, kPatch h, kPatch w, 3]
                           int64_t positions, int64_t w, unsigned blocks_per_frame, float bias) {
  constexpr int kPositions = kPositionsPerThread<kPatch>, kChannels = 3 * kPatch * kPatch;
  const int64_t f = blockIdx.x / blocks_per_frame;
  const int64_t first = blockIdx.x % blocks_per_frame * (kThreads * kPositions);
  frames += f * positions * kChannels;
  pixels += f * positions * kChannels;
  if constexpr (kVector) {
    const int64_t p = first + threadIdx.x * kPositions;
    if (p >= positions) return;
    alignas(16) T values[kPositions * kChannels];
    using Word = std::conditional_t<sizeof(values) % 16 == 0, uint4, uint2>;
#pragma unroll
    for (int i = 0; i < sizeof(values) / sizeof(Word); ++i)
      reinterpret_cast<Word*>(values)[i] = reinterpret_cast<const Word*>(frames + p * kChannels)[i];
    alignas(4) uint8_t rgb[kPatch][12];
#pragma unroll
    for (int i = 0; i < kPositions * kChannels; ++i) {
      const int c = i % kChannels / (kPatch * kPatch), column = i / kChannels * kPatch + i / kPatch % kPatch;
      rgb[i % kPatch][column * 3 + c] = to_uint8(to_float(values[i]), bias);
    }
    pixels += (p / w * kPatch * w + p % w) * (3 * kPatch);
#pragma unroll
    for (int row = 0; row < kPatch; ++row)
#pragma unroll
      for (int word = 0; word < 3; ++word)
        reinterpret_cast<uint32_t*>(pixels + row * w * (3 * kPatch))[word] = reinterpret_cast<const uint32_t*>(rgb[row])[word];
  } else {
    for (int n = 0; n < kPositions; ++n) {
      const int64_t p = first + n * kThreads + threadIdx.x;
      if (p >= positions) return;
      uint8_t* out = pixels + (p / w * kPatch * w + p % w) * (3 * kPatch);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const int c = i / (kPatch * kPatch), column = i / kPatch % kPatch;
        out[i % kPatch * w * (3 * kPatch) + column * 3 + c] = to_uint8(to_float(frames[p * kChannels + i]), bias);
      }
    }
  }
}

template <typename T, int kPatch>
cudaError_t launch(const void* frames, uint8_t* pixels, int64_t F, int64_t positions, int64_t w, float bias,
                   cudaStream_t stream) {
  constexpr int kPositions = kPositionsPerThread<kPatch>;
  const int64_t blocks_per_frame = (positions + kThreads * kPositions - 1) / (kThreads * kPositions);
  const int64_t blocks = F * blocks_per_frame;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const bool vector = w % kPositions == 0 && reinterpret_cast<uintptr_t>(frames) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(pixels) % alignof(uint32_t) == 0;
  const auto kernel = vector ? frames_to_uint8_kernel<T, kPatch, true> : frames_to_uint8_kernel<T, kPatch, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<const T*>(frames), pixels, positions, w,
                                                                 static_cast<unsigned>(blocks_per_frame), bias);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const void* frames, uint8_t* pixels, int64_t F, int64_t positions, int64_t w, int patch, float bias,
                   cudaStream_t stream) {
  if (patch == 1) return launch<T, 1>(frames, pixels, F, positions, w, bias, stream);
  if (patch == 2) return launch<T, 2>(frames, pixels, F, positions, w, bias, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t frames_to_uint8(const void* frames, DType dtype, uint8_t* pixels, int64_t F, int64_t h, int64_t w, int patch,
                            bool rounding, cudaStream_t stream) {
  const float bias = rounding ? 0.5f : 0.0f;
  switch (dtype) {
    case DType::kFloat32: return launch<float>(frames, pixels, F, h * w, w, patch, bias, stream);
    case DType::kBFloat16: return launch<__nv_bfloat16>(frames, pixels, F, h * w, w, patch, bias, stream);
    case DType::kFloat16: return launch<__half>(frames, pixels, F, h * w, w, patch, bias, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, frames_to_uint8_kernel<float, 1, true>);
  cudaGetLastError();  // a missing kernel image is an answer here: leave no error behind
  return error;
}
