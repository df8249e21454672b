// Checks that the forward and the backward of layer_norm share.
#pragma once

#include "ops.h"

namespace dinov2_fast {

inline void check_hidden(const Tensor& x) {
  if (x.dim != 2) fail(x.name, " must have the shape (rows, hidden), got ", shape(x));
  if (x.columns() % 8 || x.columns() < 8 || x.columns() > MAX_HIDDEN) {
    fail(x.name, " must have a hidden size that is a multiple of 8, up to ", MAX_HIDDEN, ", got ", x.columns());
  }
}

// A branch in the dtype of the stream, or in half precision beside one in fp32.
inline void check_branch(const Tensor& x, const Tensor& branch) {
  if (x.dtype == Dtype::fp32) {
    check_dtype(branch, {Dtype::fp32, Dtype::bf16, Dtype::fp16});
  } else {
    check_dtype(branch, {x.dtype});
  }
  check_matrix(branch, x.rows(), x.columns(), x.device);
}

inline void check_drop_scale(const Tensor& drop_scale, const Tensor& x, int64_t rows_per_picture) {
  if (!drop_scale) return;
  if (rows_per_picture < 1 || x.rows() % rows_per_picture) {
    fail("rows_per_picture must divide the ", x.rows(), " rows of ", x.name, ", got ", rows_per_picture);
  }
  check_dtype(drop_scale, {x.dtype});
  check_vector(drop_scale, x.rows() / rows_per_picture, x.device, /*aligned=*/false);
}

}  // namespace dinov2_fast
