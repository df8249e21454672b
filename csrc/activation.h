// Checks and shapes that the forward and the backward of the activations share.
#pragma once

#include "ops.h"

namespace dinov2_fast {

inline void check_activation(const Tensor& x, const Tensor& bias, bool swiglu) {
  check_dtype(x, {Dtype::bf16, Dtype::fp16, Dtype::fp32});
  if (x.dim != 2) fail(x.name, " must have two dimensions, got ", shape(x));
  const int64_t multiple = swiglu ? 16 : 8;
  if (x.columns() % multiple || x.columns() == 0) {
    fail(x.name, " must have columns in a multiple of ", multiple, ", got ", x.columns());
  }
  check_matrix(x, x.rows(), x.columns(), x.device);
  if (!bias) return;
  check_dtype(bias, {x.dtype});
  check_vector(bias, x.columns(), x.device);
}

// How a block's threads lie over a (rows, columns) matrix in chunks of 8 columns: `across` side by side, `down` below
// one another.
struct BlockShape {
  int across, down;
};

inline BlockShape block_shape(int64_t chunks, int threads) {
  constexpr int WARP = 32;
  int across = threads;
  if (chunks <= threads) {
    across = static_cast<int>((chunks + WARP - 1) / WARP) * WARP;
  } else {
    for (int width = threads; width >= threads / 2; width -= WARP) {  // without idle threads, where it can be
      if (chunks % width == 0) {
        across = width;
        break;
      }
    }
  }
  return {across, threads / across};
}

}  // namespace dinov2_fast
