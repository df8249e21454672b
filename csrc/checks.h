// A launcher's view of a tensor, and the checks that it makes before it launches. Plain C++ without CUDA or torch, so
// that the tests can compile it for the host. A check that fails throws a sentence that says what is wrong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dinov2_fast {

enum class Dtype { bf16, fp16, fp32, e4m3, other };

inline const char* name(Dtype dtype) {
  constexpr const char* NAMES[] = {"bf16", "fp16", "fp32", "e4m3", "another dtype"};
  return NAMES[static_cast<int>(dtype)];
}

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : dtype == Dtype::e4m3 ? 1 : 2; }

constexpr int MAX_DIMS = 5;

// A tensor, or an optional one that is not given. Strides are in elements.
struct Tensor {
  const char* name = "";
  void* data = nullptr;
  Dtype dtype = Dtype::other;
  int device = 0;
  int dim = 0;
  int64_t sizes[MAX_DIMS] = {};
  int64_t strides[MAX_DIMS] = {};
  bool given = false;

  explicit operator bool() const { return given; }
  int64_t rows() const { return sizes[0]; }
  int64_t columns() const { return sizes[dim - 1]; }
  int64_t row_stride() const { return strides[0]; }
};

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

inline std::string shape(const int64_t* sizes, int dim) {
  std::ostringstream text;
  text << "(";
  for (int d = 0; d < dim && d < MAX_DIMS; ++d) text << (d ? ", " : "") << sizes[d];
  text << (dim > MAX_DIMS ? ", ...)" : ")");
  return text.str();
}

inline std::string shape(const Tensor& tensor) { return shape(tensor.sizes, tensor.dim); }

inline void check_dtype(const Tensor& tensor, std::initializer_list<Dtype> allowed) {
  std::string names;
  for (Dtype dtype : allowed) {
    if (tensor.dtype == dtype) return;
    names += (names.empty() ? "" : " or ") + std::string(name(dtype));
  }
  fail(tensor.name, " must be ", names, ", got ", name(tensor.dtype));
}

// The bytes that a kernel reads or writes at once.
inline int64_t chunk_bytes(const Tensor& tensor) { return tensor.dtype == Dtype::e4m3 ? 8 : 16; }

inline void check_start(const Tensor& tensor) {
  const int64_t bytes = chunk_bytes(tensor);
  if (reinterpret_cast<uintptr_t>(tensor.data) % bytes) {
    fail(tensor.name, " must begin at a multiple of ", bytes, " bytes");
  }
}

// Every row must begin at a multiple of `chunk_bytes`.
inline void check_aligned(const Tensor& tensor) {
  check_start(tensor);
  const int64_t bytes = chunk_bytes(tensor);
  if (tensor.dim == 2 && tensor.strides[0] * item_size(tensor.dtype) % bytes) {
    fail(tensor.name, " must have rows a multiple of ", bytes, " bytes apart, got a stride of ", tensor.strides[0]);
  }
}

// A matrix (rows, columns) with contiguous rows, on the device.
inline void check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, int device) {
  if (tensor.dim != 2 || tensor.sizes[0] != rows || tensor.sizes[1] != columns) {
    fail(tensor.name, " must have the shape (", rows, ", ", columns, "), got ", shape(tensor));
  }
  if (columns > 1 && tensor.strides[1] != 1) fail(tensor.name, " must have contiguous rows");
  if (tensor.device != device) fail(tensor.name, " must be on device ", device, ", got ", tensor.device);
  check_aligned(tensor);
}

inline void check_vector(const Tensor& tensor, int64_t size, int device) {
  if (tensor.dim != 1 || tensor.sizes[0] != size) {
    fail(tensor.name, " must have the shape (", size, "), got ", shape(tensor));
  }
  if (size > 1 && tensor.strides[0] != 1) fail(tensor.name, " must be contiguous");
  if (tensor.device != device) fail(tensor.name, " must be on device ", device, ", got ", tensor.device);
  check_aligned(tensor);
}

inline void check_contiguous(const Tensor& tensor, std::initializer_list<int64_t> sizes, int device) {
  const int dim = static_cast<int>(sizes.size());
  if (tensor.dim != dim || !std::equal(sizes.begin(), sizes.end(), tensor.sizes)) {
    fail(tensor.name, " must have the shape ", shape(sizes.begin(), dim), ", got ", shape(tensor));
  }
  int64_t stride = 1;
  for (int d = dim - 1; d >= 0; --d) {
    if (tensor.sizes[d] > 1 && tensor.strides[d] != stride) fail(tensor.name, " must be contiguous");
    stride *= std::max<int64_t>(tensor.sizes[d], 1);
  }
  if (tensor.device != device) fail(tensor.name, " must be on device ", device, ", got ", tensor.device);
  check_start(tensor);
}

}  // namespace dinov2_fast
