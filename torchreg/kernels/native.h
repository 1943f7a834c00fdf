/* What the kernels share: which processors they are compiled for, and whose threads run them. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)0)
#endif

/* One library for every x86 processor: the loader takes the widest vectors that this one has. */
#if !defined(EVERY_PROCESSOR) && defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#define EVERY_HALF __attribute__((target_clones("avx2", "default"))) /* avx512f alone has none of 16-bit numbers */
#endif
#endif
#ifndef EVERY_PROCESSOR
#define EVERY_PROCESSOR
#endif
#ifndef EVERY_HALF
#define EVERY_HALF
#endif

/* The numbers by which the Python side names a dtype. */
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }

INLINE float from_float16(uint16_t half) {
    const uint32_t modulus = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
    /* The exponent's bias moves from 15 to 127; the product is exact for subnormal numbers too. */
    const float finite = from_bits(modulus << 13) * 0x1p112f;
    const uint32_t infinite = (modulus << 13) | 0x7f800000u;
    uint32_t bits;
    memcpy(&bits, &finite, sizeof bits);
    return from_bits(sign | (modulus >= 0x7c00u ? infinite : bits));
}

/* A sum has one order of additions, whatever the processor, the compiler and the loop that it is part of: entry j goes
   to lane j % LANES, and the lanes are added up as the code says. A loop over the lanes makes vectors of any width. */
#define LANES (64 / (int64_t)sizeof(real))

/* GOMP_parallel of the OpenMP runtime that torch has loaded: its own team of threads runs the kernels. */
typedef void (*team)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    void (*task)(void *, int64_t);
    void *data;
    int64_t tasks, next;
} work;

static void take_tasks(void *shared) {
    work *all = shared;
    for (;;) {
#if defined(__GNUC__)
        const int64_t task = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
#else
        const int64_t task = all->next++; /* such a compiler's kernels run in one thread */
#endif
        if (task >= all->tasks) return;
        all->task(all->data, task);
    }
}

static void run(void (*task)(void *, int64_t), void *data, int64_t tasks, team parallel, int64_t threads) {
    work all = {task, data, tasks, 0};
#if defined(__GNUC__)
    if (parallel && threads > 1 && tasks > 1) {
        parallel(take_tasks, &all, (unsigned)(threads < tasks ? threads : tasks), 0);
        return;
    }
#endif
    (void)parallel, (void)threads;
    take_tasks(&all);
}
