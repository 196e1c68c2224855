// Just enough CUDA for a C++ compiler to run the kernels on the host: one thread after another, so atomics
// are plain operations. It works because no kernel uses shared memory, barriers or warp intrinsics.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>

#include <map>
#include <string>
#include <utility>

#define __global__
#define __device__

struct Dim3 {
  unsigned x, y, z;
};

static thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename T>
T atomicAdd(T* target, T value) {
  const T old = *target;
  *target += value;
  return old;
}

template <typename T>
T atomicExch(T* target, T value) {
  const T old = *target;
  *target = value;
  return old;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Unpacks the arguments as the driver does: one pointer to each value.
template <auto kernel>
struct Launcher;

template <typename... Args, void (*kernel)(Args...)>
struct Launcher<kernel> {
  static void run(void** args) { call(args, std::index_sequence_for<Args...>{}); }

  template <size_t... I>
  static void call(void** args, std::index_sequence<I...>) {
    kernel(*(Args*)args[I]...);
  }
};

using Kernels = std::map<std::string, void (*)(void**)>;

enum Outcome { DONE, UNKNOWN_KERNEL, MISALIGNED_ACCESS };

static thread_local jmp_buf stopped;

// The compiler calls it before a misaligned access (-fsanitize=alignment), which would kill a GPU's context.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { longjmp(stopped, 1); }

// Run every thread of the grid, in ascending or descending order.
inline int launch(
    const Kernels& kernels,
    const char* name,
    const unsigned* blocks,
    const unsigned* threads,
    int descending,
    void** args) {
  const auto found = kernels.find(name);
  if (found == kernels.end()) return UNKNOWN_KERNEL;
  if (setjmp(stopped)) return MISALIGNED_ACCESS;
  gridDim = {blocks[0], blocks[1], 1};
  blockDim = {threads[0], threads[1], 1};
  const uint64_t total = (uint64_t)blocks[0] * blocks[1] * threads[0] * threads[1];
  for (uint64_t i = 0; i < total; ++i) {
    uint64_t rest = descending ? total - 1 - i : i;
    threadIdx.x = rest % threads[0], rest /= threads[0];
    threadIdx.y = rest % threads[1], rest /= threads[1];
    blockIdx.x = rest % blocks[0], rest /= blocks[0];
    blockIdx.y = rest;
    found->second(args);
  }
  return DONE;
}
