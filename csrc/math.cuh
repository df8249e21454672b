// Arithmetic that kernels and epilogues share. It also compiles for the host, where the tests check it.
#pragma once

#include <cuda_fp8.h>

#include <cmath>

namespace dinov2_fast {

// exp(x) with an error of some ulp of fp32, for results of at most 2 bytes.
__host__ __device__ inline float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// 1 / x, which is 0 for infinity.
__host__ __device__ inline float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// The normal distribution function as the sigmoid of an odd polynomial of degree 9. x times it is within 3.1e-6 of
// GELU. It is finite for every finite x.
__host__ __device__ inline float normal_cdf_polynomial(float x) {
  const float t = x * x;
  float p = 2.22435329e-6f * t - 6.09182100e-5f;
  p = (p * t - 2.51040285e-4f) * t + 0.0729400251f;
  return fast_reciprocal(1.0f + fast_exp(-x * (p * t + 1.59565507f)));
}

__host__ __device__ inline float gelu_erf(float x) { return x * (0.5f * (1.0f + erff(x * 0.70710678118654752f))); }
__host__ __device__ inline float gelu_polynomial(float x) { return x * normal_cdf_polynomial(x); }

// Two numbers saturated at ±448 and rounded to e4m3. NaN stays NaN.
__host__ __device__ inline __nv_fp8x2_storage_t to_e4m3(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace dinov2_fast
