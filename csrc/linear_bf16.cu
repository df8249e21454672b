// The kernels of linear.cu for bf16 operands, in a file of their own because they take minutes to compile.
#include "linear.cuh"

namespace dinov2_fast {

template void launch_linear<Dtype::bf16>(const LinearForward&, int, int, void*);

}  // namespace dinov2_fast
