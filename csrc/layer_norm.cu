// Layer normalisation, alone or after the residual addition, in one pass over the stream.
//
// A warp holds a row in registers, so that mean and variance are taken in two passes without reading twice, and no
// block-wide step is needed. What is normalised is the sum as it is stored: the backward, which reads it again, sees
// the same numbers.
#include "common.cuh"
#include "layer_norm.h"

namespace dinov2_fast {
namespace {

constexpr int WARPS = 4;  // of a block; each has a row of its own

template <typename X, typename Branch, typename Y>
struct Arguments {
  const X* x;
  const Branch* branch;
  const X *gamma, *drop_scale, *deferred_bias, *weight, *bias;
  X* total;
  Y* y;
  float *mean, *rstd, *row_scale;
  int64_t rows, hidden, x_stride, branch_stride, rows_per_picture;
  float eps, inverse_scale;
};

// Adds the branch to the elements of `x` at one chunk's columns.
template <typename X, typename Branch, typename Y>
__device__ __forceinline__ void add_branch(const Arguments<X, Branch, Y>& p, const Chunk<Branch>& chunk,
                                           float drop_scale, int column, float (&x)[WIDTH]) {
  float branch[WIDTH], vector[WIDTH];
  unpack(chunk, branch);
  if (p.gamma) {
    load(p.gamma + column, vector);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) branch[i] *= vector[i];
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] += branch[i] * drop_scale;
  if (p.deferred_bias) {
    load(p.deferred_bias + column, vector);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] += vector[i];
  }
}

// Normalises in place; returns the mean and the reciprocal standard deviation. Columns past the end stay zero.
template <int CHUNKS>
__device__ __forceinline__ float2 normalise(float (&x)[CHUNKS][WIDTH], int lane, int hidden, float eps) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum += x[c][i];
  }
  const float mean = warp_sum(sum) / hidden;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const bool inside = (c * WARP + lane) * WIDTH < hidden;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      x[c][i] = inside ? x[c][i] - mean : 0;
      squares += x[c][i] * x[c][i];
    }
  }
  const float rstd = reciprocal_root(warp_sum(squares) / hidden + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[c][i] *= rstd;
  }
  return make_float2(mean, rstd);
}

template <typename X, typename Branch, typename Y, int CHUNKS>
__global__ void __launch_bounds__(WARPS* WARP, 2) layer_norm_forward_kernel(const Arguments<X, Branch, Y> p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP, hidden = static_cast<int>(p.hidden);
  if (row >= p.rows) return;  // a whole warp

  float x[CHUNKS][WIDTH] = {};
  {
    Chunk<X> chunk[CHUNKS];  // all loads are issued before the first is used
    Chunk<Branch> branch[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (c * WARP + lane) * WIDTH;
      if (column < hidden) chunk[c] = read(p.x + row * p.x_stride + column);
      if (column < hidden && p.branch) branch[c] = read(p.branch + row * p.branch_stride + column);
    }
    const float drop_scale = p.drop_scale ? to_float(p.drop_scale[row / p.rows_per_picture]) : 1;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (c * WARP + lane) * WIDTH;
      if (column >= hidden) continue;
      unpack(chunk[c], x[c]);
      if (!p.branch) continue;
      add_branch(p, branch[c], drop_scale, column, x[c]);
      const Chunk<X> total = pack<X>(x[c]);
      write(p.total + row * p.hidden + column, total);
      unpack(total, x[c]);
    }
  }

  const float2 statistics = normalise(x, lane, hidden, p.eps);
  if (lane == 0 && p.mean) {
    p.mean[row] = statistics.x;
    p.rstd[row] = statistics.y;
  }

  float largest = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * WIDTH;
    if (column >= hidden) continue;
    float weight[WIDTH], bias[WIDTH];
    load(p.weight + column, weight);
    load(p.bias + column, bias);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      x[c][i] = x[c][i] * weight[i] + bias[i];
      largest = fmaxf(largest, fabsf(x[c][i]));
    }
  }
  float scale = p.inverse_scale;  // 1 but for e4m3
  if (p.row_scale) {
    const float row_scale = e4m3_row_scale(warp_max(largest));
    if (lane == 0) p.row_scale[row] = row_scale;
    scale = 1 / row_scale;
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * WIDTH;
    if (column >= hidden) continue;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[c][i] *= scale;
    store(p.y + row * p.hidden + column, x[c]);
  }
}

template <typename X, typename Branch, typename Y>
void launch_forward(const LayerNormForward& args, Stream stream) {
  Arguments<X, Branch, Y> p{};
  p.x = pointer<X>(args.x);
  p.branch = pointer<Branch>(args.branch);
  p.gamma = pointer<X>(args.gamma);
  p.drop_scale = pointer<X>(args.drop_scale);
  p.deferred_bias = pointer<X>(args.deferred_bias);
  p.weight = pointer<X>(args.weight);
  p.bias = pointer<X>(args.bias);
  p.total = pointer<X>(args.total);
  p.y = pointer<Y>(args.y);
  p.mean = pointer<float>(args.mean);
  p.rstd = pointer<float>(args.rstd);
  p.row_scale = pointer<float>(args.row_scale);
  p.rows = args.x.rows();
  p.hidden = args.x.columns();
  p.x_stride = args.x.row_stride();
  p.branch_stride = args.branch ? args.branch.row_stride() : 0;
  p.rows_per_picture = args.rows_per_picture;
  p.eps = static_cast<float>(args.eps);
  p.inverse_scale = static_cast<float>(args.inverse_scale);

  auto kernel = layer_norm_forward_kernel<X, Branch, Y, MAX_HIDDEN / (WARP * WIDTH)>;
  if (p.hidden <= 512) {
    kernel = layer_norm_forward_kernel<X, Branch, Y, 2>;
  } else if (p.hidden <= 1024) {
    kernel = layer_norm_forward_kernel<X, Branch, Y, 4>;
  }
  launch(kernel, grid_of(ceil_div(p.rows, WARPS)), dim3(WARPS * WARP), stream, p);
}

template <typename X, typename Branch>
void launch_forward(const LayerNormForward& args, Stream stream) {
  if (args.y.dtype == Dtype::e4m3) {
    launch_forward<X, Branch, __nv_fp8_e4m3>(args, stream);
  } else {
    launch_forward<X, Branch, X>(args, stream);
  }
}

void check(const LayerNormForward& args) {
  const int64_t rows = args.x.rows(), hidden = args.x.columns();
  const int device = args.x.device;
  const Dtype dtype = args.x.dtype;
  check_dtype(args.x, {Dtype::bf16, Dtype::fp16, Dtype::fp32});
  check_hidden(args.x);
  check_matrix(args.x, rows, hidden, device);
  for (const Tensor* vector : {&args.weight, &args.bias, &args.gamma, &args.deferred_bias}) {
    if (!*vector && vector != &args.weight && vector != &args.bias) continue;
    check_dtype(*vector, {dtype});
    check_vector(*vector, hidden, device);
  }
  if (args.branch) {
    check_branch(args.x, args.branch);
    check_dtype(args.total, {dtype});
    check_output(args.total, rows, hidden, device);
  } else if (args.gamma || args.drop_scale || args.deferred_bias || args.total) {
    fail("gamma, drop_scale, deferred_bias and total go with a branch");
  }
  check_drop_scale(args.drop_scale, args.x, args.rows_per_picture);
  check_dtype(args.y, {dtype, Dtype::e4m3});
  check_output(args.y, rows, hidden, device);
  if (args.mean.given != args.rstd.given) fail("mean and rstd go together");
  if (args.row_scale && args.y.dtype != Dtype::e4m3) fail("row_scale goes with a y of e4m3");
  for (const Tensor* statistic : {&args.mean, &args.rstd, &args.row_scale}) {
    if (!*statistic) continue;
    check_dtype(*statistic, {Dtype::fp32});
    check_vector(*statistic, rows, device, /*aligned=*/false);
  }
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args, Stream stream) {
  check(args);
  if (args.x.rows() == 0) return;
  with_float(args.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (!args.branch || args.branch.dtype == args.x.dtype) return launch_forward<X, X>(args, stream);
    if constexpr (std::is_same_v<X, float>) {  // a stream in fp32, and what is added to it in half precision
      if (args.branch.dtype == Dtype::bf16) return launch_forward<X, __nv_bfloat16>(args, stream);
      return launch_forward<X, __half>(args, stream);
    }
  });
}

}  // namespace dinov2_fast
