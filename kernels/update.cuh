// Row updates by the formulas of gpu_embed/row_update.py, operation by operation: compile with -fmad=false.

#pragma once

#include "common.cuh"
#include "stochastic_rounding.cuh"

enum Formula { SGD, MOMENTUM, NESTEROV, ADAGRAD, ADAM };

// Updates VEC columns of a row, given their summed gradient.
template <typename Weight, int VEC>
struct Update {
  using Acc = typename Accumulator<Weight>::type;
  Weight* weight_ptr;
  Acc* state_ptr;
  Acc* second_state_ptr;
  int64 FORMULA;
  Acc step_size, keep, eps, avg_weight, sq_weight, momentum, weight_decay, grad_scale;
  int64 STOCHASTIC_ROUNDING;
  int64 seed, step;

  // Columns [d, d + VEC) of row `key`. element, state_element: where they begin in weight and state.
  __device__ void update(
      int64 key, int64 element, int64 state_element, int64 d, const Vector<Acc, VEC>& total) const {
    Vector<Weight, VEC>& weight = *(Vector<Weight, VEC>*)(weight_ptr + element);
    Vector<Acc, VEC>& state = *(Vector<Acc, VEC>*)(state_ptr + state_element);
    Vector<Acc, VEC>& second_state = *(Vector<Acc, VEC>*)(second_state_ptr + state_element);
    // Read as a whole: one access.
    Vector<Weight, VEC> row = weight;
    Vector<Acc, VEC> w, g;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      w.lane[i] = widen(row.lane[i]);
      g.lane[i] = total.lane[i] * grad_scale;
    }
    if (weight_decay != 0) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) g.lane[i] += weight_decay * w.lane[i];
    }
    if (FORMULA == SGD) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) w.lane[i] -= step_size * g.lane[i];
    } else if (FORMULA == MOMENTUM || FORMULA == NESTEROV) {
      Vector<Acc, VEC> buffer = state;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        buffer.lane[i] = buffer.lane[i] * momentum + g.lane[i] * avg_weight;
        const Acc ahead = g.lane[i] + buffer.lane[i] * momentum;
        w.lane[i] -= step_size * (FORMULA == NESTEROV ? ahead : buffer.lane[i]);
      }
      state = buffer;
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

// Row-wise Adagrad on a whole row, VEC columns an access.
template <typename Weight, int VEC>
__device__ inline void update_by_mean_square(
    const typename Accumulator<Weight>::type* __restrict__ total_ptr,  // [D], contiguous: the summed gradient
    Weight* weight_ptr,                                               // [D]
    int64 col_stride,                                                 // the weight's, in elements; VEC > 1: 1
    typename Accumulator<Weight>::type* state_ptr,                    // [1]
    double lr,
    double step_size,
    double eps,
    double weight_decay,
    double grad_scale,
    int64 seed,
    int64 step,
    int64 key,
    int64 D,
    int64 STOCHASTIC_ROUNDING) {
  using Acc = typename Accumulator<Weight>::type;
  constexpr int BLOCK_D = 16;
  const auto gradient = [=](int64 d, const Vector<Weight, VEC>& row) {
    Vector<Acc, VEC> g = *(const Vector<Acc, VEC>*)(total_ptr + d);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      g.lane[i] *= (Acc)grad_scale;
      if (weight_decay != 0) g.lane[i] += (Acc)weight_decay * widen(row.lane[i]);
    }
    return g;
  };

  Acc square = 0;
  for (int64 first = 0; first < D; first += BLOCK_D) {
    // Summed in blocks: the rounding error of a long row grows with the number of blocks, not of columns.
    Acc block = 0;
    for (int64 d = first; d < D && d < first + BLOCK_D; d += VEC) {
      Vector<Weight, VEC> row;
      set_zero(row);
      if (weight_decay != 0) row = *(const Vector<Weight, VEC>*)(weight_ptr + d * col_stride);
      const Vector<Acc, VEC> g = gradient(d, row);
#pragma unroll
      for (int i = 0; i < VEC; ++i) block += g.lane[i] * g.lane[i];
    }
    square += block;
  }
  const Acc sum = *state_ptr + square / (Acc)D;
  *state_ptr = sum;

  const Acc factor = (Acc)(step_size * lr) / ((Acc)sqrt(sum) + (Acc)eps);
  for (int64 first = 0; first < D; first += 4) {
    Vector<uint32, 4> random;
    set_zero(random);
    if (sizeof(Weight) == 2 && STOCHASTIC_ROUNDING) random = random_words(seed, step, key, first / 4);
#pragma unroll
    for (int block = 0; block < 4; block += VEC) {
      const int64 d = first + block;
      if (d >= D) break;
      Vector<Weight, VEC>& weight = *(Vector<Weight, VEC>*)(weight_ptr + d * col_stride);
      Vector<Weight, VEC> row = weight;
      const Vector<Acc, VEC> g = gradient(d, row);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const Acc w = widen(row.lane[i]) - factor * g.lane[i];
        if (sizeof(Weight) == 2 && STOCHASTIC_ROUNDING) {
          narrow_at_random(w, random.lane[block + i], row.lane[i]);
        } else {
          narrow(w, row.lane[i]);
        }
      }
      weight = row;
    }
  }
}
