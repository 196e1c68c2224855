// Shared by all kernels: types, 16-bit floats, vector accesses, the record of out-of-range ids.
// No CUDA header is included: NVRTC alone compiles it, and so does a C++ compiler on the host.

#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int8 = signed char;
using int16 = short;
using int32 = int;
using int64 = long long;
using uint64 = unsigned long long;

// N adjacent elements, loaded and stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T lane[N];
};

// A loop, as NVRTC compiles `= {}` to a load from a constant in global memory.
template <typename T, int N>
__device__ inline void set_zero(Vector<T, N>& value) {
#pragma unroll
  for (int i = 0; i < N; ++i) value.lane[i] = T{};
}

// Words of a copy; wordN has N bytes.
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
  // An exact product rebiases the exponent from 15 to 127, for subnormals too.
  uint32 bits = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;  // inf and NaN
  return __uint_as_float(bits | (value.bits & 0x8000u) << 16);
}

// Rounds to nearest even. A sum is rounded once, by one of these overloads.
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
    // Subnormal halves are 2^-24 apart, as floats in [0.5, 1) are: the addition rounds.
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    // Rebiases from 127 to 15; a carry out of the mantissa raises the exponent, up to inf.
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = (uint16)(half | (bits >> 16 & 0x8000u));
}

// Adds VEC adjacent elements; one instruction where the device has it.
template <typename Grad, int VEC>
__device__ inline void atomic_add_vector(Grad* target, const Vector<Grad, VEC>& value) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) atomicAdd(target + i, value.lane[i]);
}

// float2 and float4 atomics: from sm_90 and NVRTC 12.1 on.
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

// Element i of an array of uint8, int16, int32 or int64, by its bytes. One kernel serves all dtypes: the branch is
// uniform over the grid.
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

// Element i of an array of int32 or int64.
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

// The row of sort key i. torch.sort takes no uint16 on CUDA, so a key of 2 bytes is the row less 32,768.
__device__ inline int64 load_key(const void* ptr, int64 i, int64 bytes) {
  return bytes == 2 ? ((const uint16*)ptr)[i] ^ 0x8000 : load_integer(ptr, i, bytes);
}

__device__ inline void store_key(void* ptr, int64 i, int64 row, int64 bytes) {
  store_integer(ptr, i, bytes == 2 ? row - 32768 : row, bytes);
}

__device__ inline bool names_row(int64 index, int64 num_embeddings) {
  return index >= 0 && index < num_embeddings;
}

// The row of an id in the table in hand, which begins at row first_row of the whole table, as the ids have it. Another
// shard's id names no row here. Unsigned: an id may be any number.
__device__ inline int64 local_row(int64 index, int64 first_row) {
  return (int64)((uint64)index - (uint64)first_row);
}

// The same, where the compiler knows whether there is a shard.
template <bool SHARD>
__device__ inline int64 local_row(int64 index, int64 first_row) {
  return local_row(index, SHARD ? first_row : 0);
}

// The factor of bag `bag`'s gradient at position n: the per-sample weight, 1 / size of the bag, or 1.
template <typename Acc, typename Weight>
__device__ inline Acc bag_scale(
    const Weight* per_sample_weights_ptr, int64 n, const int32* sizes_ptr, int64 bag) {
  if (per_sample_weights_ptr) return widen(per_sample_weights_ptr[n]);
  return sizes_ptr ? 1 / (Acc)sizes_ptr[bag] : (Acc)1;
}

// Records an out-of-range id. The words of the record, int64 [7] on the device (see bounds.py):
//   0 claimed, 1 position, 2 id, 3 rows of the table; negated where negative ids are wrapped
//   4 bag + 1; 0: no bag; -1: words 1 to 3 hold the place of a wrong offset, that offset, and the number of ids
//   5 first position of the bag, 6 number of the table's name
// flag_ptr: int32 [1] in pinned host memory, 1 once claimed. The host reads it without a sync.
__device__ inline void record_out_of_range(
    int64* record_ptr,
    int32* flag_ptr,
    int64 position,
    int64 index,
    int64 num_embeddings,
    int64 bag_word = 0,
    int64 begin = 0,
    int64 table = 0) {
  // The thread that exchanges the 0 owns the record until the host clears it: its words stem from one id.
  if (atomicExch((uint64*)record_ptr, 1ull) != 0) return;
  record_ptr[1] = position;
  record_ptr[2] = index;
  record_ptr[3] = num_embeddings;
  record_ptr[4] = bag_word;
  record_ptr[5] = begin;
  record_ptr[6] = table;
  *flag_ptr = 1;
}
