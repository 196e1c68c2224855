// What the kernels share: types, 16-bit floats, vector accesses, the record of out-of-range ids.
// Written without CUDA's headers, so NVRTC alone compiles it, and so does a C++ compiler on the host.

#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int8 = signed char;
using int16 = short;
using int32 = int;
using int64 = long long;
using uint64 = unsigned long long;

// N neighbours in memory, loaded and stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T lane[N];
};

// Written out, because NVRTC makes of `= {}` a load from a constant in global memory.
template <typename T, int N>
__device__ inline void set_zero(Vector<T, N>& value) {
#pragma unroll
  for (int i = 0; i < N; ++i) value.lane[i] = T{};
}

// What a copy moves at a time; name and size agree.
using word1 = uint8;
using word2 = uint16;
using word4 = uint32;
using word8 = Vector<uint32, 2>;
using word16 = Vector<uint32, 4>;

struct float16 {
  uint16 bits;
};

struct bfloat16 {
  uint16 bits;
};

template <typename T>
struct Accumulator {
  using type = float;
};

template <>
struct Accumulator<double> {
  using type = double;
};

__device__ inline float widen(float value) { return value; }

__device__ inline double widen(double value) { return value; }

__device__ inline float widen(bfloat16 value) { return __uint_as_float((uint32)value.bits << 16); }

__device__ inline float widen(float16 value) {
  const uint32 magnitude = (value.bits & 0x7fffu) << 13;
  // The exponent's bias goes from 15 to 127 by an exact product, which also takes subnormals along.
  uint32 bits = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;  // inf and NaN keep the largest exponent
  return __uint_as_float(bits | (value.bits & 0x8000u) << 16);
}

// Rounds to the nearest, ties to even. One of these overloads is the only rounding of a sum.
__device__ inline void narrow(float value, float& out) { out = value; }

__device__ inline void narrow(double value, double& out) { out = value; }

__device__ inline void narrow(float value, bfloat16& out) {
  const uint32 bits = __float_as_uint(value);
  const uint32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry it to inf
  out.bits = (uint16)(is_nan ? bits >> 16 | 0x40u : rounded);
}

__device__ inline void narrow(float value, float16& out) {
  const uint32 bits = __float_as_uint(value);
  const uint32 magnitude = bits & 0x7fffffffu;
  uint32 half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and more: inf
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 halves are 2^-24 apart, as floats from 0.5 on are: that addition rounds.
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    // The bias goes from 127 to 15; a carry out of the mantissa raises the exponent, up to inf.
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = (uint16)(half | (bits >> 16 & 0x8000u));
}

// Add VEC neighbours, with one instruction where the device has one.
template <typename Grad, int VEC>
__device__ inline void atomic_add_vector(Grad* target, const Vector<Grad, VEC>& value) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) atomicAdd(target + i, value.lane[i]);
}

// NVRTC 12.1 is the first to know them.
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
__device__ inline void atomic_add_vector(float* target, const Vector<float, 2>& value) {
  atomicAdd((float2*)target, make_float2(value.lane[0], value.lane[1]));
}

__device__ inline void atomic_add_vector(float* target, const Vector<float, 4>& value) {
  atomicAdd(
      (float4*)target,
      make_float4(value.lane[0], value.lane[1], value.lane[2], value.lane[3]));
}
#endif

// Integer i of an array of uint8, int16, int32 or int64, told apart by their size: one kernel serves them all,
// and every thread takes the same branch.
__device__ inline int64 load_integer(const void* ptr, int64 i, int64 bytes) {
  switch (bytes) {
    case 1:
      return ((const uint8*)ptr)[i];
    case 2:
      return ((const int16*)ptr)[i];
    case 4:
      return ((const int32*)ptr)[i];
    default:
      return ((const int64*)ptr)[i];
  }
}

// Position i of an array of int32 or int64.
__device__ inline int64 load_position(const void* ptr, int64 i, int64 bytes) {
  return bytes == 4 ? ((const int32*)ptr)[i] : ((const int64*)ptr)[i];
}

__device__ inline void store_integer(void* ptr, int64 i, int64 value, int64 bytes) {
  switch (bytes) {
    case 1:
      ((uint8*)ptr)[i] = (uint8)value;
      return;
    case 2:
      ((int16*)ptr)[i] = (int16)value;
      return;
    case 4:
      ((int32*)ptr)[i] = (int32)value;
      return;
    default:
      ((int64*)ptr)[i] = value;
  }
}

__device__ inline bool names_row(int64 index, int64 num_embeddings) {
  return index >= 0 && index < num_embeddings;
}

// What multiplies the gradient of bag `bag` at position n: the per-sample weight, or one over the bag's size, or 1.
template <typename Acc, typename Weight>
__device__ inline Acc bag_scale(
    const Weight* per_sample_weights_ptr, int64 n, const int32* sizes_ptr, int64 bag) {
  if (per_sample_weights_ptr) return widen(per_sample_weights_ptr[n]);
  return sizes_ptr ? 1 / (Acc)sizes_ptr[bag] : (Acc)1;
}

// Write one bad id to the device's record.
// record_ptr: int64 [7] on the device: claimed (0 or 1), position, id, rows of the table; bag_word and begin, which
// stay 0 where there are no bags; table, which stays 0 where there is one.
// flag_ptr: int32 [1] in pinned host memory, which the host reads without a stall.
// bag_word: the bag's number from 1 on. -1: not an id but the offset `index` at place `position` is wrong, and
// num_embeddings is the number of ids.
// begin: the bag's first position.
// table: the number of its table's name.
// Where ids also count from the end, the caller gives num_embeddings negated.
__device__ inline void record_out_of_range(
    int64* record_ptr,
    int32* flag_ptr,
    int64 position,
    int64 index,
    int64 num_embeddings,
    int64 bag_word = 0,
    int64 begin = 0,
    int64 table = 0) {
  // Whoever swaps the 0 out owns the record until the host clears it, so its values belong together.
  if (atomicExch((uint64*)record_ptr, 1ull) != 0) return;
  record_ptr[1] = position;
  record_ptr[2] = index;
  record_ptr[3] = num_embeddings;
  record_ptr[4] = bag_word;
  record_ptr[5] = begin;
  record_ptr[6] = table;
  *flag_ptr = 1;
}
