// The launcher of attention: out = softmax(q k^T / sqrt(head_dim)) v on packed q, k and v, for sm_90. The kernels are
// in attention.cuh, and their epilogue is in attention_epilogue.cuh.
#include "attention.h"
#include "common.cuh"

namespace dinov2_fast {

void attention_forward(const AttentionForward& args, void* stream) {
  check_attention(args);
  const int multiprocessors = multiprocessors_of(args.qkv.device, "attention");
  if (layout_of(args.qkv).blocks() == 0) return;
  if (args.qkv.dtype == Dtype::bf16) return launch_attention<Dtype::bf16>(args, multiprocessors, stream);
  launch_attention<Dtype::fp16>(args, multiprocessors, stream);
}

}  // namespace dinov2_fast
