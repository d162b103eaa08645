// A Hopper block on the host: what csrc/sm90.cuh and the CUDA headers declare, for a kernel compiled as plain C++.
//
// Every CUDA thread is a fiber; a block runs alone, its fibers in a random order that a seed fixes. Copies and products happen
// as late as the waits allow, and their targets hold garbage until then, so that a missing wait or an early release shows.
// Layouts follow the PTX ISA: matrix descriptors, swizzles, fragments of wgmma, phases of mbarriers. Not modelled: time, the
// proxies' memory ordering, and the precision of the tensor cores' e4m3 sums (here fp32).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL
#define CUDART_VERSION 13000

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline int __float_as_int(float x) { return bits_of<int>(x); }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxShared = 232448;
// where dynamic shared memory starts: a multiple of 16, of nothing more
constexpr uint32_t kSharedStart = 1040;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --- formats

inline float e4m3_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return x & 128 ? -size : size;
}

inline uint8_t float_to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 128 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 127;
  if (size >= 448.0f) return sign | 126;
  int exponent = -6;
  if (size >= 0.015625f) exponent = std::ilogb(size);
  // in units of the last place; round half to even is the default mode
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return sign | std::min(126, (exponent + 6) * 8 + units);
}

inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = bits_of<uint32_t>(x);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline uint16_t float_to_float16(float x) { return bits_of<uint16_t>(static_cast<_Float16>(x)); }

// --- tensor maps

struct alignas(64) TensorMap {
  const uint8_t* address;
  uint64_t dims[4], strides[3];  // strides in bytes, of dimension 1 and on
  uint32_t box[4];
  int swizzle;
  uint32_t valid;
};

// --- a block

struct Barrier {
  int count, pending;
  int64_t bytes;
  uint32_t phase;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
  bool vote = true, result = true;
};

struct Copy {
  uint32_t to, barrier;
  TensorMap map;
  int at[4];
  uint32_t bytes() const { return map.box[0] * map.box[1] * map.box[2] * map.box[3]; }
};

enum class ProductType { kInt8, kE4M3 };

struct Product {
  ProductType type;
  bool accumulate, a_in_registers;
  uint64_t a, b;
  std::array<const uint32_t*, kWarpgroup> a_registers;
  std::array<void*, kWarpgroup> d;
};

struct Accumulator {
  void* at;
  std::array<uint32_t, 64> values;
  size_t last;  // the newest product that uses it
};

struct Warpgroup {
  std::vector<Product> products;
  size_t executed = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index = 0;
  bool done = false, asleep = false, fenced = false;
  std::function<bool()> ready;
  int registers = 0;
  size_t issued = 0;
  std::vector<size_t> groups;  // products issued when each group was committed
  std::vector<Accumulator> accumulators;
};

// All arrive before any goes on; the last to arrive calls `action`.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Counts {
  int64_t int8 = 0, e4m3_shared = 0, e4m3_registers = 0, copies = 0;
};

struct Block {
  std::vector<uint8_t> storage;
  uint8_t* shared = nullptr;  // its address modulo 1024 is that of kSharedStart
  uint32_t shared_bytes = 0;
  std::map<uint32_t, Barrier> barriers;
  std::array<NamedBarrier, 16> named;
  std::vector<Copy> copies;
  std::vector<Warpgroup> warpgroups;
  std::vector<Meeting> warp_meetings, warpgroup_meetings;
  std::vector<std::array<uint32_t, 2 * kWarp>> exchanged;
  std::vector<Fiber> fibers;
  dim3 index;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::string failure;
  std::mt19937 random;
  std::function<void()> body;
  Counts counts;
};

inline Block* block = nullptr;
inline uint32_t seed = 0;
inline Counts counts;
inline int capability[2] = {9, 0};

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  Fiber& fiber = *block->current;
  fiber.ready = std::move(ready);
  swapcontext(&fiber.context, &block->scheduler);
}

// Ends the block: nothing runs after it.
[[noreturn]] inline void fail(const std::string& message) {
  block->failure = "thread " + std::to_string(block->current ? block->current->index : -1) + ": " + message;
  swapcontext(&block->current->context, &block->scheduler);
  std::abort();
}

inline void meet(Meeting& meeting, int size, const std::function<void()>& action = {}) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == size) {
    if (action) action();
    meeting.arrived = 0;
    ++meeting.generation;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

inline uint8_t* shared_bytes(uint32_t address, uint32_t size) {
  if (address < kSharedStart || address + size > kSharedStart + block->shared_bytes)
    fail("shared memory at " + std::to_string(address) + " is outside");
  return block->shared + (address - kSharedStart);
}

inline Barrier& barrier_at(uint32_t address) {
  const auto found = block->barriers.find(address);
  if (found == block->barriers.end()) fail("no barrier was initialised at " + std::to_string(address));
  return found->second;
}

inline void complete(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
}

inline void arrive(uint32_t address, uint32_t bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) fail("more arrivals at a barrier than it was initialised for");
  barrier.bytes += bytes;
  --barrier.pending;
  complete(barrier);
}

// Bits 7 and up of an address, exclusive-ored into bits 4 and up. Modes as in matrix descriptors: 1 is 128 bytes, 2 is 64, 3 is
// 32, 0 is none.
inline uint32_t swizzle(uint32_t address, int mode) {
  const uint32_t mask = mode == 0 ? 0 : (8u >> (mode - 1)) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

inline void finish(const Copy& copy) {
  for (uint32_t i = 0; i < copy.bytes(); ++i) {
    uint32_t rest = i;
    const uint8_t* from = copy.map.address;
    bool inside = true;
    for (int d = 0; d < 4; ++d) {
      const int64_t at = copy.at[d] + static_cast<int64_t>(rest % copy.map.box[d]);
      rest /= copy.map.box[d];
      inside = inside && at >= 0 && at < static_cast<int64_t>(copy.map.dims[d]);
      from += at * static_cast<int64_t>(d == 0 ? 1 : copy.map.strides[d - 1]);
    }
    *shared_bytes(swizzle(copy.to + i, copy.map.swizzle), 1) = inside ? *from : 0;
  }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes();
  complete(barrier);
}

// --- products

// Rows of 32 bytes of a K-major matrix in shared memory.
struct Descriptor {
  uint32_t start, stride, base;
  int mode;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4), base(bits >> 49 & 7), mode(bits >> 62) {
    if (base != 0) fail("base offsets are not emulated");
    if (mode == 0) fail("matrices without a swizzle are not emulated");
  }
  uint8_t at(int row, int byte) const {
    const uint32_t width = 256u >> mode;  // of an atom of eight rows
    return *shared_bytes(swizzle(start + row / 8 * stride + row % 8 * width + byte, mode), 1);
  }
  // what the rows may cover, whatever the swizzle
  std::pair<uint32_t, uint32_t> range(int rows) const {
    const uint32_t width = 256u >> mode, first = start & ~(8 * width - 1);
    return {first, first + (rows / 8 - 1) * stride + 8 * width};
  }
};

template <typename T>
T decode(uint8_t byte) {
  if constexpr (std::is_integral_v<T>) return static_cast<int8_t>(byte);
  else {
    static const std::array<float, 256> table = [] {
      std::array<float, 256> values;
      for (int i = 0; i < 256; ++i) values[i] = e4m3_to_float(i);
      return values;
    }();
    return table[byte];
  }
}

inline Accumulator& accumulator_of(Fiber& fiber, const void* at) {
  return *std::find_if(fiber.accumulators.begin(), fiber.accumulators.end(), [&](auto& a) { return a.at == at; });
}

template <typename T>
void execute(const Product& product, Fiber* fibers) {
  static T a[64][32], b[32][128], d[64][128];
  const Descriptor b_rows(product.b);
  for (int row = 0; row < 128; ++row)
    for (int k = 0; k < 32; ++k) b[k][row] = decode<T>(b_rows.at(row, k));
  if (product.a_in_registers) {
    for (int thread = 0; thread < kWarpgroup; ++thread)
      for (int i = 0; i < 16; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 4 % 2 * 8, column = i / 8 * 16 + thread % 4 * 4 + i % 4;
        a[row][column] = decode<T>(product.a_registers[thread][i / 4] >> i % 4 * 8);
      }
  } else {
    const Descriptor a_rows(product.a);
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 32; ++k) a[row][k] = decode<T>(a_rows.at(row, k));
  }
  const auto each = [&](auto&& visit) {
    for (int thread = 0; thread < kWarpgroup; ++thread) {
      auto& values = accumulator_of(fibers[thread], product.d[thread]).values;
      for (int i = 0; i < 64; ++i)
        visit(values[i], d[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2]);
    }
  };
  each([&](uint32_t value, T& element) { element = product.accumulate ? bits_of<T>(value) : T{0}; });
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 32; ++k)
      for (int n = 0; n < 128; ++n) d[m][n] += a[m][k] * b[k][n];
  each([&](uint32_t& value, T element) { value = bits_of<uint32_t>(element); });
  if (std::is_integral_v<T>) ++block->counts.int8;
  else if (product.a_in_registers) ++block->counts.e4m3_registers;
  else ++block->counts.e4m3_shared;
}

constexpr uint32_t kGarbage = 0x7FC0DEAD;  // a NaN

inline void execute_until(int warpgroup, size_t end) {
  Warpgroup& group = block->warpgroups[warpgroup];
  Fiber* fibers = &block->fibers[warpgroup * kWarpgroup];
  for (; group.executed < end; ++group.executed) {
    const Product& product = group.products[group.executed];
    if (product.type == ProductType::kInt8) execute<int>(product, fibers);
    else execute<float>(product, fibers);
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    auto& accumulators = fibers[thread].accumulators;
    for (size_t i = 0; i < accumulators.size();) {
      if (accumulators[i].last >= end) {
        ++i;
        continue;
      }
      for (int r = 0; r < 64; ++r)
        if (static_cast<uint32_t*>(accumulators[i].at)[r] != kGarbage) fail("an accumulator was written before the wait");
      std::memcpy(accumulators[i].at, accumulators[i].values.data(), 256);
      accumulators.erase(accumulators.begin() + i);
    }
  }
}

inline bool overlap(std::pair<uint32_t, uint32_t> x, std::pair<uint32_t, uint32_t> y) {
  return x.first < y.second && y.first < x.second;
}

inline bool touches(const Product& product, std::pair<uint32_t, uint32_t> range) {
  return overlap(Descriptor(product.b).range(128), range) ||
         (!product.a_in_registers && overlap(Descriptor(product.a).range(64), range));
}

inline void issue(ProductType type, void* d, uint64_t a, const uint32_t* a_registers, uint64_t b, bool accumulate) {
  Fiber& fiber = *block->current;
  Warpgroup& group = block->warpgroups[fiber.index / kWarpgroup];
  if (!fiber.fenced) fail("products without a fence");
  if (fiber.issued == group.products.size()) {
    group.products.push_back({type, accumulate, a_registers != nullptr, a, b, {}, {}});
    for (const Copy& copy : block->copies)
      if (touches(group.products.back(), {copy.to, copy.to + copy.bytes()})) fail("products read a tile that is being copied");
  }
  Product& product = group.products[fiber.issued];
  if (product.type != type || product.accumulate != accumulate || product.a != a || product.b != b ||
      product.a_in_registers != (a_registers != nullptr))
    fail("the threads of a warpgroup disagree on a product");
  product.d[fiber.index % kWarpgroup] = d;
  product.a_registers[fiber.index % kWarpgroup] = a_registers;
  auto& accumulators = fiber.accumulators;
  if (std::none_of(accumulators.begin(), accumulators.end(), [&](auto& x) { return x.at == d; })) {
    accumulators.push_back({d, {}, 0});
    std::memcpy(accumulators.back().values.data(), d, 256);
    std::fill_n(static_cast<uint32_t*>(d), 64, kGarbage);
  }
  accumulator_of(fiber, d).last = fiber.issued++;
}

// --- running

inline void trampoline() {
  block->body();
  block->current->done = true;
  swapcontext(&block->current->context, &block->scheduler);
}

inline void step(Fiber& fiber) {
  fiber.ready = nullptr;
  block->current = &fiber;
  swapcontext(&block->scheduler, &fiber.context);
}

inline void finish_a_copy() {
  const size_t i = block->random() % block->copies.size();
  const Copy copy = block->copies[i];
  block->copies.erase(block->copies.begin() + i);
  finish(copy);
}

// Some warps and some threads sleep through some rounds, so that others run ahead as far as the barriers let them. Of some
// blocks the copies end only when nobody can go on without.
inline void schedule() {
  const bool slow_copies = block->random() % 2 == 0;
  std::vector<Fiber*> order;
  for (Fiber& fiber : block->fibers) order.push_back(&fiber);
  uint32_t drowsy_warps = 0;
  for (int round = 0;; ++round) {
    if (round % 16 == 0) {
      drowsy_warps = block->random() & block->random();
      std::shuffle(order.begin(), order.end(), block->random);
      for (Fiber& fiber : block->fibers) fiber.asleep = drowsy_warps >> fiber.index / kWarp & 1 || block->random() % 8 == 0;
    }
    bool alive = false, moved = false;
    for (int pass = 0; pass < 2 && !moved; ++pass) {
      // a second pass wakes everybody
      for (Fiber* fiber : order) {
        if (fiber->done) continue;
        alive = true;
        if ((pass == 0 && fiber->asleep) || (fiber->ready && !fiber->ready())) continue;
        step(*fiber);
        moved = true;
        if (!block->failure.empty()) return;
      }
      if (!block->copies.empty() && (slow_copies ? pass == 1 && !moved : !moved || block->random() % 8 == 0))
        finish_a_copy(), moved = true;
    }
    if (!alive) break;
    if (!moved) {
      block->failure = "deadlock";
      return;
    }
  }
  const bool left = std::any_of(block->named.begin(), block->named.end(), [](auto& barrier) { return barrier.arrived > 0; });
  if (left) block->failure = "a named barrier is left with arrivals";
  if (!block->copies.empty()) block->failure = "the block ends before its copies";
  int registers = 0;
  for (const Fiber& fiber : block->fibers) registers += fiber.registers;
  const int threads = static_cast<int>(block->fibers.size());
  if (registers > 65536 / threads / 8 * 8 * threads) block->failure = "more registers than the block was launched with";
}

inline std::string run_block(dim3 index, int threads, uint32_t shared_bytes, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  constexpr size_t kStack = 96 << 10;
  while (stacks.size() < static_cast<size_t>(threads)) stacks.push_back(std::make_unique<char[]>(kStack));
  Block local;
  block = &local;
  local.index = index;
  local.body = body;
  local.random.seed(seed++);
  local.shared_bytes = shared_bytes;
  local.storage.assign(shared_bytes + 2048, 0xFF);
  local.shared = local.storage.data() + (kSharedStart - reinterpret_cast<uintptr_t>(local.storage.data())) % 1024;
  local.warpgroups.resize(threads / kWarpgroup);
  local.warpgroup_meetings.resize(threads / kWarpgroup);
  local.warp_meetings.resize(threads / kWarp);
  local.exchanged.resize(threads / kWarp);
  local.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = local.fibers[i];
    fiber.index = i;
    fiber.registers = 65536 / threads / 8 * 8;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, trampoline, 0);
  }
  schedule();
  counts.int8 += local.counts.int8;
  counts.e4m3_shared += local.counts.e4m3_shared;
  counts.e4m3_registers += local.counts.e4m3_registers;
  counts.copies += local.counts.copies;
  block = nullptr;
  return local.failure;
}

}  // namespace emulated

#define threadIdx (dim3(emulated::block->current->index, 0, 0))
#define blockIdx (emulated::block->index)

// --- the runtime and the driver, as far as the launcher calls them

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr int cudaEnableDefault = 0;
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

using CUtensorMap = emulated::TensorMap;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                       const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool valid = rank == 4 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  for (int d = 0; d < 4; ++d) {
    valid = valid && dims[d] >= 1 && dims[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
    if (d < 3) valid = valid && strides[d] % 16 == 0 && strides[d] > 0 && strides[d] < uint64_t{1} << 40;
  }
  valid = valid && box[0] % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || box[0] <= 16u << swizzle);
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  map->address = static_cast<const uint8_t*>(address);
  std::copy_n(dims, 4, map->dims);
  std::copy_n(strides, 3, map->strides);
  std::copy_n(box, 4, map->box);
  map->swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 4 - swizzle;  // as in matrix descriptors
  map->valid = 0x600DC0DE;
  return CUDA_SUCCESS;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool found = std::string(name) == "cuTensorMapEncodeTiled";
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "emulated error";
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = emulated::capability[attribute == cudaDevAttrComputeCapabilityMinor];
  return cudaSetDevice(device);
}

namespace emulated {
inline int allowed_shared = 48 << 10;
inline std::string last_failure;
}  // namespace emulated

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int value) {
  emulated::allowed_shared = value;
  return value <= emulated::kMaxShared ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const std::decay_t<Parameters>&... parameters) {
  if (config->dynamicSmemBytes > static_cast<size_t>(emulated::allowed_shared)) return cudaErrorInvalidValue;
  for (unsigned z = 0; z < config->gridDim.z; ++z)
    for (unsigned y = 0; y < config->gridDim.y; ++y)
      for (unsigned x = 0; x < config->gridDim.x; ++x) {
        emulated::last_failure = emulated::run_block(dim3(x, y, z), config->blockDim.x, config->dynamicSmemBytes,
                                                     [&] { kernel(parameters...); });
        if (!emulated::last_failure.empty()) return cudaErrorLaunchFailure;
      }
  return cudaSuccess;
}

// --- csrc/sm90.cuh

namespace sm90 {

using emulated::block;
using emulated::fail;
using TensorMap = CUtensorMap;

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - block->shared + emulated::kSharedStart);
}
inline uint8_t* dynamic_shared() { return block->shared; }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulated::shared_bytes(barrier, 8);
  if (barrier % 8 != 0) fail("a barrier is not aligned to 8 bytes");
  if (block->barriers.count(barrier) != 0) fail("a barrier is initialised twice");
  block->barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { emulated::arrive(barrier, 0); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulated::arrive(barrier, bytes); }
inline void barrier_wait(uint32_t address, uint32_t parity) {
  emulated::Barrier& barrier = emulated::barrier_at(address);
  if (parity > 1) fail("parity is " + std::to_string(parity));
  emulated::wait_until([&barrier, parity] { return barrier.phase % 2 != parity; });
}

inline void prefetch_tensor_map(const TensorMap&) {}
inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  if (map.valid != 0x600DC0DE) fail("not a tensor map");
  const emulated::Copy copy = {to, barrier, map, {x, y, z, w}};
  const std::pair<uint32_t, uint32_t> range = {to, to + copy.bytes()};
  if (to % (map.swizzle == 0 ? 128 : 2048 >> map.swizzle) != 0) fail("the target of a copy is not aligned to its swizzle");
  for (const auto& group : block->warpgroups)
    for (size_t i = group.executed; i < group.products.size(); ++i)
      if (touches(group.products[i], range)) fail("a copy overwrites a tile that products may still read");
  for (const auto& other : block->copies)
    if (emulated::overlap(range, {other.to, other.to + other.bytes()})) fail("two copies have the same target");
  std::memset(emulated::shared_bytes(to, copy.bytes()), 0x7F, copy.bytes());
  block->copies.push_back(copy);
  ++block->counts.copies;
}

inline void products_fence() { block->current->fenced = true; }
inline void products_commit() { block->current->groups.push_back(block->current->issued); }
template <int kPending>
void products_wait() {
  emulated::Fiber& fiber = *block->current;
  const int warpgroup = fiber.index / emulated::kWarpgroup;
  const size_t groups = fiber.groups.size(), end = groups > kPending ? fiber.groups[groups - 1 - kPending] : 0;
  fiber.fenced = false;
  emulated::meet(block->warpgroup_meetings[warpgroup], emulated::kWarpgroup,
                 [&] { emulated::execute_until(warpgroup, std::max(end, block->warpgroups[warpgroup].executed)); });
}
template <typename T>
void pin(T&) {}

inline void multiply_int8(int (&d)[64], uint64_t a, uint64_t b) {
  emulated::issue(emulated::ProductType::kInt8, d, a, nullptr, b, true);
}
inline void multiply_e4m3(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  emulated::issue(emulated::ProductType::kE4M3, d, a, nullptr, b, accumulate);
}
inline void multiply_e4m3(float (&d)[64], const uint32_t* a, uint64_t b, bool accumulate) {
  emulated::issue(emulated::ProductType::kE4M3, d, 0, a, b, accumulate);
}

// Returns the generation that completes it.
inline uint64_t named_enter(int name, int threads, bool vote) {
  emulated::NamedBarrier& barrier = block->named.at(name);
  if (barrier.arrived > 0 && barrier.expected != threads) fail("a named barrier is used with two numbers of threads");
  barrier.expected = threads;
  barrier.vote = barrier.vote && vote;
  const uint64_t generation = barrier.generation + 1;
  if (++barrier.arrived == threads) {
    barrier.result = barrier.vote;
    barrier.arrived = 0, barrier.vote = true, ++barrier.generation;
  }
  return generation;
}
inline bool named_all(int name, int threads, bool vote) {
  const uint64_t generation = named_enter(name, threads, vote);
  const emulated::NamedBarrier& barrier = block->named[name];
  emulated::wait_until([&barrier, generation] { return barrier.generation >= generation; });
  return barrier.result;
}
inline void named_sync(int name, int threads) { named_all(name, threads, true); }
inline void named_arrive(int name, int threads) { named_enter(name, threads, true); }

inline void sync_block() { named_sync(0, static_cast<int>(block->fibers.size())); }
inline void sync_warp() { emulated::meet(block->warp_meetings[block->current->index / emulated::kWarp], emulated::kWarp); }

// The values of two exchanges alternate: no lane is more than one exchange ahead.
inline uint32_t exchange(uint32_t mine, int source) {
  const int index = block->current->index, warp = index / emulated::kWarp;
  emulated::Meeting& meeting = block->warp_meetings[warp];
  const int half = meeting.generation % 2 * emulated::kWarp;
  block->exchanged[warp][half + index % emulated::kWarp] = mine;
  emulated::meet(meeting, emulated::kWarp);
  return block->exchanged[warp][half + source];
}
inline int uniform(int x) { return static_cast<int>(exchange(static_cast<uint32_t>(x), 0)); }
inline float shuffle_xor(float x, int mask) {
  return bits_of<float>(exchange(bits_of<uint32_t>(x), block->current->index % emulated::kWarp ^ mask));
}

template <int kRegisters>
void set_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  block->current->registers = kRegisters;
}
template <int kRegisters>
void shrink_registers() {
  set_registers<kRegisters>();
}
template <int kRegisters>
void grow_registers() {
  set_registers<kRegisters>();
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
inline float max_nan(float x, float y) {
  if (std::isnan(x) || std::isnan(y)) return std::numeric_limits<float>::quiet_NaN();
  return std::max(x, y);
}
inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  return emulated::float_to_e4m3(a) | emulated::float_to_e4m3(b) << 8 | emulated::float_to_e4m3(c) << 16 |
         static_cast<uint32_t>(emulated::float_to_e4m3(d)) << 24;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return emulated::float_to_bfloat16(low) | static_cast<uint32_t>(emulated::float_to_bfloat16(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
  return emulated::float_to_float16(low) | static_cast<uint32_t>(emulated::float_to_float16(high)) << 16;
}

}  // namespace sm90
