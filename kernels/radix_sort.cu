// Sort keys of ids, and a radix sort of them within 16 bytes an id, where torch.sort takes about 36.
//
// Four bits of the key a pass, the lowest first. A pass cuts the keys into tiles, counts how often each of the
// 16 digits occurs in each tile, turns the counts into the places where a tile's digits begin (a cumulative
// sum, by torch), and moves every key and its position to its place. Keys with the same digit stay in order, so
// after the last pass the keys are sorted, and equal ones stand as they stood before.
//
// With keys and positions of 4 bytes each, a pass reads the keys to count them, reads both, and writes both: 20
// bytes an id is its floor. The first pass makes the keys of the caller's ids, so there is no array of unsorted
// ones. Wider keys or positions would take more than 16 bytes: then positions travel alone, and each pass reads
// the ids through them.
//
// A thread walks its tile alone. Its counters stay in registers: a byte counts a digit, so 16 counters are two
// words, and after each BLOCK keys they are added to wider ones.

#include "common.cuh"

constexpr int DIGITS = 16;

// The id itself; num_embeddings, which sorts behind all rows, for an id without a gradient.
__device__ inline int64 sort_key(int64 index, int64 num_embeddings, int64 padding_idx) {
  return names_row(index, num_embeddings) && index != padding_idx ? index : num_embeddings;
}

// Thread i of the grid owns place i of keys.
extern "C" __global__ void sort_keys_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices], contiguous
    const void* __restrict__ order_ptr,    // [num_indices]: position of each key's id; null: the key's own
    void* __restrict__ keys_ptr,           // the narrowest integer dtype that holds num_embeddings
    int64 num_indices,
    int64 num_embeddings,
    int64 padding_idx,  // -1: none
    int64 index_bytes,
    int64 order_bytes,
    int64 key_bytes) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 position = order_ptr ? load_integer(order_ptr, n, order_bytes) : n;
  const int64 index = load_integer(indices_ptr, position, index_bytes);
  store_integer(keys_ptr, n, sort_key(index, num_embeddings, padding_idx), key_bytes);
}

// The keys of one pass, as the pass before left them.
struct Source {
  const void* indices_ptr;
  const void* order_ptr;  // null: first pass
  const void* keys_ptr;   // null: made of the ids
  int64 num_indices, num_embeddings, padding_idx;
  int64 index_bytes, order_bytes, key_bytes;

  __device__ int64 position(int64 n) const {
    return order_ptr ? load_integer(order_ptr, n, order_bytes) : n;
  }

  __device__ int64 key(int64 n) const {
    if (keys_ptr) return load_integer(keys_ptr, n, key_bytes);
    const int64 from = position(n);
    // Past the last id all bits are set: these keys stay behind all others.
    if (from >= num_indices) return -1;
    return sort_key(load_integer(indices_ptr, from, index_bytes), num_embeddings, padding_idx);
  }
};

// A byte a digit: digits 0 to 7, digits 8 to 15.
struct ByteCounters {
  uint64 low, high;

  __device__ void add(int32 digit) {
    const uint64 one = (uint64)1 << digit % 8 * 8;
    low += digit < 8 ? one : 0;
    high += digit < 8 ? 0 : one;
  }

  __device__ int32 operator[](int32 digit) const {
    return (int32)((digit < 8 ? low : high) >> digit % 8 * 8 & 255);
  }
};

// Thread i of the grid owns tile i: places [i * tile_size, ...) of keys. BLOCK divides tile_size and num_keys,
// UNROLL divides BLOCK.
template <int BLOCK, int UNROLL>
__global__ void digit_counts_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices]; null where keys_ptr is not
    const void* __restrict__ order_ptr,    // [num_keys]: position of each key's id; null: the key's own
    const void* __restrict__ keys_ptr,     // [num_keys], of the pass before; null: to be made of the ids
    void* __restrict__ counters_ptr,       // [1 + 16 * num_tiles]: 0, then the counts, digit by digit
    int64 num_indices,
    int64 num_keys,
    int64 num_embeddings,
    int64 padding_idx,  // -1: none
    int64 tile_size,
    int64 num_tiles,
    int64 shift,  // of the digit, in bits
    int64 index_bytes,
    int64 order_bytes,  // of the counters too
    int64 key_bytes) {
  static_assert(BLOCK < 256, "as far as a byte counts");
  const int64 tile = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (tile >= num_tiles) return;
  const Source source = {indices_ptr, order_ptr,   keys_ptr,    num_indices, num_embeddings,
                         padding_idx, index_bytes, order_bytes, key_bytes};
  const int64 start = tile * tile_size;
  const int64 end = start + tile_size < num_keys ? start + tile_size : num_keys;
  uint32 total[DIGITS];
#pragma unroll
  for (int digit = 0; digit < DIGITS; ++digit) total[digit] = 0;
  for (int64 block = start; block < end; block += BLOCK) {
    ByteCounters counters = {0, 0};
    for (int64 first = block; first < block + BLOCK; first += UNROLL) {
      // All loads of a step are issued before the first count needs one.
      int64 key[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) key[u] = source.key(first + u);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) counters.add((int32)(key[u] >> shift & (DIGITS - 1)));
    }
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit) total[digit] += counters[digit];
  }
  if (tile == 0) store_integer(counters_ptr, 0, 0, order_bytes);
#pragma unroll
  for (int digit = 0; digit < DIGITS; ++digit) {
    store_integer(counters_ptr, 1 + digit * num_tiles + tile, total[digit], order_bytes);
  }
}

// Thread i of the grid owns tile i, as above.
template <int BLOCK, int UNROLL>
__global__ void digit_scatter_kernel(
    const void* __restrict__ indices_ptr,  // as above
    const void* __restrict__ order_ptr,    // as above
    const void* __restrict__ keys_ptr,     // as above
    // [1 + 16 * num_tiles]: where each tile's digits begin, digit by digit; the thread counts its own on
    void* __restrict__ counters_ptr,
    void* __restrict__ sorted_order_ptr,  // [num_keys]
    void* __restrict__ sorted_keys_ptr,   // [num_keys]; null: positions travel alone
    int64 num_indices,
    int64 num_keys,
    int64 num_embeddings,
    int64 padding_idx,  // -1: none
    int64 tile_size,
    int64 num_tiles,
    int64 shift,  // of the digit, in bits
    int64 index_bytes,
    int64 order_bytes,  // of both orders and of the counters
    int64 key_bytes) {
  static_assert(BLOCK < 256, "as far as a byte counts");
  const int64 tile = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (tile >= num_tiles) return;
  const Source source = {indices_ptr, order_ptr,   keys_ptr,    num_indices, num_embeddings,
                         padding_idx, index_bytes, order_bytes, key_bytes};
  const int64 start = tile * tile_size;
  const int64 end = start + tile_size < num_keys ? start + tile_size : num_keys;
  for (int64 block = start; block < end; block += BLOCK) {
    ByteCounters counters = {0, 0};
    for (int64 first = block; first < block + BLOCK; first += UNROLL) {
      // All loads of a step are issued before the first store.
      int64 key[UNROLL], position[UNROLL], begin[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        key[u] = source.key(first + u);
        position[u] = source.position(first + u);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int64 digit = key[u] >> shift & (DIGITS - 1);
        begin[u] = load_integer(counters_ptr, digit * num_tiles + tile, order_bytes);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int32 digit = (int32)(key[u] >> shift & (DIGITS - 1));
        const int64 place = begin[u] + counters[digit];
        counters.add(digit);
        store_integer(sorted_order_ptr, place, position[u], order_bytes);
        if (sorted_keys_ptr) store_integer(sorted_keys_ptr, place, key[u], key_bytes);
      }
    }
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit) {
      const int64 begin = load_integer(counters_ptr, digit * num_tiles + tile, order_bytes);
      const int64 next = begin + counters[digit];
      store_integer(counters_ptr, digit * num_tiles + tile, next, order_bytes);
    }
  }
}
