// The kernel of attention.cu for fp16 operands. It has its own file because it takes long to compile.
#include "attention.cuh"

namespace dinov2_fast {

template void launch_attention<Dtype::fp16>(const AttentionForward&, int, void*);

}  // namespace dinov2_fast
