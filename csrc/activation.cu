// GELU and SwiGLU between the linears of a feed-forward network, with the first one's bias if it is left to them.
//
// A thread has a chunk of 8 columns in ROWS rows: its loads are all issued before the first is used, and the bias is
// read once. GELU is the polynomial one where the result is rounded to bf16 or e4m3, else that with the error function.
#include "activation.h"
#include "common.cuh"

namespace dinov2_fast {
namespace {

constexpr int THREADS = 256, ROWS = 4;

template <typename X, typename Y>
struct Arguments {
  const X *x, *bias;
  Y* y;
  int64_t rows, hidden, x_stride;
  float inverse_scale;
};

template <typename Y>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (std::is_same_v<Y, __nv_bfloat16> || std::is_same_v<Y, __nv_fp8_e4m3>) {
    return gelu_polynomial(x);
  } else {
    return gelu_erf(x);
  }
}

template <typename X, typename Y, bool SWIGLU>
__global__ void __launch_bounds__(THREADS) activation_forward_kernel(const Arguments<X, Y> p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  if (column >= p.hidden) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * ROWS + threadIdx.y;

  Chunk<X> chunk[ROWS], values[SWIGLU ? ROWS : 1];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row < p.rows) chunk[r] = read(p.x + row * p.x_stride + column);
    if constexpr (SWIGLU) {
      if (row < p.rows) values[r] = read(p.x + row * p.x_stride + p.hidden + column);
    }
  }
  float bias[WIDTH] = {}, value_bias[WIDTH] = {};
  if (p.bias) load(p.bias + column, bias);
  if (SWIGLU && p.bias) load(p.bias + p.hidden + column, value_bias);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= p.rows) continue;
    float x[WIDTH], value[WIDTH];
    unpack(chunk[r], x);
    if constexpr (SWIGLU) unpack(values[r], value);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      x[i] += bias[i];
      x[i] = SWIGLU ? silu(x[i]) * (value[i] + value_bias[i]) : gelu<Y>(x[i]);
      x[i] *= p.inverse_scale;  // 1 but for e4m3
    }
    store(p.y + row * p.hidden + column, x);
  }
}

template <typename X, typename Y, bool SWIGLU>
void launch_forward(const ActivationForward& args, Stream stream) {
  Arguments<X, Y> p{};
  p.x = pointer<X>(args.x);
  p.bias = pointer<X>(args.bias);
  p.y = pointer<Y>(args.y);
  p.rows = args.x.rows();
  p.hidden = args.y.columns();
  p.x_stride = args.x.row_stride();
  p.inverse_scale = static_cast<float>(args.inverse_scale);
  const BlockShape shape = block_shape(p.hidden / WIDTH, THREADS);
  const dim3 grid = grid_of(ceil_div(p.rows, shape.down * ROWS), ceil_div(p.hidden, shape.across * WIDTH));
  launch(activation_forward_kernel<X, Y, SWIGLU>, grid, dim3(shape.across, shape.down), stream, p);
}

template <typename X, typename Y>
void launch_forward(const ActivationForward& args, Stream stream) {
  if (args.swiglu) {
    launch_forward<X, Y, true>(args, stream);
  } else {
    launch_forward<X, Y, false>(args, stream);
  }
}

}  // namespace

void activation_forward(const ActivationForward& args, Stream stream) {
  check_activation(args.x, args.bias, args.swiglu);
  check_dtype(args.y, {args.x.dtype, Dtype::e4m3});
  check_output(args.y, args.x.rows(), args.x.columns() / (args.swiglu ? 2 : 1), args.x.device);
  if (args.x.rows() == 0) return;
  with_float(args.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (args.y.dtype == Dtype::e4m3) return launch_forward<X, __nv_fp8_e4m3>(args, stream);
    return launch_forward<X, X>(args, stream);
  });
}

}  // namespace dinov2_fast
