// Test kernels: every conversion of common.cuh on its own. Thread i of the grid owns item i.

#include "common.cuh"

template <typename Narrow>
__global__ void widen_kernel(const Narrow* input_ptr, float* output_ptr, int64 num_items) {
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_items) output_ptr[i] = widen(input_ptr[i]);
}

template <typename Narrow>
__global__ void narrow_kernel(const float* input_ptr, Narrow* output_ptr, int64 num_items) {
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_items) narrow(input_ptr[i], output_ptr[i]);
}
