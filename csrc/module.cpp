// wan_fast._cuda: kernels called with raw device addresses and a raw stream, so that one build serves every PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of wan_fast. Addresses and streams are integers; the caller keeps the tensors alive.";
  m.def("architectures", &architectures, "The architectures this module was compiled for, such as \"90a\".");
  m.def("unusable", &unusable, py::arg("device"),
        "Why the kernels cannot run on a device (by index), or an empty string when they can.");
  m.def("frames_to_uint8", &call_frames_to_uint8, py::arg("frames"), py::arg("dtype"), py::arg("pixels"), py::arg("F"),
        py::arg("h"), py::arg("w"), py::arg("patch"), py::arg("rounding"), py::arg("device"), py::arg("stream"),
        "[F, h, w, 3 patch patch] float32, bfloat16 or float16 in [-1, 1] -> [F, patch h, patch w, 3] uint8; patch 1 or 2.");
}
