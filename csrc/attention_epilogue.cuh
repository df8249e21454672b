// The epilogue of attention.cuh: rounds the sums in the registers of the tensor cores and writes out and lse to memory.
//
// A warp group has 64 queries of one head. A group is 8 neighbouring columns. As in epilogue.cuh, lane l of warp w
// holds columns 2 (l % 4) and 2 (l % 4) + 1 of each group, of query 16 w + l / 4 and of the query 8 below. The 4 lanes
// that share these queries round their sums and exchange them until each lane holds 8 columns and writes them at once.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "common.cuh"

namespace dinov2_fast {

struct AttentionResult {
  void* out;   // (batch, tokens, heads, HEAD_DIM)
  float* lse;  // (batch, heads, tokens), or null
  int64_t tokens;
  int64_t heads;
};

inline AttentionResult result_of(const AttentionForward& args) {
  return {args.out.data, pointer<float>(args.lse), args.qkv.sizes[1], args.qkv.sizes[3]};
}

constexpr float LOG2_E = 1.4426950408889634f;

// Writes the results of a warp group's queries, from `first_query` on. `sums(i)` are the sums of thread `thread` of
// 128: the fastest index runs over two columns, the next over two rows 8 apart, the last over groups. `lse(half)` is
// the natural logarithm of the sum of the exponentials of the scaled scores of a row. It is infinite if that sum is 0
// or NaN; the result is then NaN.
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
