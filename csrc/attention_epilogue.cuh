// What follows the products in attention.cuh, from the registers of the tensor cores to out and lse in memory.
//
// A warp group has 64 queries of one head. As in epilogue.cuh, lane l of warp w holds, of each 8 neighbouring columns
// (a group), columns 2 (l % 4) and 2 (l % 4) + 1 of the queries 16 w + l / 4 and 8 below that, and 4 lanes exchange
// what they hold, here rounded already, until each can write 8 columns at once.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "common.cuh"

namespace dinov2_fast {

struct AttentionResult {
  void* out;   // (batch, tokens, heads, HEAD_DIM)
  float* lse;  // (batch, heads, tokens), or left out
  int64_t tokens;
  int64_t heads;
};

inline AttentionResult result_of(const AttentionForward& args) {
  return {args.out.data, pointer<float>(args.lse), args.qkv.sizes[1], args.qkv.sizes[3]};
}

constexpr float LOG2_E = 1.4426950408889634f;

// Writes the queries from `first_query` on of a head of an image. `sums(i)` are those of thread `thread` of 128: two
// columns, then 8 rows apart, then from group to group. `lse(half)` is the natural logarithm of the sum of the
// exponentials of the scaled scores for either row, infinite where that sum is 0 or NaN. The result is NaN there.
template <Dtype OPERAND, typename Sums, typename Lse>
__device__ __forceinline__ void write_queries(const Sums& sums, const Lse& lse, int thread, int64_t first_query,
                                              int64_t image, int64_t head, const AttentionResult& result) {
  using Out = std::conditional_t<OPERAND == Dtype::fp16, __half, __nv_bfloat16>;
  constexpr uint32_t TWO_NANS = 0x7fff7fff;  // of bf16 as of fp16
  const int lane = thread % WARP;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = first_query + 16 * (thread / WARP) + lane / 4 + 8 * half;
    const bool counts = query < result.tokens, undefined = lse(half) == INFINITY;
    if (result.lse && counts && lane % 4 == 0) {
      float* to = result.lse + (image * result.heads + head) * result.tokens + query;
      *to = undefined ? NAN : lse(half) * LOG2_E;
    }
    const int64_t row = (image * result.tokens + query) * result.heads + head;
    Out* to = static_cast<Out*>(result.out) + row * HEAD_DIM + lane % 4 * WIDTH;
#pragma unroll
    for (int start = 0; start < HEAD_DIM / WIDTH; start += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (start + i) + 2 * half;
        const auto pair = Pair<Out>::pack(sums(at), sums(at + 1));
        memcpy(&words[i], static_cast<const void*>(&pair), sizeof(pair));
        if (undefined) words[i] = TWO_NANS;
      }
      transpose_in_quad(words, lane);
      Chunk<Out> chunk;
      memcpy(chunk.words, words, sizeof(words));
      if (counts) store_at_once(to + start * WIDTH, chunk);
    }
  }
}

}  // namespace dinov2_fast
