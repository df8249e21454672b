// The launcher of linear.cu and its checks. Plain C++, like checks.h.
#pragma once

#include <cstdint>
#include <limits>

#include "checks.h"
#include "linear_tiles.h"

namespace dinov2_fast {

struct LinearForward {
  Tensor x;              // (rows, in_features): bf16, fp16 or e4m3
  Tensor weight;         // (out_features, in_features), in the dtype of x; for SwiGLU gate and value rows in turn
  Tensor bias;           // (out_features,), bf16, fp16 or fp32. Optional.
  Tensor weight_scale;   // (out_features,), fp32, the scale of each row of weight; with e4m3 operands only
  double scale;          // the dequantisation factor of x
  double inverse_scale;  // 1 / the scale of an e4m3 result
  Form form;
  Tensor out;  // (rows, out_features), for SwiGLU (rows, out_features / 2); the residual form adds to it in place
};
void linear_forward(const LinearForward& args, void* stream);

// The launch with TILES[tile] for operands of one dtype, defined in linear_<dtype>.cu.
template <Dtype OPERAND>
void launch_linear(const LinearForward& args, int tile, int multiprocessors, void* stream);

// TMA reads rows whose size is a multiple of 16 bytes, and a thread of the epilogue writes 8 neighbouring columns.
inline void check_linear(const LinearForward& args) {
  const Tensor& x = args.x;
  const bool e4m3 = x.dtype == Dtype::e4m3;
  check_dtype(x, {Dtype::bf16, Dtype::fp16, Dtype::e4m3});
  check_dtype(args.weight, {x.dtype});
  const int64_t rows = x.sizes[0], in_features = x.sizes[1], out_features = args.weight.sizes[0];
  check_matrix(x, rows, in_features, x.device);
  check_matrix(args.weight, out_features, in_features, x.device);
  for (const Tensor* operand : {&x, &args.weight}) {
    const int64_t start = reinterpret_cast<uintptr_t>(operand->data), stride = operand->row_stride();
    if (start % 16 || stride * item_size(x.dtype) % 16 || stride < in_features) {
      fail(operand->name, " must have rows that start at multiples of 16 bytes and do not overlap");
    }
  }
  if (rows > std::numeric_limits<int>::max() || out_features > std::numeric_limits<int>::max()) {
    fail("x and weight must have less than 2^31 rows, got ", rows, " and ", out_features);
  }
  const int64_t step = 16 / item_size(x.dtype), pair = args.form == Form::swiglu ? 2 : 1;
  if (in_features == 0 || in_features % step) fail("in_features must be a multiple of ", step, ", got ", in_features);
  if (out_features == 0 || out_features % (8 * pair)) {
    fail("out_features must be a multiple of ", 8 * pair, ", got ", out_features);
  }
  if (args.bias) {
    check_dtype(args.bias, {Dtype::bf16, Dtype::fp16, Dtype::fp32});
    check_vector(args.bias, out_features, x.device);
  }
  if (e4m3 != bool(args.weight_scale)) fail("weight_scale must be given for e4m3 operands, and for no others");
  if (args.weight_scale) {
    check_dtype(args.weight_scale, {Dtype::fp32});
    check_vector(args.weight_scale, out_features, x.device);
  }
  const Dtype narrow = e4m3 ? Dtype::bf16 : x.dtype;
  if (args.form == Form::residual) {
    check_dtype(args.out, {narrow, Dtype::fp32});
    if (rows > 1 && args.out.row_stride() < out_features) fail(args.out.name, " must have rows that do not overlap");
  } else if (e4m3 && is_activation(args.form)) {
    check_dtype(args.out, {narrow, Dtype::e4m3});
  } else {
    check_dtype(args.out, {narrow});
  }
  if (!e4m3 && args.form == Form::none) fail("the form none takes e4m3 operands only: for bf16 and fp16 use cuBLAS");
  check_matrix(args.out, rows, out_features / pair, x.device);
}

}  // namespace dinov2_fast
