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

enum { DIGITS = 16 };

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
  const int64 position = order_ptr ? load_position(order_ptr, n, order_bytes) : n;
  const int64 index = load_integer(indices_ptr, position, index_bytes);
  store_integer(keys_ptr, n, sort_key(index, num_embeddings, padding_idx), key_bytes);
}

// What a pass reads. Key: what the pass before wrote; FROM_IDS: keys are made of the ids instead.
template <typename Key, typename Order, bool FROM_IDS>
struct Source {
  const void* indices_ptr;
  const Order* order_ptr;  // null: first pass
  const Key* keys_ptr;
  int64 num_indices, num_embeddings, padding_idx, index_bytes;

  __device__ Order position(int64 n) const { return order_ptr ? order_ptr[n] : (Order)n; }

  __device__ Key key(int64 n) const {
    if (!FROM_IDS) return keys_ptr[n];
    const int64 from = position(n);
    // Past the last id all bits are set: these keys stay behind all others.
    if (from >= num_indices) return (Key)-1;
    return (Key)sort_key(
        load_integer(indices_ptr, from, index_bytes), num_embeddings, padding_idx);
  }
};

template <typename Key>
__device__ inline int32 digit_of(Key key, int64 shift) {
  return (int32)(key >> shift) & (DIGITS - 1);
}

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
template <typename Key, typename Order, bool FROM_IDS, int BLOCK, int UNROLL>
__global__ void digit_counts_kernel(
    const void* __restrict__ indices_ptr,  // any integer dtype, [num_indices]; null unless FROM_IDS
    const Order* __restrict__ order_ptr,   // [num_keys]: position of each key's id; null: the key's own
    const Key* __restrict__ keys_ptr,      // [num_keys], of the pass before; null if FROM_IDS
    Order* __restrict__ counters_ptr,      // [1 + 16 * num_tiles]: 0, then the counts, digit by digit
    int64 num_indices,
    int64 num_keys,
    int64 num_embeddings,
    int64 padding_idx,  // -1: none
    int64 tile_size,
    int64 num_tiles,
    int64 shift,  // of the digit, in bits
    int64 index_bytes) {
  static_assert(BLOCK < 256, "as far as a byte counts");
  const int64 tile = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (tile >= num_tiles) return;
  const Source<Key, Order, FROM_IDS> source = {
      indices_ptr, order_ptr, keys_ptr, num_indices, num_embeddings, padding_idx, index_bytes};
  const int64 start = tile * tile_size;
  const int64 end = start + tile_size < num_keys ? start + tile_size : num_keys;
  Order total[DIGITS];
#pragma unroll
  for (int digit = 0; digit < DIGITS; ++digit) total[digit] = 0;
  for (int64 block = start; block < end; block += BLOCK) {
    ByteCounters counters = {0, 0};
    for (int64 first = block; first < block + BLOCK; first += UNROLL) {
      // All loads of a step are issued before the first count needs one.
      Key key[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) key[u] = source.key(first + u);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) counters.add(digit_of(key[u], shift));
    }
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit) total[digit] += counters[digit];
  }
  if (tile == 0) counters_ptr[0] = 0;
#pragma unroll
  for (int digit = 0; digit < DIGITS; ++digit) {
    counters_ptr[1 + digit * num_tiles + tile] = total[digit];
  }
}

// Thread i of the grid owns tile i, as above.
template <typename Key, typename Order, bool FROM_IDS, int BLOCK, int UNROLL>
__global__ void digit_scatter_kernel(
    const void* __restrict__ indices_ptr,  // as above
    const Order* __restrict__ order_ptr,   // as above
    const Key* __restrict__ keys_ptr,      // as above
    // [1 + 16 * num_tiles]: where each tile's digits begin, digit by digit; the thread counts its own on
    Order* __restrict__ counters_ptr,
    Order* __restrict__ sorted_order_ptr,  // [num_keys]
    Key* __restrict__ sorted_keys_ptr,     // [num_keys]; null: positions travel alone
    int64 num_indices,
    int64 num_keys,
    int64 num_embeddings,
    int64 padding_idx,  // -1: none
    int64 tile_size,
    int64 num_tiles,
    int64 shift,  // of the digit, in bits
    int64 index_bytes) {
  static_assert(BLOCK < 256, "as far as a byte counts");
  const int64 tile = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (tile >= num_tiles) return;
  const Source<Key, Order, FROM_IDS> source = {
      indices_ptr, order_ptr, keys_ptr, num_indices, num_embeddings, padding_idx, index_bytes};
  const int64 start = tile * tile_size;
  const int64 end = start + tile_size < num_keys ? start + tile_size : num_keys;
  for (int64 block = start; block < end; block += BLOCK) {
    ByteCounters counters = {0, 0};
    for (int64 first = block; first < block + BLOCK; first += UNROLL) {
      // All loads of a step are issued before the first store.
      Key key[UNROLL];
      Order position[UNROLL], begin[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        key[u] = source.key(first + u);
        position[u] = source.position(first + u);
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        begin[u] = counters_ptr[digit_of(key[u], shift) * num_tiles + tile];
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int32 digit = digit_of(key[u], shift);
        const Order place = begin[u] + counters[digit];
        counters.add(digit);
        sorted_order_ptr[place] = position[u];
        if (sorted_keys_ptr) sorted_keys_ptr[place] = key[u];
      }
    }
#pragma unroll
    for (int digit = 0; digit < DIGITS; ++digit) {
      counters_ptr[digit * num_tiles + tile] += counters[digit];
    }
  }
}
