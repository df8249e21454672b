// The launcher of attention.cu, its checks, and the memory layout of its operands. Plain C++, like checks.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "checks.h"

namespace dinov2_fast {

constexpr int HEAD_DIM = 64;
// A block computes 192 queries of one head, 64 in each of three warp groups, and reads 96 keys at a time. There are
// three groups because a group waits by turns for its products and for its exponentials, and the others compute
// meanwhile. A tile has 96 keys because 257 tokens are then padded to 288 keys; tiles of 128 would pad them to 384.
constexpr int QUERIES = 192;
constexpr int KEYS = 96;

struct AttentionForward {
  Tensor qkv;  // (batch, tokens, 3, heads, HEAD_DIM), bf16 or fp16; heads are contiguous
  Tensor out;  // (batch, tokens, heads, HEAD_DIM), in the dtype of qkv, contiguous
  // (batch, heads, tokens), fp32, contiguous: the logarithm of the sum of the exponentials of the scaled scores, to
  // base 2, as kernels/attention_backward.py reads it. Optional.
  Tensor lse;
};
void attention_forward(const AttentionForward& args, void* stream);

// The launch for operands of one dtype, defined in attention_<dtype>.cu.
template <Dtype OPERAND>
void launch_attention(const AttentionForward& args, int multiprocessors, void* stream);

// The layout of qkv. Strides are in elements; `stride_kind` leads from a query to its key, and from a key to its value.
struct AttentionLayout {
  int64_t batch, tokens, heads;
  int64_t stride_batch, stride_token, stride_kind, stride_head;

  int64_t tiles() const { return (tokens + QUERIES - 1) / QUERIES; }  // of a head's queries
  int64_t blocks() const { return tiles() * heads * batch; }
  int64_t offset(int64_t image, int64_t token, int64_t kind, int64_t head) const {
    return image * stride_batch + token * stride_token + kind * stride_kind + head * stride_head;
  }
};

// The stride of a dimension of size 1 is never used, but TMA would refuse some values, so a valid one replaces it.
inline AttentionLayout layout_of(const Tensor& qkv) {
  const auto stride = [&](int d) { return qkv.sizes[d] == 1 ? HEAD_DIM : qkv.strides[d]; };
  return {qkv.sizes[0], qkv.sizes[1], qkv.sizes[3], stride(0), stride(1), stride(2), stride(3)};
}

// TMA reads heads that start at multiples of 16 bytes, and counts tokens, heads and images in 32 bits. The checks are
// strict because CUTLASS launches even if the driver refuses a descriptor: it prints the error and goes on.
inline void check_attention(const AttentionForward& args) {
  const Tensor& qkv = args.qkv;
  check_dtype(qkv, {Dtype::bf16, Dtype::fp16});
  if (qkv.dim != 5 || qkv.sizes[2] != 3 || qkv.sizes[4] != HEAD_DIM) {
    fail("qkv must have the shape (batch, tokens, 3, heads, ", HEAD_DIM, "), got ", shape(qkv));
  }
  if (qkv.strides[4] != 1) fail("qkv must have contiguous heads");
  check_start(qkv);
  for (int d = 0; d < 4; ++d) {
    if (qkv.sizes[d] > 1 && (qkv.strides[d] < HEAD_DIM || qkv.strides[d] * item_size(qkv.dtype) % 16)) {
      fail("qkv must have heads that start at multiples of 16 bytes and do not overlap, got a stride of ",
           qkv.strides[d]);
    }
  }
  const AttentionLayout layout = layout_of(qkv);
  if (std::max(layout.tokens, layout.blocks()) > std::numeric_limits<int>::max()) {
    fail("qkv must have less than 2^31 tokens in an image and less than 2^31 tiles of ", QUERIES, " queries, got ",
         layout.tokens, " and ", layout.blocks());
  }
  check_dtype(args.out, {qkv.dtype});
  check_contiguous(args.out, {layout.batch, layout.tokens, layout.heads, HEAD_DIM}, qkv.device);
  if (args.lse) {
    check_dtype(args.lse, {Dtype::fp32});
    check_contiguous(args.lse, {layout.batch, layout.heads, layout.tokens}, qkv.device);
  }
}

}  // namespace dinov2_fast
