// The launcher of linear.cu and its checks: plain C++, as checks.h.
#pragma once

#include <cstdint>
#include <limits>

#include "checks.h"
#include "linear_tiles.h"

namespace dinov2_fast {

struct LinearForward {
  Tensor x;              // (rows, in_features): bf16, fp16 or e4m3
  Tensor weight;         // (out_features, in_features), as x; gate and value rows in turn for SwiGLU
  Tensor bias;           // (out_features,), bf16, fp16 or fp32, or left out
  Tensor weight_scale;   // (out_features,), fp32: of each row of weight, if that is e4m3
  double scale;          // dequantisation factor of all of x
  double inverse_scale;  // of an e4m3 result
  Form form;
  Tensor out;  // (rows, out_features), half as wide for SwiGLU; the residual form adds to it in place
};
void linear_forward(const LinearForward& args, void* stream);

// With TILES[tile], for operands of a dtype; linear_<dtype>.cu has it.
template <Dtype OPERAND>
void launch_linear(const LinearForward& args, int tile, int multiprocessors, void* stream);

// TMA reads rows of a multiple of 16 bytes, and a thread of the epilogue writes 8 neighbouring columns.
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
  if (e4m3 != bool(args.weight_scale)) fail("weight_scale goes with e4m3 operands, which need it");
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
  if (!e4m3 && args.form == Form::none) fail("a linear of bf16 or fp16 with nothing behind it is cuBLAS' to compute");
  check_matrix(args.out, rows, out_features / pair, x.device);
}

}  // namespace dinov2_fast
