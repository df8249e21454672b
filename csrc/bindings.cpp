// Registers the launchers as torch.ops.dinov2_fast_cuda.<name>. This is the only file that includes torch, and it uses
// its stable ABI alone, so one build works with every torch from 2.10 on. The ops have no autograd and return nothing:
// they write to tensors that the caller allocates and the schema marks as mutated. dinov2_fast/ops calls them, and
// dinov2_fast/extension.py loads the library.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "attention.h"
#include "linear.h"

namespace {

using TorchTensor = torch::stable::Tensor;
using Optional = std::optional<TorchTensor>;
using dinov2_fast::Dtype;

Dtype dtype_of(const TorchTensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    case ScalarType::Float:
      return Dtype::fp32;
    case ScalarType::Float8_e4m3fn:
      return Dtype::e4m3;
    default:
      return Dtype::other;
  }
}

dinov2_fast::Tensor view(const char* name, const TorchTensor& tensor) {
  dinov2_fast::Tensor view;
  view.name = name;
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
  view.device = tensor.get_device_index();
  view.dim = static_cast<int>(tensor.dim());
  for (int d = 0; d < view.dim && d < dinov2_fast::MAX_DIMS; ++d) {
    view.sizes[d] = tensor.size(d);
    view.strides[d] = tensor.stride(d);
  }
  view.given = true;
  return view;
}

dinov2_fast::Tensor view(const char* name, const Optional& tensor) {
  return tensor ? view(name, *tensor) : dinov2_fast::Tensor{name};
}

// While it exists, the device of a tensor is the current one. `stream` is torch's current stream on that device.
class OnDevice {
 public:
#ifdef DINOV2_FAST_ON_HOST
  explicit OnDevice(const TorchTensor&) {}
#else
  explicit OnDevice(const TorchTensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  void* stream = nullptr;  // a cudaStream_t

#ifndef DINOV2_FAST_ON_HOST
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

void linear_forward(const TorchTensor& x, const TorchTensor& weight, const Optional& bias, const Optional& weight_scale,
                    double scale, double inverse_scale, int64_t form, const TorchTensor& out) {
  if (form < 0 || form > 3) {
    dinov2_fast::fail("form must be 0 (none), 1 (gelu), 2 (swiglu) or 3 (residual), got ", form);
  }
  const OnDevice device(x);
  dinov2_fast::linear_forward(
      {view("x", x), view("weight", weight), view("bias", bias), view("weight_scale", weight_scale), scale,
       inverse_scale, static_cast<dinov2_fast::Form>(form), view("out", out)},
      device.stream);
}

void attention_forward(const TorchTensor& qkv, const TorchTensor& out, const Optional& lse) {
  const OnDevice device(qkv);
  dinov2_fast::attention_forward({view("qkv", qkv), view("out", out), view("lse", lse)}, device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY(dinov2_fast_cuda, library) {
  library.def(
      "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_scale, float scale, float inverse_scale, "
      "int form, Tensor(a!) out) -> ()");
  library.def("attention_forward(Tensor qkv, Tensor(a!) out, Tensor(b!)? lse) -> ()");
}

#ifdef DINOV2_FAST_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(dinov2_fast_cuda, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(dinov2_fast_cuda, CUDA, library) {
#endif
  library.impl("linear_forward", TORCH_BOX(&linear_forward));
  library.impl("attention_forward", TORCH_BOX(&attention_forward));
}
