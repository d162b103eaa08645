// wan_fast._cuda: kernels called with raw device addresses and a raw stream, so that one build serves every PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype is \"" + name + "\"; allowed: float32, bfloat16, float16");
}

std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(WAN_FAST_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

std::string unusable(int device) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = probe();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void call_frames_to_uint8(uint64_t frames, const std::string& dtype, uint64_t pixels, int64_t F, int64_t h, int64_t w,
                          int patch, bool rounding, int device, uint64_t stream) {
  const DType type = parse_dtype(dtype);
  check(cudaSetDevice(device), "frames_to_uint8");
  check(::frames_to_uint8(reinterpret_cast<const void*>(frames), type, reinterpret_cast<uint8_t*>(pixels), F, h, w,
                          patch, rounding, reinterpret_cast<cudaStream_t>(stream)),
        "frames_to_uint8");
}

ScoreType parse_scores(const std::string& name) {
  if (name == "int8") return ScoreType::kInt8;
  if (name == "float8_e4m3fn") return ScoreType::kFloat8;
  throw std::invalid_argument("scores is \"" + name + "\"; allowed: int8, float8_e4m3fn");
}

using Strides = std::array<int64_t, 2>;  // batch, token

AttentionShape attention_shape(int64_t B, int64_t L, int64_t S, int64_t N, int64_t K, Strides q_strides, Strides k_strides) {
  return {B, L, S, N, K, {q_strides[0], q_strides[1]}, {k_strides[0], k_strides[1]}};
}

void call_attention_sm90(uint64_t q, uint64_t q_scale, uint64_t k, uint64_t k_scale, uint64_t v, uint64_t v_scale,
                         uint64_t v_center, uint64_t out, uint64_t lse, const std::string& scores,
                         const std::string& out_dtype, int64_t B, int64_t L, int64_t S, int64_t N, int64_t K,
                         Strides q_strides, Strides k_strides, float skip, int device, uint64_t stream) {
  AttentionArguments arguments;
  arguments.shape = attention_shape(B, L, S, N, K, q_strides, k_strides);
  arguments.scores = parse_scores(scores);
  arguments.out_dtype = parse_dtype(out_dtype);
  arguments.skip = skip;
  arguments.q = reinterpret_cast<const void*>(q);
  arguments.q_scale = reinterpret_cast<const float*>(q_scale);
  arguments.k = reinterpret_cast<const void*>(k);
  arguments.k_scale = reinterpret_cast<const float*>(k_scale);
  arguments.v = reinterpret_cast<const void*>(v);
  arguments.v_scale = reinterpret_cast<const float*>(v_scale);
  arguments.v_center = reinterpret_cast<const float*>(v_center);
  arguments.out = reinterpret_cast<void*>(out);
  arguments.lse = reinterpret_cast<float*>(lse);
  check(::attention_sm90(arguments, device, reinterpret_cast<cudaStream_t>(stream)), "attention_sm90");
}

py::dict describe(const TensorBoxes& boxes) {
  return py::dict(py::arg("dims") = std::vector<uint64_t>(boxes.dims, boxes.dims + 4),
                  py::arg("strides") = std::vector<uint64_t>(boxes.strides, boxes.strides + 3),
                  py::arg("box") = std::vector<uint32_t>(boxes.box, boxes.box + 4));
}

py::dict describe_attention_sm90(int64_t B, int64_t L, int64_t S, int64_t N, int64_t K, Strides q_strides,
                                 Strides k_strides) {
  const AttentionLaunch plan = ::attention_sm90_launch(attention_shape(B, L, S, N, K, q_strides, k_strides));
  return py::dict(py::arg("grid") = std::vector<unsigned>(plan.grid, plan.grid + 3), py::arg("threads") = plan.threads,
                  py::arg("shared_bytes") = plan.shared_bytes, py::arg("q") = describe(plan.q),
                  py::arg("k") = describe(plan.k), py::arg("v") = describe(plan.v));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of wan_fast. Addresses and streams are integers; the caller keeps the tensors alive.";
  m.def("architectures", &architectures, "The architectures this module was compiled for, such as \"90a\".");
  m.def("unusable", &unusable, py::arg("device"),
        "Why the kernels cannot run on a device (by index), or an empty string when they can.");
  m.def("frames_to_uint8", &call_frames_to_uint8, py::arg("frames"), py::arg("dtype"), py::arg("pixels"), py::arg("F"),
        py::arg("h"), py::arg("w"), py::arg("patch"), py::arg("rounding"), py::arg("device"), py::arg("stream"),
        "[F, h, w, 3 patch patch] float32, bfloat16 or float16 in [-1, 1] -> [F, patch h, patch w, 3] uint8; patch 1 or 2.");
  m.def("attention_sm90", &call_attention_sm90, py::arg("q"), py::arg("q_scale"), py::arg("k"), py::arg("k_scale"),
        py::arg("v"), py::arg("v_scale"), py::arg("v_center"), py::arg("out"), py::arg("lse"), py::arg("scores"),
        py::arg("out_dtype"), py::arg("B"), py::arg("L"), py::arg("S"), py::arg("N"), py::arg("K"), py::arg("q_strides"),
        py::arg("k_strides"), py::arg("skip"), py::arg("device"), py::arg("stream"),
        "q [B, L, N, 128], k [B, S, N, 128] int8 or float8_e4m3fn, v [B, N, 128, S16] float8_e4m3fn -> [B, L, N, 128] and, "
        "unless its address is 0, lse [B, N, L]; layouts in ops.h. Strides are (batch, token); skip is -inf for never.");
  m.def("attention_sm90_launch", &describe_attention_sm90, py::arg("B"), py::arg("L"), py::arg("S"), py::arg("N"),
        py::arg("K"), py::arg("q_strides"), py::arg("k_strides"),
        "What attention_sm90 launches: grid, threads, shared_bytes, and the dims, strides and box of q, k and v in bytes.");
  m.def("attention_sm90_unusable", &attention_sm90_unusable, py::arg("device"),
        "Why attention_sm90 cannot run on a device (by index), or an empty string when it can.");
}
