// Stochastic rounding, bit-equal to gpu_embed/reference/rounding.py.

#pragma once

#include "common.cuh"

// Philox 4x32-10: four random words from counter c and key (k0, k1).
__device__ inline Vector<uint32, 4> philox(Vector<uint32, 4> c, uint32 k0, uint32 k1) {
  // Unrolled, it would be most of a kernel's code.
#pragma unroll 1
  for (int i = 0; i < 10; ++i) {
    const uint64 product0 = 0xD2511F53ull * c.lane[0];
    const uint64 product1 = 0xCD9E8D57ull * c.lane[2];
    c = {{(uint32)(product1 >> 32) ^ c.lane[1] ^ k0, (uint32)product1,
          (uint32)(product0 >> 32) ^ c.lane[3] ^ k1, (uint32)product0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The random words of columns [4 * block, 4 * block + 4) of a row.
__device__ inline Vector<uint32, 4> random_words(int64 seed, int64 step, int64 row, int64 block) {
  return philox(
      {{(uint32)block, (uint32)row, (uint32)(row >> 32), (uint32)step}},
      (uint32)seed,
      (uint32)(seed >> 32));
}

// Selects, not an index: a dynamic index would put the words into local memory.
__device__ inline uint32 word_of(const Vector<uint32, 4>& words, int64 i) {
  return i < 2 ? (i == 0 ? words.lane[0] : words.lane[1])
               : (i == 2 ? words.lane[2] : words.lane[3]);
}

__device__ inline void narrow_at_random(float value, uint32 random, bfloat16& out) {
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrow(value, out);
  out.bits = (uint16)((bits + (random >> 16)) >> 16);
}

__device__ inline void narrow_at_random(float value, uint32 random, float16& out) {
  const uint32 bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return narrow(value, out);
  const uint32 magnitude = bits & 0x7fffffffu;
  uint32 rounded;
  if (magnitude < 0x38800000u) {
    // Subnormal halves are 2^-24 apart: fixed point, with 21 fraction bits to round.
    const uint32 fixed = (uint32)(__uint_as_float(magnitude) * 0x1p45f);
    rounded = __float_as_uint((float)((fixed + (random >> 11)) >> 21) * 0x1p-24f);
  } else {
    rounded = (magnitude + (random >> 19)) & 0xffffe000u;
  }
  narrow(__uint_as_float(rounded | (bits & 0x80000000u)), out);
}

// fp32 and fp64 tables: nothing to round.
template <typename Wide>
__device__ inline void narrow_at_random(Wide value, uint32, Wide& out) {
  out = value;
}
