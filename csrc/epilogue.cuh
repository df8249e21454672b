// The epilogue of linear.cu: from the accumulators of the tensor cores to the result in memory.
//
// wgmma distributes a 64-row slice of the product over the 4 warps of a warp group. A group is 8 neighbouring columns.
// Lane l of warp w holds columns 2 (l % 4) and 2 (l % 4) + 1 of each group, of row 16 w + l / 4 and of the row 8 below.
// The 4 lanes that share these rows (a quad) exchange accumulators until each lane holds all 8 columns of its own
// groups. A thread then has neighbouring columns of one row. It reads and writes them at once, and holds both a gate
// and its value.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "linear.h"

namespace dinov2_fast {

// (out_features,), in bf16, fp16 or fp32; not given if `data` is null.
struct ColumnVector {
  const void* data;
  Dtype dtype;
};

struct EpilogueArguments {
  void* out;
  Dtype out_dtype;
  int64_t out_stride;  // elements from row to row
  int64_t rows;
  int64_t out_features;
  ColumnVector bias;
  const float* weight_scale;  // (out_features,), for e4m3 operands, else null
  float scale;
  float inverse_scale;
};

inline EpilogueArguments epilogue_of(const LinearForward& args) {
  return {args.out.data,
          args.out.dtype,
          args.out.row_stride(),
          args.x.rows(),
          args.weight.rows(),
          {args.bias.data, args.bias.dtype},
          pointer<float>(args.weight_scale),
          static_cast<float>(args.scale),
          static_cast<float>(args.inverse_scale)};
}

__device__ __forceinline__ void load(const ColumnVector& vector, int64_t column, float (&to)[WIDTH]) {
  if (vector.dtype == Dtype::bf16) {
    load(static_cast<const __nv_bfloat16*>(vector.data) + column, to);
  } else if (vector.dtype == Dtype::fp16) {
    load(static_cast<const __half*>(vector.data) + column, to);
  } else {
    load(static_cast<const float*>(vector.data) + column, to);
  }
}

// The scales and biases of 8 columns.
struct Columns {
  float scale[WIDTH], bias[WIDTH];
};

__device__ __forceinline__ Columns read_columns(const EpilogueArguments& args, int64_t column) {
  Columns columns;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    columns.scale[i] = 1.0f;
    columns.bias[i] = 0.0f;
  }
  if (column >= args.out_features) return columns;
  if (args.weight_scale) load(args.weight_scale + column, columns.scale);
  if (args.bias.data) load(args.bias, column, columns.bias);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) columns.scale[i] *= args.scale;
  return columns;
}

template <typename Out>
__device__ __forceinline__ float gelu_for(float x) {
  if constexpr (std::is_same_v<Out, __half>) return gelu_erf(x);
  return gelu_polynomial(x);
}

// SiLU for results of at most 2 bytes.
__device__ __forceinline__ float fast_silu(float x) { return x * fast_reciprocal(1.0f + fast_exp(-x)); }

// Writes 8 columns of one row of the result, from z = x @ weight^T + bias. SwiGLU takes 16 columns of z.
template <Form FORM, typename Out, int CHUNKS>
__device__ __forceinline__ void finish(const float (&z)[CHUNKS][WIDTH], float inverse_scale, Out* to) {
  float y[WIDTH];
  if constexpr (FORM == Form::residual) load(to, y);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    if constexpr (FORM == Form::residual) {
      y[i] += z[0][i];
    } else if constexpr (FORM == Form::swiglu) {
      y[i] = fast_silu(z[2 * i / WIDTH][2 * i % WIDTH]) * z[2 * i / WIDTH][2 * i % WIDTH + 1];
    } else {
      y[i] = FORM == Form::gelu ? gelu_for<Out>(z[0][i]) : z[0][i];
    }
    if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) y[i] *= inverse_scale;
  }
  store_at_once(to, pack<Out>(y));
}

// Writes a tile of ROWS x COLUMNS of the product, whose first element is (tile_row, tile_column). `accumulators(i)` are
// the accumulators of thread `thread` of THREADS: the fastest index runs over two columns, the next over two rows 8
// apart, the next over groups, the last over slices. Slices go to the warp groups in turn.
template <Form FORM, bool SCALED, typename Out, int ROWS, int COLUMNS, int THREADS, typename Accumulators>
__device__ __forceinline__ void write_tile(const Accumulators& accumulators, int thread, int64_t tile_row,
                                           int64_t tile_column, const EpilogueArguments& args) {
  constexpr int GROUPS = COLUMNS / WIDTH, SLICE_ROWS = THREADS / 2, SLICES = ROWS / SLICE_ROWS;
  constexpr int CHUNKS = FORM == Form::swiglu ? 2 : 1;  // neighbouring groups that a lane receives at once
  const int lane = thread % WARP;
  const int64_t first_row = tile_row + 16 * (thread / WARP) + lane / 4;
#pragma unroll
  for (int start = 0; start < GROUPS; start += 4 * CHUNKS) {
    const int64_t column = tile_column + WIDTH * (start + CHUNKS * (lane % 4));
    Columns columns[CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) columns[chunk] = read_columns(args, column + WIDTH * chunk);
#pragma unroll
    for (int half = 0; half < 2 * SLICES; ++half) {
      const int64_t row = first_row + half / 2 * SLICE_ROWS + half % 2 * 8;
      float z[CHUNKS][WIDTH];
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          float own[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int group = start + chunk + CHUNKS * i;
            own[i] = accumulators(((half / 2 * GROUPS + group) * 2 + half % 2) * 2 + side);
          }
          transpose_in_quad(own, lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) z[chunk][2 * i + side] = own[i];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          if constexpr (SCALED) z[chunk][i] *= columns[chunk].scale[i];
          z[chunk][i] += columns[chunk].bias[i];
        }
      }
      if (row < args.rows && column < args.out_features) {
        Out* to = static_cast<Out*>(args.out) + row * args.out_stride + column / CHUNKS;
        finish<FORM>(z, args.inverse_scale, to);
      }
    }
  }
}

// write_tile for the dtypes that the result can have, given the dtype of the operands.
template <Form FORM, Dtype OPERAND, int ROWS, int COLUMNS, int THREADS, typename Accumulators>
__device__ __forceinline__ void write_tile(const Accumulators& accumulators, int thread, int64_t tile_row,
                                           int64_t tile_column, const EpilogueArguments& args) {
  constexpr bool SCALED = OPERAND == Dtype::e4m3;
  using Narrow = std::conditional_t<OPERAND == Dtype::fp16, __half, __nv_bfloat16>;
  using Wide = std::conditional_t<FORM == Form::residual, float, Narrow>;
  using Small = std::conditional_t<SCALED && is_activation(FORM), __nv_fp8_e4m3, Narrow>;
  const auto write = [&](auto out) {
    using Out = typename decltype(out)::type;
    write_tile<FORM, SCALED, Out, ROWS, COLUMNS, THREADS>(accumulators, thread, tile_row, tile_column, args);
  };
  if (!std::is_same_v<Wide, Narrow> && args.out_dtype == Dtype::fp32) {
    write(Type<Wide>{});
  } else if (!std::is_same_v<Small, Narrow> && args.out_dtype == Dtype::e4m3) {
    write(Type<Small>{});
  } else {
    write(Type<Narrow>{});
  }
}

}  // namespace dinov2_fast
