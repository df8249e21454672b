// The only file that knows torch, by its stable ABI alone: one build serves every torch from 2.10 on. It registers the
// launchers as torch.ops.dinov2_fast_cuda.<name>, without autograd and without outputs of their own: what they write is
// handed in, and stands in the schema as mutated. dinov2_fast/ops calls them; dinov2_fast/extension.py loads this.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "linear.h"
#include "ops.h"

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
  for (int d = 0; d < view.dim && d < 2; ++d) {
    view.sizes[d] = tensor.size(d);
    view.strides[d] = tensor.stride(d);
  }
  view.given = true;
  return view;
}

dinov2_fast::Tensor view(const char* name, const Optional& tensor) {
  return tensor ? view(name, *tensor) : dinov2_fast::Tensor{name};
}

// While it lives, the device of a tensor is the current one; `stream` is torch's current stream there.
class OnDevice {
 public:
#ifdef DINOV2_FAST_ON_HOST
  explicit OnDevice(const TorchTensor&) {}
#else
  explicit OnDevice(const TorchTensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
  dinov2_fast::Stream stream = nullptr;

#ifndef DINOV2_FAST_ON_HOST
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// layer_norm

void layer_norm_forward(const TorchTensor& x, const Optional& branch, const Optional& gamma, const Optional& drop_scale,
                        const Optional& deferred_bias, const TorchTensor& weight, const TorchTensor& bias, double eps,
                        int64_t rows_per_picture, double inverse_scale, const Optional& total, const TorchTensor& y,
                        const Optional& mean, const Optional& rstd, const Optional& row_scale) {
  const OnDevice device(x);
  dinov2_fast::layer_norm_forward(
      {view("x", x), view("branch", branch), view("gamma", gamma), view("drop_scale", drop_scale),
       view("deferred_bias", deferred_bias), view("weight", weight), view("bias", bias), eps, rows_per_picture,
       inverse_scale, view("total", total), view("y", y), view("mean", mean), view("rstd", rstd),
       view("row_scale", row_scale)},
      device.stream);
}

void layer_norm_backward(const TorchTensor& dy, const Optional& dtotal, const TorchTensor& x, const Optional& branch,
                         const Optional& gamma, const Optional& drop_scale, const TorchTensor& weight,
                         const TorchTensor& mean, const TorchTensor& rstd, int64_t rows_per_picture,
                         const TorchTensor& dx, const Optional& dbranch, const TorchTensor& partial) {
  const OnDevice device(x);
  dinov2_fast::layer_norm_backward(
      {view("dy", dy), view("dtotal", dtotal), view("x", x), view("branch", branch), view("gamma", gamma),
       view("drop_scale", drop_scale), view("weight", weight), view("mean", mean), view("rstd", rstd), rows_per_picture,
       view("dx", dx), view("dbranch", dbranch), view("partial", partial)},
      device.stream);
}

// activation

void activation_forward(const TorchTensor& x, const Optional& bias, bool swiglu, double inverse_scale,
                        const TorchTensor& y) {
  const OnDevice device(x);
  dinov2_fast::activation_forward({view("x", x), view("bias", bias), swiglu, inverse_scale, view("y", y)},
                                  device.stream);
}

void activation_backward(const TorchTensor& dy, const TorchTensor& x, const Optional& bias, bool swiglu,
                         const TorchTensor& dx, const Optional& partial) {
  const OnDevice device(x);
  dinov2_fast::activation_backward(
      {view("dy", dy), view("x", x), view("bias", bias), swiglu, view("dx", dx), view("partial", partial)},
      device.stream);
}

// linear

void linear_forward(const TorchTensor& x, const TorchTensor& weight, const Optional& bias, const Optional& weight_scale,
                    double scale, double inverse_scale, int64_t form, const TorchTensor& out) {
  if (form < 0 || form > 3) {
    dinov2_fast::fail("form must be 0 (linear), 1 (gelu), 2 (swiglu) or 3 (residual), got ", form);
  }
  const OnDevice device(x);
  dinov2_fast::linear_forward(
      {view("x", x), view("weight", weight), view("bias", bias), view("weight_scale", weight_scale), scale,
       inverse_scale, static_cast<dinov2_fast::Form>(form), view("out", out)},
      device.stream);
}

}  // namespace

STABLE_TORCH_LIBRARY(dinov2_fast_cuda, library) {
  library.def(
      "layer_norm_forward(Tensor x, Tensor? branch, Tensor? gamma, Tensor? drop_scale, Tensor? deferred_bias, "
      "Tensor weight, Tensor bias, float eps, int rows_per_picture, float inverse_scale, Tensor(a!)? total, "
      "Tensor(b!) y, Tensor(c!)? mean, Tensor(d!)? rstd, Tensor(e!)? row_scale) -> ()");
  library.def(
      "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor? branch, Tensor? gamma, Tensor? drop_scale, "
      "Tensor weight, Tensor mean, Tensor rstd, int rows_per_picture, Tensor(a!) dx, Tensor(b!)? dbranch, "
      "Tensor(c!) partial) -> ()");
  library.def("activation_forward(Tensor x, Tensor? bias, bool swiglu, float inverse_scale, Tensor(a!) y) -> ()");
  library.def(
      "activation_backward(Tensor dy, Tensor x, Tensor? bias, bool swiglu, Tensor(a!) dx, Tensor(b!)? partial) -> ()");
  library.def(
      "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_scale, float scale, float inverse_scale, "
      "int form, Tensor(a!) out) -> ()");
}

#ifdef DINOV2_FAST_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(dinov2_fast_cuda, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(dinov2_fast_cuda, CUDA, library) {
#endif
  library.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  library.impl("activation_forward", TORCH_BOX(&activation_forward));
  library.impl("activation_backward", TORCH_BOX(&activation_backward));
  library.impl("linear_forward", TORCH_BOX(&linear_forward));
}
