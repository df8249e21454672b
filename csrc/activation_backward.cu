// The gradients of GELU and SwiGLU, recomputed from what went in.
//
// A thread walks down the rows of its 8 columns in steps of the grid and keeps the bias gradient in registers; a block
// writes its partial sums once, in one order and without atomics, and the caller adds those of all blocks.
#include "activation.h"
#include "common.cuh"

namespace dinov2_fast {
namespace {

constexpr int THREADS = 256;
constexpr float INVERSE_ROOT_OF_2_PI = 0.39894228040143268f;

template <typename X>
struct Arguments {
  const X *dy, *x, *bias;
  X* dx;
  float* partial;
  int64_t rows, hidden, dy_stride, x_stride;
};

template <typename X>
__device__ __forceinline__ float gelu_gradient(float x) {
  if constexpr (std::is_same_v<X, __nv_bfloat16>) {
    return normal_cdf_polynomial(x) + x * fast_exp(-0.5f * x * x) * INVERSE_ROOT_OF_2_PI;
  } else {
    return normal_cdf_erf(x) + x * expf(-0.5f * x * x) * INVERSE_ROOT_OF_2_PI;
  }
}

template <typename X, bool SWIGLU>
__global__ void __launch_bounds__(THREADS) activation_backward_kernel(const Arguments<X> p) {
  __shared__ float scratch[THREADS * WIDTH];
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
  const int64_t width = SWIGLU ? 2 * p.hidden : p.hidden;
  const bool inside = column < p.hidden;

  float bias[WIDTH] = {}, value_bias[WIDTH] = {}, dbias[WIDTH] = {}, dvalue_bias[WIDTH] = {};
  if (inside && p.bias) load(p.bias + column, bias);
  if (SWIGLU && inside && p.bias) load(p.bias + p.hidden + column, value_bias);

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; inside && row < p.rows; row += step) {
    float dy[WIDTH], x[WIDTH];
    load(p.dy + row * p.dy_stride + column, dy);
    load(p.x + row * p.x_stride + column, x);
    if constexpr (SWIGLU) {
      float value[WIDTH];
      load(p.x + row * p.x_stride + p.hidden + column, value);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        x[i] += bias[i];
        const float gate = sigmoid(x[i]);
        const float dx = dy[i] * (value[i] + value_bias[i]) * gate * (1 + x[i] * (1 - gate));
        value[i] = dy[i] * x[i] * gate;
        x[i] = dx;
        dvalue_bias[i] += value[i];
      }
      store(p.dx + row * width + p.hidden + column, value);
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) x[i] = dy[i] * gelu_gradient<X>(x[i] + bias[i]);
    }
    store(p.dx + row * width + column, x);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) dbias[i] += x[i];
  }

  if (!p.partial) return;  // all threads
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * width + column;
  write_block_sum(dbias, partial, inside, scratch);
  if constexpr (SWIGLU) write_block_sum(dvalue_bias, partial + p.hidden, inside, scratch);
}

template <typename X, bool SWIGLU>
void launch_backward(const ActivationBackward& args, Stream stream) {
  Arguments<X> p{};
  p.dy = pointer<X>(args.dy);
  p.x = pointer<X>(args.x);
  p.bias = pointer<X>(args.bias);
  p.dx = pointer<X>(args.dx);
  p.partial = pointer<float>(args.partial);
  p.rows = args.x.rows();
  p.hidden = args.dy.columns();
  p.dy_stride = args.dy.row_stride();
  p.x_stride = args.x.row_stride();
  const BlockShape shape = block_shape(p.hidden / WIDTH, THREADS);
  const int64_t blocks = args.partial ? args.partial.rows() : ceil_div(p.rows, shape.down);
  const dim3 grid = grid_of(blocks, ceil_div(p.hidden, shape.across * WIDTH));
  launch(activation_backward_kernel<X, SWIGLU>, grid, dim3(shape.across, shape.down), stream, p);
}

void check(const ActivationBackward& args) {
  check_activation(args.x, args.bias, args.swiglu);
  const int64_t rows = args.x.rows(), columns = args.x.columns();
  check_dtype(args.dy, {args.x.dtype});
  check_matrix(args.dy, rows, columns / (args.swiglu ? 2 : 1), args.x.device);
  check_dtype(args.dx, {args.x.dtype});
  check_output(args.dx, rows, columns, args.x.device);
  if (args.partial.given != args.bias.given) fail("bias and partial go together");
  if (!args.partial) return;
  check_dtype(args.partial, {Dtype::fp32});
  check_output(args.partial, args.partial.rows(), columns, args.x.device);
}

}  // namespace

void activation_backward(const ActivationBackward& args, Stream stream) {
  check(args);
  if (args.x.rows() == 0) return;
  with_float(args.x.dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (args.swiglu) return launch_backward<X, true>(args, stream);
    return launch_backward<X, false>(args, stream);
  });
}

}  // namespace dinov2_fast
