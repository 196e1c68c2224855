// One optimizer step on the rows that have a gradient: a segment sum that ends in an update of the row.
// The formulas are those of gpu_embed/row_update.py, operation by operation, so it is compiled without fused
// multiply-adds.

#include "common.cuh"
#include "segment_walk.cuh"
#include "stochastic_rounding.cuh"

// Which formula.
enum Formula { SGD, ADAGRAD, ADAM };

// Thread i of the grid owns position i of indices.
extern "C" __global__ void select_rows_kernel(
    const int64* __restrict__ indices_ptr,  // [num_indices]
    const uint8* __restrict__ rows_ptr,     // [num_embeddings]: 1: the row may change, 0: it may not
    int64* __restrict__ selected_ptr,       // [num_indices]: the id, or -1 if its row may not change
    int64 num_indices,
    int64 num_embeddings) {
  const int64 n = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (n >= num_indices) return;
  const int64 index = indices_ptr[n];
  selected_ptr[n] = names_row(index, num_embeddings) && rows_ptr[index] ? index : -1;
}

// What becomes of VEC columns of a row, once its gradient is summed.
template <typename Weight, int VEC>
struct RowUpdate {
  using Acc = typename Accumulator<Weight>::type;
  enum : bool { ATOMIC_ENDS = false };
  Weight* weight_ptr;
  Acc* state_ptr;
  Acc* second_state_ptr;
  int64 row_stride;  // in elements
  int64 col_stride;  // in elements
  int64 D;
  int64 FORMULA;
  Acc step_size, keep, eps, avg_weight, sq_weight, grad_scale;
  int64 STOCHASTIC_ROUNDING;
  int64 seed, step;

  __device__ void operator()(int64 key, int64 d, const Vector<Acc, VEC>& total, int32) const {
    Vector<Weight, VEC>& weight =
        *(Vector<Weight, VEC>*)(weight_ptr + key * row_stride + d * col_stride);
    Vector<Acc, VEC>& state = *(Vector<Acc, VEC>*)(state_ptr + key * D + d);
    Vector<Acc, VEC>& second_state = *(Vector<Acc, VEC>*)(second_state_ptr + key * D + d);
    // Read as a whole, so that it takes one access.
    Vector<Weight, VEC> row = weight;
    Vector<Acc, VEC> w, g;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      w.lane[i] = widen(row.lane[i]);
      g.lane[i] = total.lane[i] * grad_scale;
    }
    if (FORMULA == SGD) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) w.lane[i] -= step_size * g.lane[i];
    } else if (FORMULA == ADAGRAD) {
      Vector<Acc, VEC> sum = state;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        sum.lane[i] += g.lane[i] * g.lane[i];
        w.lane[i] -= step_size * (g.lane[i] / ((Acc)sqrt(sum.lane[i]) + eps));
      }
      state = sum;
    } else {
      Vector<Acc, VEC> avg = state, sq = second_state;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        avg.lane[i] += (g.lane[i] - avg.lane[i]) * avg_weight;
        sq.lane[i] += (g.lane[i] * g.lane[i] - sq.lane[i]) * sq_weight;
        w.lane[i] *= keep;
        w.lane[i] -= step_size * (avg.lane[i] / ((Acc)sqrt(sq.lane[i]) + eps));
      }
      state = avg;
      second_state = sq;
    }
    if (sizeof(Weight) == 2 && STOCHASTIC_ROUNDING) {
      const Vector<uint32, 4> random = random_words(seed, step, key, d / 4);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        narrow_at_random(w.lane[i], word_of(random, (d + i) % 4), row.lane[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) narrow(w.lane[i], row.lane[i]);
    }
    weight = row;
  }
};

// The grid, the walk and the levels are those of segment_sum_kernel.
template <typename Value, typename Weight, int VEC, int UNROLL>
__global__ void row_update_kernel(
    // [*, D], any strides (VEC > 1: column stride 1): the gradient, or the partial sums of the level below
    const Value* __restrict__ values_ptr,
    const void* __restrict__ order_ptr,  // [num_keys]: the row of values of each key; null: its place
    const void* __restrict__ keys_ptr,    // [num_keys], sorted; keys that name no row take no part
    Weight* weight_ptr,                   // [num_embeddings, D], any strides (VEC > 1: column stride 1)
    typename Accumulator<Weight>::type* state_ptr,         // [num_embeddings, D], or null
    typename Accumulator<Weight>::type* second_state_ptr,  // [num_embeddings, D], or null
    // [2 * num_chunks, D]: row 2c leads chunk c, row 2c + 1 trails it
    typename Accumulator<Weight>::type* __restrict__ partial_values_ptr,
    int64* __restrict__ partial_keys_ptr,  // [2 * num_chunks]; -1: no such partial sum
    const double* __restrict__ lr_ptr,     // [1]: multiplies step_size and decay; null: 1
    int64 num_keys,
    int64 num_embeddings,
    int64 value_row_stride,   // in units of VEC elements
    int64 value_col_stride,   // in elements
    int64 weight_row_stride,  // in elements
    int64 weight_col_stride,  // in elements
    double step_size,
    double decay,
    double eps,
    double avg_weight,
    double sq_weight,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,  // VEC divides it
    int64 FORMULA,
    int64 STOCHASTIC_ROUNDING,
    int64 CHUNK,  // UNROLL divides it
    int64 order_bytes,
    int64 key_bytes) {
  using Acc = typename Accumulator<Weight>::type;
  const double lr = lr_ptr ? *lr_ptr : 1.0;
  const RowUpdate<Weight, VEC> update = {
      weight_ptr, state_ptr, second_state_ptr, weight_row_stride, weight_col_stride, D, FORMULA,
      (Acc)(step_size * lr), (Acc)(1.0 - decay * lr), (Acc)eps, (Acc)avg_weight, (Acc)sq_weight,
      (Acc)grad_scale, STOCHASTIC_ROUNDING, seed, step};
  walk_runs<Value, Acc, VEC, false, UNROLL, false>(
      values_ptr, order_ptr, keys_ptr, nullptr, nullptr, (const Weight*)nullptr, nullptr, partial_values_ptr,
      partial_keys_ptr, nullptr, num_keys, num_embeddings, value_row_stride, value_col_stride, D,
      CHUNK, order_bytes, key_bytes, 0, update);
}

// Thread i of the grid owns run i, whose summed gradient lies in memory: it sees the row as a whole.
template <typename Weight>
__global__ void rowwise_adagrad_kernel(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [num_runs, D], contiguous
    const int64* __restrict__ keys_ptr,  // [num_runs]: the row of each; others than rows take no part
    Weight* weight_ptr,                  // [num_embeddings, D], any strides
    typename Accumulator<Weight>::type* state_ptr,  // [num_embeddings]
    const double* __restrict__ lr_ptr,              // [1]: multiplies step_size; null: 1
    int64 num_embeddings,
    int64 weight_row_stride,  // in elements
    int64 weight_col_stride,  // in elements
    double step_size,
    double eps,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 D,
    int64 STOCHASTIC_ROUNDING,
    int64 num_runs) {
  using Acc = typename Accumulator<Weight>::type;
  constexpr int BLOCK_D = 16;
  const int64 run = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (run >= num_runs || !names_row(keys_ptr[run], num_embeddings)) return;
  const int64 key = keys_ptr[run];
  const Acc* const row_total_ptr = total_ptr + run * D;
  const Acc scale = (Acc)grad_scale;

  Acc square = 0;
  for (int64 first = 0; first < D; first += BLOCK_D) {
    // Summed in blocks: the rounding errors of a long row grow with the number of its blocks only.
    Acc block = 0;
    for (int64 d = first; d < D && d < first + BLOCK_D; ++d) {
      const Acc g = row_total_ptr[d] * scale;
      block += g * g;
    }
    square += block;
  }
  const Acc sum = state_ptr[key] + square / (Acc)D;
  state_ptr[key] = sum;

  const double lr = lr_ptr ? *lr_ptr : 1.0;
  const Acc factor = (Acc)(step_size * lr) / ((Acc)sqrt(sum) + (Acc)eps);
  for (int64 first = 0; first < D; first += 4) {
    Vector<uint32, 4> random;
    set_zero(random);
    if (sizeof(Weight) == 2 && STOCHASTIC_ROUNDING) random = random_words(seed, step, key, first / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64 d = first + i;
      if (d >= D) break;
      Weight& weight = weight_ptr[key * weight_row_stride + d * weight_col_stride];
      const Acc w = widen(weight) - factor * (row_total_ptr[d] * scale);
      if (sizeof(Weight) == 2 && STOCHASTIC_ROUNDING) {
        narrow_at_random(w, random.lane[i], weight);
      } else {
        narrow(w, weight);
      }
    }
  }
}
