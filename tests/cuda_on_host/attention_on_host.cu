// The launches of csrc/attention.cu for the CPU. Plain loops compute the products and the softmax, block by block and
// tile by tile, and leave the sums in the order of the tensor cores. The memory layout, the epilogue and the checks are
// those of the GPU.
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "attention_epilogue.cuh"
#include "common.cuh"

namespace dinov2_fast {
namespace {

constexpr int THREADS = QUERIES / 64 * 128;

float element(const Tensor& qkv, int64_t at) {
  return qkv.dtype == Dtype::bf16 ? __bfloat162float(pointer<__nv_bfloat16>(qkv)[at])
                                  : __half2float(pointer<__half>(qkv)[at]);
}

float rounded(Dtype dtype, float x) {
  return dtype == Dtype::bf16 ? __bfloat162float(__float2bfloat16(x)) : __half2float(__float2half(x));
}

struct Row {
  float sums[HEAD_DIM] = {};
  float lse = INFINITY;
};

// `count` queries, keys or values of one head, from `first` on; zeros beyond the last one, as TMA reads them.
std::vector<float> rows_of(const Tensor& qkv, const AttentionLayout& layout, int64_t image, int64_t head, int kind,
                           int64_t first, int count) {
  std::vector<float> rows(count * HEAD_DIM, 0.0f);
  for (int64_t token = first; token < std::min(first + count, layout.tokens); ++token) {
    const int64_t at = layout.offset(image, token, kind, head);
    for (int i = 0; i < HEAD_DIM; ++i) rows[(token - first) * HEAD_DIM + i] = element(qkv, at + i);
  }
  return rows;
}

void attend(const Tensor& qkv, const AttentionLayout& layout, int64_t image, int64_t head, int64_t first, Row* block) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(HEAD_DIM)), scale_log2 = scale * LOG2_E;
  const std::vector<float> q = rows_of(qkv, layout, image, head, 0, first, QUERIES);
  std::vector<float> row_max(QUERIES, -INFINITY), total(QUERIES, 0.0f);
  for (int64_t first_key = 0; first_key < layout.tokens; first_key += KEYS) {
    const std::vector<float> k = rows_of(qkv, layout, image, head, 1, first_key, KEYS);
    const std::vector<float> v = rows_of(qkv, layout, image, head, 2, first_key, KEYS);
    for (int row = 0; row < QUERIES && first + row < layout.tokens; ++row) {
      float scores[KEYS], before = row_max[row];
      for (int key = 0; key < KEYS; ++key) {
        scores[key] = 0.0f;
        for (int i = 0; i < HEAD_DIM; ++i) scores[key] += q[row * HEAD_DIM + i] * k[key * HEAD_DIM + i];
        if (first_key + key >= layout.tokens) scores[key] = -INFINITY;
        row_max[row] = std::fmax(row_max[row], scores[key]);
      }
      const float shift = row_max[row] == -INFINITY ? 0.0f : row_max[row];
      const float correction = std::exp2((before - shift) * scale_log2);
      total[row] *= correction;
      for (float& sum : block[row].sums) sum *= correction;
      for (int key = 0; key < KEYS; ++key) {
        const float weight = std::exp2(scores[key] * scale_log2 - shift * scale_log2);
        total[row] += weight;
        for (int i = 0; i < HEAD_DIM; ++i) block[row].sums[i] += rounded(qkv.dtype, weight) * v[key * HEAD_DIM + i];
      }
    }
  }
  for (int row = 0; row < QUERIES; ++row) {
    if (!(total[row] != 0.0f) || std::isnan(total[row])) continue;
    block[row].lse = row_max[row] * scale + std::log(total[row]);
    for (float& sum : block[row].sums) sum /= total[row];
  }
}

template <Dtype OPERAND>
void attention_forward_kernel(const Row* block, int64_t first, int64_t image, int64_t head, AttentionResult result) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % WARP;
  const Row* rows = block + 64 * group + thread / WARP * 16 + lane / 4;
  const auto sums = [&](int i) { return rows[i / 2 % 2 * 8].sums[i / 4 * 8 + lane % 4 * 2 + i % 2]; };
  const auto lse = [&](int half) { return rows[half * 8].lse; };
  write_queries<OPERAND>(sums, lse, thread, first + 64 * group, image, head, result);
}

}  // namespace

template <Dtype OPERAND>
void launch_attention(const AttentionForward& args, int, void*) {
  const AttentionLayout layout = layout_of(args.qkv);
  for (int64_t index = 0; index < layout.blocks(); ++index) {
    const int64_t first = index % layout.tiles() * QUERIES, image = index / layout.tiles() % layout.batch;
    const int64_t head = index / layout.tiles() / layout.batch;
    std::vector<Row> block(QUERIES);
    attend(args.qkv, layout, image, head, first, block.data());
    launch(attention_forward_kernel<OPERAND>, dim3(1), dim3(THREADS), nullptr, block.data(), first, image, head,
           result_of(args));
  }
}

template void launch_attention<Dtype::bf16>(const AttentionForward&, int, void*);
template void launch_attention<Dtype::fp16>(const AttentionForward&, int, void*);

}  // namespace dinov2_fast

// For tests/ops/test_attention_cuda.py: the tiles, the blocks, and the offset of an element, from the sizes and strides
// of qkv.
extern "C" void dinov2_fast_attention_layout(const int64_t* sizes, const int64_t* strides, const int64_t* at,
                                             int64_t* out) {
  using namespace dinov2_fast;
  Tensor qkv;
  qkv.dim = MAX_DIMS;
  std::copy(sizes, sizes + MAX_DIMS, qkv.sizes);
  std::copy(strides, strides + MAX_DIMS, qkv.strides);
  const AttentionLayout layout = layout_of(qkv);
  out[0] = layout.tiles();
  out[1] = layout.blocks();
  out[2] = layout.offset(at[0], at[1], at[2], at[3]);
}
