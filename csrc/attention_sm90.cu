// Attention with 8-bit products on Hopper: out = softmax(q k^T / sqrt(K)) v, no mask, head width K = 128.
//
// Source: SageAttention2 (arXiv 2411.10958) for the formula, FlashAttention-3 (arXiv 2407.08608) for the schedule.
//
//   x[m, n] = (sum_k q8 k8) q_scale[m] k_scale[n] log2(e) / sqrt(K)           int8: exact sums; e4m3: the tensor cores' fp32
//   p[m, n] = exp2(x - max_n x + log2(448))                                   so that e4m3(p) uses the whole range
//   out     = (sum_n e4m3(p) v8) / (sum_n p) v_scale + v_center               lse = ln sum_n exp(score)
//
// A block has 128 queries of one head: a warpgroup that copies, and two that compute 64 rows each and take turns on the
// tensor cores. Tiles of 128 keys, the last (perhaps partial) one first, so that only the first pass masks. The products
// with v of every tile start at zero and are added in fp32: the tensor cores of Hopper keep about 14 bits of an e4m3 sum.
#include "ops.h"
#include "sm90.cuh"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace {

constexpr int kHeadWidth = 128, kQueries = 128, kKeys = 128, kStages = 4;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr uint32_t kTileBytes = 128 * 128;

struct Parameters {
  sm90::TensorMap q, k, v;
  const float* q_scale;   // [B, N, L]
  const float* k_scale;   // [B, N, S]
  const float* v_scale;   // [B, N, K]
  const float* v_center;  // [B, N, K]
  void* out;              // [B, L, N, K]
  float* lse;             // [B, N, L] or null
  DType out_dtype;
  int L, S, N;
  float skip;
};

// Tiles are rows of 128 bytes, swizzled by 128 bytes, which repeats every 1024.
struct alignas(1024) Shared {
  uint8_t q[kTileBytes];           // queries x K
  uint8_t k[kStages][kTileBytes];  // keys x K
  uint8_t v[kStages][kTileBytes];  // K x keys
  // of key 8 j + 2 t + e at 16 (j / 2) + 4 t + 2 (j % 2) + e: the four of a thread and two j side by side
  float scale[kStages][kKeys];   // k_scale
  float offset[kStages][kKeys];  // -kMagic k_scale
  uint64_t q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};
constexpr int kSharedBytes = sizeof(Shared) + alignof(Shared);  // dynamic shared memory may start anywhere

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kConsumerWarps = 8, kConsumerRows = 64;
// 128 * 24 + 256 * 240 = 384 * 168: what the block was launched with, all there is to share out
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLog2MaxE4M3 = 8.807354922057604f;  // log2(448); a larger offset would saturate

// As int32 the bits of 12582912.0f = 1.5 2^23. |sum| <= 128^3 = 2^21, so that the bits of kMagicBits + sum, read as a float,
// are those of kMagic + sum, exactly: no conversion of integers.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// Named barriers; 0 is the whole block.
enum : int { kTurn = 1, kVote = 3 };  // and one more each for the second consumer

// Barriers by address.
struct Barriers {
  uint32_t q_full, k_full, k_empty, v_full, v_empty;

  __device__ explicit Barriers(const Shared& shared)
      : q_full(sm90::shared_address(&shared.q_full)),
        k_full(sm90::shared_address(shared.k_full)),
        k_empty(sm90::shared_address(shared.k_empty)),
        v_full(sm90::shared_address(shared.v_full)),
        v_empty(sm90::shared_address(shared.v_empty)) {}
};

// Where the ring of stages is.
struct Ring {
  uint32_t stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ uint32_t barrier(uint32_t first) const { return first + stage * sizeof(uint64_t); }
};

// --- the producer: of its warps, one copies q and k, one v and one the scales

__device__ void copy_queries_and_keys(const Parameters& p, const Shared& shared, const Barriers& barriers, int tiles) {
  const uint32_t k_tiles = sm90::shared_address(shared.k);
  sm90::barrier_arrive_expect(barriers.q_full, kTileBytes);
  sm90::load_box(sm90::shared_address(shared.q), p.q, barriers.q_full, 0, blockIdx.y, blockIdx.x * kQueries, blockIdx.z);
  Ring k;
#pragma unroll 1
  for (int tile = tiles - 1; tile >= 0; --tile, k.advance()) {
    const uint32_t full = k.barrier(barriers.k_full);
    sm90::barrier_wait(k.barrier(barriers.k_empty), k.parity ^ 1);
    sm90::barrier_arrive_expect(full, kTileBytes);
    sm90::load_box(k_tiles + k.stage * kTileBytes, p.k, full, 0, blockIdx.y, tile * kKeys, blockIdx.z);
  }
}

__device__ void copy_values(const Parameters& p, const Shared& shared, const Barriers& barriers, int tiles) {
  const uint32_t v_tiles = sm90::shared_address(shared.v);
  Ring v;
#pragma unroll 1
  for (int tile = tiles - 1; tile >= 0; --tile, v.advance()) {
    const uint32_t full = v.barrier(barriers.v_full);
    sm90::barrier_wait(v.barrier(barriers.v_empty), v.parity ^ 1);
    sm90::barrier_arrive_expect(full, kTileBytes);
    sm90::load_box(v_tiles + v.stage * kTileBytes, p.v, full, tile * kKeys, 0, blockIdx.y, blockIdx.z);
  }
}

// A whole warp, four keys a lane: rows of k_scale are not aligned to the 16 bytes that a bulk copy needs.
template <bool kInt8>
__device__ void copy_scales(const Parameters& p, Shared& shared, const Barriers& barriers, int tiles) {
  const int lane = threadIdx.x % 32, first = lane / 4 * 16 + lane % 4 * 2;
  const float* const k_scale = p.k_scale + (static_cast<int64_t>(blockIdx.z) * p.N + blockIdx.y) * p.S;
  Ring k;
#pragma unroll 1
  for (int tile = tiles - 1; tile >= 0; --tile, k.advance()) {
    sm90::barrier_wait(k.barrier(barriers.k_empty), k.parity ^ 1);
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = tile * kKeys + first + i / 2 * 8 + i % 2;
      scale[i] = key < p.S ? k_scale[key] : 0.0f;
      // infinity becomes NaN, lest a score of -infinity hide it
      scale[i] += scale[i] - scale[i];
      // two bits fewer make kMagic k_scale exact: then (kMagic + sum) k_scale - kMagic k_scale is rounded once
      if (kInt8) scale[i] = __int_as_float(__float_as_int(scale[i]) & ~3);
    }
    reinterpret_cast<float4*>(shared.scale[k.stage])[lane] = make_float4(scale[0], scale[1], scale[2], scale[3]);
    if (kInt8)
      reinterpret_cast<float4*>(shared.offset[k.stage])[lane] =
          make_float4(-kMagic * scale[0], -kMagic * scale[1], -kMagic * scale[2], -kMagic * scale[3]);
    sm90::sync_warp();
    if (lane == 0) sm90::barrier_arrive(k.barrier(barriers.k_full));
  }
}

// --- the consumers

// Of a tile of rows of 128 bytes: swizzled by 128 bytes (1 in the top bits), eight rows every 1024 bytes. A step along a row
// is added to the address: the swizzle is a function of the address bits.
__device__ uint64_t matrix_descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

template <bool kInt8>
using Score = std::conditional_t<kInt8, int, float>;

template <bool kInt8>
__device__ void start_scores(Score<kInt8> (&scores)[64], uint32_t q, uint32_t k) {
  if constexpr (kInt8) {
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = kMagicBits;
  }
  sm90::pin(scores);
  sm90::products_fence();
#pragma unroll
  for (int step = 0; step < kHeadWidth; step += 32) {
    if constexpr (kInt8) sm90::multiply_int8(scores, matrix_descriptor(q + step), matrix_descriptor(k + step));
    else sm90::multiply_e4m3(scores, matrix_descriptor(q + step), matrix_descriptor(k + step), step > 0);
  }
  sm90::products_commit();
}

__device__ void start_products(float (&products)[64], uint32_t (&probabilities)[16], uint32_t v) {
  sm90::pin(probabilities);
  sm90::pin(products);
  sm90::products_fence();
#pragma unroll
  for (int step = 0; step < kKeys; step += 32)
    sm90::multiply_e4m3(products, probabilities + step / 8, matrix_descriptor(v + step), step > 0);
}

__device__ void store_pair(void* out, int64_t index, float x, float y, DType dtype) {
  if (dtype == DType::kFloat32) *reinterpret_cast<float2*>(static_cast<float*>(out) + index) = make_float2(x, y);
  else
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + index) =
        dtype == DType::kBFloat16 ? sm90::pack_bfloat16(x, y) : sm90::pack_float16(x, y);
}

// A thread has two rows, r = 0 and 1, of its warpgroup's 64: row() + 8 r, and columns 8 j + 2 t + e in register 4 j + 2 r + e.
template <bool kInt8, bool kSkip>
struct Consumer {
  const Parameters& p;
  const Shared& shared;
  const Barriers barriers;
  const int group;  // 0 or 1

  float total[64];
  float maximum[2];  // of x / row_scale
  float sum[2];
  float row_scale[2];
  // exp2(old maximum - new maximum) of the newest tile of scores, and of the tile whose products come next
  float newest_correction[2], correction[2];

  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int row() const {
    return blockIdx.x * kQueries + group * kConsumerRows + threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4;
  }
  __device__ int64_t head() const { return static_cast<int64_t>(blockIdx.z) * p.N + blockIdx.y; }

  __device__ void release(uint32_t barrier) const {
    sm90::sync_warp();
    if (lane() == 0) sm90::barrier_arrive(barrier);
  }

  // Scores to probabilities in place, e4m3's largest number for the largest. False if the tile is to be left out.
  template <bool kFirst>
  __device__ bool softmax(Score<kInt8> (&scores)[64], float (&x)[64], const Ring& k) {
    const int t = lane() % 4;
    const float4* scales = reinterpret_cast<const float4*>(shared.scale[k.stage]);
    const float4* offsets = reinterpret_cast<const float4*>(shared.offset[k.stage]);
    // keys of the first tile that do not exist
    const int keys = (p.S - 1) % kKeys + 1;
    const float infinity = std::numeric_limits<float>::infinity();
    float largest[2] = {-infinity, -infinity};
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      const float4 scale4 = scales[pair * 4 + t];
      const float scale[4] = {scale4.x, scale4.y, scale4.z, scale4.w};
      float offset[4] = {};
      if constexpr (kInt8) {
        const float4 offset4 = offsets[pair * 4 + t];
        offset[0] = offset4.x, offset[1] = offset4.y, offset[2] = offset4.z, offset[3] = offset4.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int index = pair * 8 + i, r = i / 2 % 2, column = i / 4 * 2 + i % 2;
        if constexpr (kInt8) x[index] = fmaf(__int_as_float(scores[index]), scale[column], offset[column]);
        else x[index] = scores[index] * scale[column];
        if (kFirst && pair * 16 + i / 4 * 8 + t * 2 + i % 2 >= keys) x[index] = -infinity;
        largest[r] = sm90::max_nan(largest[r], x[index]);
      }
    }
    release(k.barrier(barriers.k_empty));

    bool small = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = sm90::max_nan(largest[r], sm90::shuffle_xor(largest[r], 1));
      largest[r] = sm90::max_nan(largest[r], sm90::shuffle_xor(largest[r], 2));
      if (kSkip && !kFirst) small = small && (row() + 8 * r >= p.L || (largest[r] - maximum[r]) * row_scale[r] < p.skip);
    }
    if (kSkip && !kFirst && sm90::named_all(kVote + group, kWarpgroup, small)) return false;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!kFirst) {
        const float previous = maximum[r];
        largest[r] = sm90::max_nan(previous, largest[r]);
        newest_correction[r] = sm90::exp2_fast((previous - largest[r]) * row_scale[r]);
        sum[r] *= newest_correction[r];
      }
      maximum[r] = largest[r];
      const float base = kLog2MaxE4M3 - maximum[r] * row_scale[r];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int index = i / 2 * 4 + r * 2 + i % 2;
        x[index] = sm90::exp2_fast(fmaf(x[index], row_scale[r], base));
        sum[r] += x[index];
      }
    }
    return true;
  }

  __device__ void pack(uint32_t (&probabilities)[16], const float (&x)[64]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int at = i / 2 * 8 + i % 2 * 2;
      probabilities[i] = sm90::pack_e4m3(x[at], x[at + 1], x[at + 4], x[at + 5]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) correction[r] = newest_correction[r];
  }

  __device__ void add(float (&products)[64]) {
    sm90::pin(products);
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = fmaf(total[i], correction[i / 2 % 2], products[i]);
  }

  __device__ void store() {
    const int t = lane() % 4;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += sm90::shuffle_xor(sum[r], 1);
      sum[r] += sm90::shuffle_xor(sum[r], 2);
      inverse[r] = 1.0f / sum[r];
      if (p.lse != nullptr && t == 0 && row() + 8 * r < p.L)
        p.lse[head() * p.L + row() + 8 * r] = (maximum[r] * row_scale[r] + log2f(sum[r]) - kLog2MaxE4M3) * kLn2;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = j * 8 + t * 2;
      const float2 scale = *reinterpret_cast<const float2*>(p.v_scale + head() * kHeadWidth + column);
      const float2 center = *reinterpret_cast<const float2*>(p.v_center + head() * kHeadWidth + column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row() + 8 * r >= p.L) continue;
        const int64_t token = static_cast<int64_t>(blockIdx.z) * p.L + row() + 8 * r;
        store_pair(p.out, (token * p.N + blockIdx.y) * kHeadWidth + column,
                   fmaf(total[j * 4 + r * 2] * inverse[r], scale.x, center.x),
                   fmaf(total[j * 4 + r * 2 + 1] * inverse[r], scale.y, center.y), p.out_dtype);
      }
    }
  }

  __device__ void attend(int tiles) {
    const uint32_t q = sm90::shared_address(shared.q) + group * (kTileBytes / 2);
    const uint32_t k_tiles = sm90::shared_address(shared.k), v_tiles = sm90::shared_address(shared.v);
#pragma unroll
    for (int i = 0; i < 64; ++i) total[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = row() + 8 * r < p.L ? p.q_scale[head() * p.L + row() + 8 * r] : 0.0f;
      row_scale[r] = scale * (kLog2E * 0.08838834764831845f);  // 1 / sqrt(128)
      // the scores of such a row are 0 all the same, but those of masked keys stay -infinity
      if (row_scale[r] == 0.0f) row_scale[r] = std::numeric_limits<float>::min();
      sum[r] = 0.0f;
      newest_correction[r] = 1.0f;
    }

    Score<kInt8> scores[64];
    float x[64], products[64];
    uint32_t probabilities[16];
    Ring k, v;
    sm90::barrier_wait(barriers.q_full, 0);
    sm90::barrier_wait(k.barrier(barriers.k_full), k.parity);
    start_scores<kInt8>(scores, q, k_tiles);
    sm90::products_wait<0>();
    sm90::pin(scores);
    softmax<true>(scores, x, k);
    k.advance();
    pack(probabilities, x);

    // the first turn is the first consumer's
    if (group == 1 && tiles > 1) sm90::named_arrive(kTurn, 2 * kWarpgroup);
    bool kept = true;  // whether the tile before has products
    for (int tile = 1; tile < tiles; ++tile) {
      sm90::barrier_wait(k.barrier(barriers.k_full), k.parity);
      sm90::named_sync(kTurn + group, 2 * kWarpgroup);
      start_scores<kInt8>(scores, q, k_tiles + k.stage * kTileBytes);
      sm90::barrier_wait(v.barrier(barriers.v_full), v.parity);
      if (!kSkip || kept) start_products(products, probabilities, v_tiles + v.stage * kTileBytes);
      sm90::products_commit();
      // the last turn is the second consumer's
      if (group == 0 || tile < tiles - 1) sm90::named_arrive(kTurn + (group ^ 1), 2 * kWarpgroup);
      sm90::products_wait<1>();
      sm90::pin(scores);
      // runs while the tensor cores compute the products and what the other consumer has started
      const bool keep = softmax<false>(scores, x, k);
      k.advance();
      sm90::products_wait<0>();
      release(v.barrier(barriers.v_empty));
      v.advance();
      if (!kSkip || kept) add(products);
      if (!kSkip || keep) pack(probabilities, x);
      kept = keep;
    }

    sm90::barrier_wait(v.barrier(barriers.v_full), v.parity);
    if (!kSkip || kept) {
      start_products(products, probabilities, v_tiles + v.stage * kTileBytes);
      sm90::products_commit();
      sm90::products_wait<0>();
      add(products);
    }
    store();
  }
};
#endif

template <bool kInt8, bool kSkip>
__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint8_t* const bytes = sm90::dynamic_shared();
  Shared& shared = *reinterpret_cast<Shared*>(bytes + (-sm90::shared_address(bytes) & (alignof(Shared) - 1)));
  const Barriers barriers(shared);
  const int tiles = (p.S - 1) / kKeys + 1;
  if (threadIdx.x == 0) {
    sm90::prefetch_tensor_map(p.q);
    sm90::prefetch_tensor_map(p.k);
    sm90::prefetch_tensor_map(p.v);
    sm90::barrier_init(barriers.q_full, 1);
    for (uint32_t i = 0; i < kStages * sizeof(uint64_t); i += sizeof(uint64_t)) {
      sm90::barrier_init(barriers.k_full + i, 2);  // the tile and its scales
      sm90::barrier_init(barriers.v_full + i, 1);
      sm90::barrier_init(barriers.k_empty + i, kConsumerWarps);
      sm90::barrier_init(barriers.v_empty + i, kConsumerWarps);
    }
    sm90::barrier_init_fence();
  }
  sm90::sync_block();
  const int warpgroup = sm90::uniform(threadIdx.x / kWarpgroup);
  if (warpgroup == 0) {
    sm90::shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) copy_queries_and_keys(p, shared, barriers, tiles);
    else if (threadIdx.x == 32) copy_values(p, shared, barriers, tiles);
    else if (threadIdx.x / 32 == 2) copy_scales<kInt8>(p, shared, barriers, tiles);
  } else {
    sm90::grow_registers<kConsumerRegisters>();
    Consumer<kInt8, kSkip>{p, shared, barriers, warpgroup - 1}.attend(tiles);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // built for another architecture than 90a: an error, and not a result that was never written
#endif
}

// --- host

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("attention_sm90: " + message);
}

void require_size(const char* name, int64_t size, int64_t smallest, int64_t largest) {
  require(size >= smallest && size <= largest, std::string(name) + " is " + std::to_string(size) + "; allowed: " +
                                                   std::to_string(smallest) + " to " + std::to_string(largest));
}

// Of elements of one byte. Of a dimension of size 1 any stride will do.
void require_stride(const char* name, int64_t size, int64_t stride) {
  require(size == 1 || (stride > 0 && stride % 16 == 0 && stride < int64_t{1} << 40),
          std::string(name) + " is " + std::to_string(stride) + "; allowed: positive multiples of 16 below 2^40");
}

void require_address(const char* name, const void* address, int alignment) {
  require(address != nullptr, std::string(name) + " is a null address");
  require(reinterpret_cast<uintptr_t>(address) % alignment == 0,
          std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
}

bool empty(const AttentionShape& shape) { return shape.B == 0 || shape.L == 0 || shape.N == 0; }

// [B, tokens, N, K]: boxes of one head. The strides ascend, as the documentation of the driver writes them.
TensorBoxes token_boxes(int64_t B, int64_t tokens, int64_t N, int64_t batch_stride, int64_t token_stride, int box_tokens) {
  const int64_t token = tokens == 1 ? N * kHeadWidth : token_stride, batch = B == 1 ? tokens * token : batch_stride;
  return {{kHeadWidth, static_cast<uint64_t>(N), static_cast<uint64_t>(tokens), static_cast<uint64_t>(B)},
          {kHeadWidth, static_cast<uint64_t>(token), static_cast<uint64_t>(batch)},
          {kHeadWidth, 1, static_cast<uint32_t>(box_tokens), 1}};
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has none. Asked for at run time, so that the module loads where there is no driver.
EncodeTiled find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeTiled>(function);
}

cudaError_t encode(EncodeTiled encoder, sm90::TensorMap& map, const void* address, const TensorBoxes& boxes) {
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  cuuint64_t dims[4], strides[3];
  std::copy(boxes.dims, boxes.dims + 4, dims);
  std::copy(boxes.strides, boxes.strides + 3, strides);
  const CUresult result = encoder(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void*>(address), dims, strides,
                                  boxes.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <bool kInt8, bool kSkip>
cudaError_t launch(const AttentionLaunch& plan, const Parameters& parameters, cudaStream_t stream) {
  const auto kernel = attention_kernel<kInt8, kSkip>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

}  // namespace

AttentionLaunch attention_sm90_launch(const AttentionShape& shape) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() - kKeys;  // rounded up it is still an int
  require(shape.K == kHeadWidth, "the head width K is " + std::to_string(shape.K) + "; allowed: 128");
  require_size("B", shape.B, 0, 65535);
  require_size("L", shape.L, 0, kLargest);
  require_size("S", shape.S, 1, kLargest);
  require_size("N", shape.N, 0, 65535);
  AttentionLaunch plan = {};
  if (empty(shape)) return plan;
  require_stride("the batch stride of q", shape.B, shape.q_strides[0]);
  require_stride("the token stride of q", shape.L, shape.q_strides[1]);
  require_stride("the batch stride of k", shape.B, shape.k_strides[0]);
  require_stride("the token stride of k", shape.S, shape.k_strides[1]);

  // query tiles the fastest: blocks that run together read the same keys and values, from the L2 cache
  plan.grid[0] = static_cast<unsigned>((shape.L + kQueries - 1) / kQueries);
  plan.grid[1] = static_cast<unsigned>(shape.N);
  plan.grid[2] = static_cast<unsigned>(shape.B);
  plan.threads = kThreads;
  plan.shared_bytes = kSharedBytes;
  plan.q = token_boxes(shape.B, shape.L, shape.N, shape.q_strides[0], shape.q_strides[1], kQueries);
  plan.k = token_boxes(shape.B, shape.S, shape.N, shape.k_strides[0], shape.k_strides[1], kKeys);
  const uint64_t B = shape.B, N = shape.N, stored = (shape.S + 15) / 16 * 16;
  plan.v = {{stored, kHeadWidth, N, B}, {stored, stored * kHeadWidth, stored * kHeadWidth * N}, {kKeys, kHeadWidth, 1, 1}};
  require(plan.v.strides[2] < uint64_t{1} << 40, "S N K is 2^40 or more");
  return plan;
}

std::string attention_sm90_unusable(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major != 9 || minor != 0)
    return "the device has compute capability " + std::to_string(major) + "." + std::to_string(minor) + "; allowed: 9.0";
  return find_encoder() != nullptr ? "" : "the driver has no cuTensorMapEncodeTiled";
}

cudaError_t attention_sm90(const AttentionArguments& arguments, int device, cudaStream_t stream) {
  const AttentionShape& shape = arguments.shape;
  const AttentionLaunch plan = attention_sm90_launch(shape);
  require(arguments.skip <= 0.0f, "skip is " + std::to_string(arguments.skip) + "; allowed: 0 or less, -infinity for never");
  if (empty(shape)) return cudaSuccess;
  require_address("q", arguments.q, 16);
  require_address("q_scale", arguments.q_scale, 4);
  require_address("k", arguments.k, 16);
  require_address("k_scale", arguments.k_scale, 4);
  require_address("v", arguments.v, 16);
  require_address("v_scale", arguments.v_scale, 16);
  require_address("v_center", arguments.v_center, 16);
  require_address("out", arguments.out, 16);
  if (arguments.lse != nullptr) require_address("lse", arguments.lse, 4);

  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const std::string reason = attention_sm90_unusable(device);
  require(reason.empty(), reason);
  Parameters parameters = {{}, {}, {}, arguments.q_scale, arguments.k_scale, arguments.v_scale, arguments.v_center,
                           arguments.out, arguments.lse, arguments.out_dtype, static_cast<int>(shape.L),
                           static_cast<int>(shape.S), static_cast<int>(shape.N), arguments.skip};
  const EncodeTiled encoder = find_encoder();
  error = encode(encoder, parameters.q, arguments.q, plan.q);
  if (error == cudaSuccess) error = encode(encoder, parameters.k, arguments.k, plan.k);
  if (error == cudaSuccess) error = encode(encoder, parameters.v, arguments.v, plan.v);
  if (error != cudaSuccess) return error;
  const bool skip = arguments.skip > -std::numeric_limits<float>::infinity();
  if (arguments.scores == ScoreType::kInt8)
    return skip ? launch<true, true>(plan, parameters, stream) : launch<true, false>(plan, parameters, stream);
  return skip ? launch<false, true>(plan, parameters, stream) : launch<false, false>(plan, parameters, stream);
}
