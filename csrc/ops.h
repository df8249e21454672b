// The launchers that bindings.cpp calls: plain C++, one struct of arguments for each. All throw a sentence where a
// tensor is not what they take (checks.h) and where CUDA refuses the launch; none synchronises or allocates.
#pragma once

#include <cstdint>

#include "checks.h"

namespace dinov2_fast {

using Stream = void*;  // a cudaStream_t

constexpr int64_t MAX_HIDDEN = 2048;  // of layer_norm: a row is kept in the registers of a warp

struct LayerNormForward {
  Tensor x;              // (rows, hidden): the residual stream if there is a branch
  Tensor branch;         // (rows, hidden) or left out
  Tensor gamma;          // (hidden,) or left out, as are the next two
  Tensor drop_scale;     // (pictures,)
  Tensor deferred_bias;  // (hidden,)
  Tensor weight, bias;   // (hidden,)
  double eps;
  int64_t rows_per_picture;
  double inverse_scale;  // of a static e4m3 scale
  Tensor total;          // out, (rows, hidden): the sum; left out without a branch
  Tensor y;              // out, (rows, hidden): in the dtype of x, or e4m3
  Tensor mean, rstd;     // out, (rows,), fp32, or left out
  Tensor row_scale;      // out, (rows,), fp32: scales of the rows in e4m3, or left out for a static scale
};
void layer_norm_forward(const LayerNormForward& args, Stream stream);

struct LayerNormBackward {
  Tensor dy;          // (rows, hidden)
  Tensor dtotal;      // (rows, hidden): the gradient of the sum itself, or left out
  Tensor x;           // (rows, hidden): what was normalised
  Tensor branch;      // (rows, hidden) or left out
  Tensor gamma;       // (hidden,) or left out
  Tensor drop_scale;  // (pictures,) or left out
  Tensor weight;      // (hidden,)
  Tensor mean, rstd;  // (rows,), fp32
  int64_t rows_per_picture;
  Tensor dx;       // out, (rows, hidden)
  Tensor dbranch;  // out, (rows, hidden); left out without a branch
  Tensor partial;  // out, (blocks, sums * hidden), fp32, sums: weight, bias; with a branch gamma, deferred bias
};
void layer_norm_backward(const LayerNormBackward& args, Stream stream);

struct ActivationForward {
  Tensor x;     // (rows, hidden), for SwiGLU (rows, 2 * hidden), the gate first
  Tensor bias;  // (columns of x,) or left out
  bool swiglu;
  double inverse_scale;  // of e4m3
  Tensor y;              // out, (rows, hidden): in the dtype of x, or e4m3
};
void activation_forward(const ActivationForward& args, Stream stream);

struct ActivationBackward {
  Tensor dy;    // (rows, hidden)
  Tensor x;     // as in the forward
  Tensor bias;  // as in the forward
  bool swiglu;
  Tensor dx;       // out, as x
  Tensor partial;  // out, (blocks, columns of x), fp32: sums for the bias; left out without a bias
};
void activation_backward(const ActivationBackward& args, Stream stream);

}  // namespace dinov2_fast
