// The kernels of linear.cu for e4m3 operands, in a file of their own because they take minutes to compile.
#include "linear.cuh"

namespace dinov2_fast {

template void launch_linear<Dtype::e4m3>(const LinearForward&, int, int, void*);

}  // namespace dinov2_fast
