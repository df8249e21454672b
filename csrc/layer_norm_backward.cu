// The gradients of layer normalisation, alone or after the residual addition.
//
// A block takes several rows at once, each by whole warps of which a thread holds 8 columns, and walks over all rows in
// steps of the grid. The sums over rows (for weight, bias, LayerScale and deferred bias) stay in registers; a block
// writes its partial sums once, in one order and without atomics, and the caller adds those of all blocks.
#include "common.cuh"
#include "layer_norm.h"

namespace dinov2_fast {
namespace {

constexpr int THREADS = 256;  // of a block: a row of MAX_HIDDEN, or as many rows as fit
static_assert(THREADS * WIDTH == MAX_HIDDEN);

template <typename X, typename Branch>
struct Arguments {
  const X *dy, *dtotal, *x;
  const Branch* branch;
  const X *gamma, *drop_scale, *weight;
  const float *mean, *rstd;
  X* dx;
  Branch* dbranch;
  float* partial;
  int64_t rows, hidden, dy_stride, dtotal_stride, x_stride, branch_stride, rows_per_picture;
};

// The sum over the threads of a row, of two numbers. `warp_sums` holds a pair for each warp of the block; it has to be
// another one in the next call.
__device__ __forceinline__ float2 row_sum(float2 x, float2* warp_sums) {
  const int warps = blockDim.x / WARP, first = threadIdx.y * warps;
  x.x = warp_sum(x.x);
  x.y = warp_sum(x.y);
  if (threadIdx.x % WARP == 0) warp_sums[first + threadIdx.x / WARP] = x;
  __syncthreads();
  float2 sum = make_float2(0, 0);
  for (int w = 0; w < warps; ++w) {
    sum.x += warp_sums[first + w].x;
    sum.y += warp_sums[first + w].y;
  }
  return sum;
}

template <typename X, typename Branch, bool WITH_BRANCH>
__global__ void __launch_bounds__(THREADS) layer_norm_backward_kernel(const Arguments<X, Branch> p) {
  __shared__ float2 warp_sums[2][THREADS / WARP];
  __shared__ float scratch[THREADS * WIDTH];
  const int hidden = static_cast<int>(p.hidden), column = threadIdx.x * WIDTH;
  const bool inside = column < hidden;

  float weight[WIDTH] = {}, gamma[WIDTH];
  float dweight[WIDTH] = {}, dbias[WIDTH] = {}, dgamma[WIDTH] = {}, ddeferred[WIDTH] = {};
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) gamma[i] = 1;
  if (inside) load(p.weight + column, weight);
  if (inside && p.gamma) load(p.gamma + column, gamma);

  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool live = inside && row < p.rows;

    float normed[WIDTH] = {}, dx[WIDTH] = {};  // dx is first the gradient of what was normalised
    float mean = 0, rstd = 0;
    float2 sums = make_float2(0, 0);
    if (live) {
      load(p.x + row * p.x_stride + column, normed);
      load(p.dy + row * p.dy_stride + column, dx);
      mean = p.mean[row];
      rstd = p.rstd[row];
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      normed[i] = (normed[i] - mean) * rstd;
      dweight[i] += dx[i] * normed[i];
      dbias[i] += dx[i];
      dx[i] *= weight[i];
      sums.x += dx[i];
      sums.y += dx[i] * normed[i];
    }
    sums = row_sum(sums, warp_sums[turn]);
    turn ^= 1;
    if (!live) continue;

    const float mean_gradient = sums.x / hidden, along = sums.y / hidden;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) dx[i] = (dx[i] - mean_gradient - normed[i] * along) * rstd;
    if (p.dtotal) {
      float dtotal[WIDTH];
      load(p.dtotal + row * p.dtotal_stride + column, dtotal);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dx[i] += dtotal[i];
    }
    store(p.dx + row * p.hidden + column, dx);

    if constexpr (WITH_BRANCH) {
      const float drop_scale = p.drop_scale ? to_float(p.drop_scale[row / p.rows_per_picture]) : 1;
      float branch[WIDTH];
      load(p.branch + row * p.branch_stride + column, branch);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        ddeferred[i] += dx[i];
        dx[i] *= drop_scale;
        dgamma[i] += dx[i] * branch[i];
        dx[i] *= gamma[i];
      }
      store(p.dbranch + row * p.hidden + column, dx);
    }
  }

  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * (WITH_BRANCH ? 4 : 2) * p.hidden + column;
  write_block_sum(dweight, partial, inside, scratch);
  write_block_sum(dbias, partial + p.hidden, inside, scratch);
  if constexpr (WITH_BRANCH) {
    write_block_sum(dgamma, partial + 2 * p.hidden, inside, scratch);
    write_block_sum(ddeferred, partial + 3 * p.hidden, inside, scratch);
  }
}

template <typename X, typename Branch, bool WITH_BRANCH>
void launch_backward(const LayerNormBackward& args, Stream stream) {
  Arguments<X, Branch> p{};
  p.dy = pointer<X>(args.dy);
  p.dtotal = pointer<X>(args.dtotal);
  p.x = pointer<X>(args.x);
  p.branch = pointer<Branch>(args.branch);
  p.gamma = pointer<X>(args.gamma);
  p.drop_scale = pointer<X>(args.drop_scale);
  p.weight = pointer<X>(args.weight);
  p.mean = pointer<float>(args.mean);
  p.rstd = pointer<float>(args.rstd);
  p.dx = pointer<X>(args.dx);
  p.dbranch = pointer<Branch>(args.dbranch);
  p.partial = pointer<float>(args.partial);
  p.rows = args.x.rows();
  p.hidden = args.x.columns();
  p.dy_stride = args.dy.row_stride();
  p.dtotal_stride = args.dtotal ? args.dtotal.row_stride() : 0;
  p.x_stride = args.x.row_stride();
  p.branch_stride = args.branch ? args.branch.row_stride() : 0;
  p.rows_per_picture = args.rows_per_picture;

  const int threads = static_cast<int>(ceil_div(p.hidden, WARP * WIDTH)) * WARP;  // of a row
  const dim3 block(threads, THREADS / threads);
  launch(layer_norm_backward_kernel<X, Branch, WITH_BRANCH>, grid_of(args.partial.rows()), block, stream, p);
}

void check(const LayerNormBackward& args) {
  const int64_t rows = args.x.rows(), hidden = args.x.columns();
  const int device = args.x.device;
  const Dtype dtype = args.x.dtype;
  check_dtype(args.x, {Dtype::bf16, Dtype::fp16, Dtype::fp32});
  check_hidden(args.x);
  for (const Tensor* matrix : {&args.x, &args.dy, &args.dtotal, &args.dx}) {
    if (!*matrix && matrix == &args.dtotal) continue;
    check_dtype(*matrix, {dtype});
    check_matrix(*matrix, rows, hidden, device);
  }
  check_output(args.dx, rows, hidden, device);
  check_dtype(args.weight, {dtype});
  check_vector(args.weight, hidden, device);
  if (args.gamma) {
    check_dtype(args.gamma, {dtype});
    check_vector(args.gamma, hidden, device);
  }
  if (args.branch) {
    check_branch(args.x, args.branch);
    check_dtype(args.dbranch, {args.branch.dtype});
    check_output(args.dbranch, rows, hidden, device);
  } else if (args.gamma || args.drop_scale || args.dbranch) {
    fail("gamma, drop_scale and dbranch go with a branch");
  }
  check_drop_scale(args.drop_scale, args.x, args.rows_per_picture);
  for (const Tensor* statistic : {&args.mean, &args.rstd}) {
    check_dtype(*statistic, {Dtype::fp32});
    check_vector(*statistic, rows, device, /*aligned=*/false);
  }
  check_dtype(args.partial, {Dtype::fp32});
  check_output(args.partial, args.partial.rows(), (args.branch ? 4 : 2) * hidden, device);
}

}  // namespace

void layer_norm_backward(const LayerNormBackward& args, Stream stream) {
  check(args);
  if (args.x.rows() == 0) return;
  with_float(args.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (!args.branch) return launch_backward<X, X, false>(args, stream);
    if (args.branch.dtype == args.x.dtype) return launch_backward<X, X, true>(args, stream);
    if constexpr (std::is_same_v<X, float>) {
      if (args.branch.dtype == Dtype::bf16) return launch_backward<X, __nv_bfloat16, true>(args, stream);
      return launch_backward<X, __half, true>(args, stream);
    }
  });
}

}  // namespace dinov2_fast
