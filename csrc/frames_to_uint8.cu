// Decoded frames to 8-bit pixels: y = uint8((clamp(x, -1, 1) + 1) / 2 * 255 [+ 0.5]), planes to interleaved RGB.
//
// F frames, H W height and width in pixels. NaN becomes 0.
#include "ops.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

namespace {

constexpr int kThreads = 256;
constexpr int kPixelsPerThread = 4;  // 3 x 16 bytes of fp32 in, 12 bytes out
constexpr int64_t kPixelsPerBlock = int64_t{kThreads} * kPixelsPerThread;

template <typename T>
struct alignas(kPixelsPerThread * sizeof(T)) Pack {
  T values[kPixelsPerThread];
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// The _rn intrinsics are never contracted into a fused multiply-add, which would round once where PyTorch rounds twice.
__device__ uint8_t to_uint8(float x, float bias) {
  x = fminf(fmaxf(x, -1.0f), 1.0f);  // fmaxf(NaN, -1) is -1
  const float y = __fmul_rn(__fmul_rn(__fadd_rn(x, 1.0f), 0.5f), 255.0f);
  return static_cast<uint8_t>(__fadd_rn(y, bias));
}

// One block converts kPixelsPerBlock pixels of one frame. kVector: every address is aligned for a Pack.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    frames_to_uint8_kernel(const T* __restrict__ frames,   // [3, F, plane]
                           uint8_t* __restrict__ pixels,   // [F, plane, 3]
                           int64_t plane, int64_t stride_c, int64_t stride_f, unsigned blocks_per_frame, float bias) {
  const int64_t f = blockIdx.x / blocks_per_frame;
  const int64_t first = blockIdx.x % blocks_per_frame * kPixelsPerBlock;
  frames += f * stride_f;
  pixels += f * plane * 3;
  if constexpr (kVector) {
    const int64_t p = first + threadIdx.x * kPixelsPerThread;
    if (p >= plane) return;
    alignas(4) uint8_t rgb[kPixelsPerThread * 3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const auto pack = *reinterpret_cast<const Pack<T>*>(frames + c * stride_c + p);
#pragma unroll
      for (int i = 0; i < kPixelsPerThread; ++i) rgb[i * 3 + c] = to_uint8(to_float(pack.values[i]), bias);
    }
    auto* out = reinterpret_cast<uint32_t*>(pixels + p * 3);
#pragma unroll
    for (int word = 0; word < 3; ++word) out[word] = reinterpret_cast<const uint32_t*>(rgb)[word];
  } else {
#pragma unroll
    for (int i = 0; i < kPixelsPerThread; ++i) {
      const int64_t p = first + i * kThreads + threadIdx.x;
      if (p >= plane) return;
#pragma unroll
      for (int c = 0; c < 3; ++c) pixels[p * 3 + c] = to_uint8(to_float(frames[c * stride_c + p]), bias);
    }
  }
}

template <typename T>
cudaError_t launch(const void* frames, uint8_t* pixels, int64_t F, int64_t plane, int64_t stride_c, int64_t stride_f,
                   float bias, cudaStream_t stream) {
  const int64_t blocks_per_frame = (plane + kPixelsPerBlock - 1) / kPixelsPerBlock;
  const int64_t blocks = F * blocks_per_frame;
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const bool vector = plane % kPixelsPerThread == 0 && stride_c % kPixelsPerThread == 0 &&
                      stride_f % kPixelsPerThread == 0 && reinterpret_cast<uintptr_t>(frames) % alignof(Pack<T>) == 0 &&
                      reinterpret_cast<uintptr_t>(pixels) % alignof(uint32_t) == 0;
  const auto kernel = vector ? frames_to_uint8_kernel<T, true> : frames_to_uint8_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<const T*>(frames), pixels, plane, stride_c,
                                                                 stride_f, static_cast<unsigned>(blocks_per_frame), bias);
  return cudaGetLastError();
}

}  // namespace

cudaError_t frames_to_uint8(const void* frames, DType dtype, uint8_t* pixels, int64_t F, int64_t H, int64_t W,
                            int64_t stride_c, int64_t stride_f, bool rounding, cudaStream_t stream) {
  const float bias = rounding ? 0.5f : 0.0f;
  switch (dtype) {
    case DType::kFloat32: return launch<float>(frames, pixels, F, H * W, stride_c, stride_f, bias, stream);
    case DType::kBFloat16: return launch<__nv_bfloat16>(frames, pixels, F, H * W, stride_c, stride_f, bias, stream);
    case DType::kFloat16: return launch<__half>(frames, pixels, F, H * W, stride_c, stride_f, bias, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, frames_to_uint8_kernel<float, true>);
  cudaGetLastError();  // a missing kernel image is an answer here: leave no error behind
  return error;
}
