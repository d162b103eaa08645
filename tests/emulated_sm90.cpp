// csrc/attention_sm90.cu on the host, for ctypes. Compiled next to a copy of it and of ops.h, and to headers of the names of
// CUDA's and of sm90.cuh that all include emulated_sm90.h.
#include "emulated_sm90.h"

#include "attention_sm90.cu"

namespace {

// What was thrown or reported, "" for success.
template <typename Function>
const char* guarded(Function&& function) {
  static std::string message;
  message.clear();
  emulated::last_failure.clear();
  try {
    const cudaError_t error = function();
    const std::string& failure = emulated::last_failure;
    if (error != cudaSuccess) message = "CUDA: " + (failure.empty() ? cudaGetErrorString(error) : failure);
  } catch (const std::invalid_argument& error) {
    message = std::string("ValueError: ") + error.what();
  } catch (const std::exception& error) {
    message = std::string("other: ") + error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" const char* attend(const AttentionArguments* arguments, int device, uint32_t seed) {
  emulated::seed = seed;
  return guarded([&] { return attention_sm90(*arguments, device, nullptr); });
}

extern "C" const char* plan(const AttentionShape* shape, AttentionLaunch* launch) {
  return guarded([&] {
    *launch = attention_sm90_launch(*shape);
    return cudaSuccess;
  });
}

extern "C" void set_capability(int major, int minor) {
  emulated::capability[0] = major;
  emulated::capability[1] = minor;
}

// Products of int8, of e4m3 from shared memory, of e4m3 from registers, and copies, since the call before.
extern "C" void take_counts(int64_t* counts) {
  const emulated::Counts taken = emulated::counts;
  emulated::counts = {};
  const int64_t values[] = {taken.int8, taken.e4m3_shared, taken.e4m3_registers, taken.copies};
  std::copy_n(values, 4, counts);
}

extern "C" uint32_t pack(const float* x) { return sm90::pack_e4m3(x[0], x[1], x[2], x[3]); }
extern "C" uint32_t pack_16(const float* x, int bfloat16) {
  return bfloat16 ? sm90::pack_bfloat16(x[0], x[1]) : sm90::pack_float16(x[0], x[1]);
}
