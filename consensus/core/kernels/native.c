/* Lines 3 and 6 on a CPU, in as few passes over memory as they need.

native.py compiles this file where a compiler is. native_together.py calls it for Coupling, and
native_kernel.py for the trainer. Plain C11: it needs no header of Python or torch. All
floating-point operations are those written here, each rounded to its type (no contraction, no
-ffast-math), and sums have a fixed order, so the bits do not depend on the compiler or on the width
of its vector instructions.

    p   the parameters, in runs at different addresses
    u   the consensus variable, and z, the copy of this worker: vectors (n,)
    c   a factor for each group of coordinates: a layer, or a tile of 2^14 coordinates

Errors do not exist: values that are not finite are passed on. */

#ifndef REAL

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "operations are not rounded one by one"
#endif

#define BLOCK 1024 /* coordinates that are taken together: 4 or 8 KiB of each vector */
#define LANES 16   /* partial sums in a block */

/* A part of a parameter that lies in one group, without gaps. */
struct run {
    void *own; /* p */
    int64_t start, count; /* in vectors (n,) */
    int64_t group;
};

struct plan {
    const struct run *runs; /* in the order of vectors and groups */
    int64_t num_runs, num_groups, size; /* n */
    void *u, *z;
};

static const struct run *end_of_group(const struct run *run, const struct run *end)
{
    const int64_t group = run->group;
    while (run < end && run->group == group)
        run++;
    return run;
}

/* Blocks of all runs, and of runs [first, last). */
#define EACH_BLOCK(first, last)                                   \
    for (const struct run *run = (first); run < (last); run++)    \
        for (int64_t at = 0; at < run->count; at += BLOCK)
#define ALL_BLOCKS EACH_BLOCK(plan->runs, plan->runs + plan->num_runs)
/* Runs [first, last) of each group. */
#define EACH_GROUP                                                                              \
    for (const struct run *first = plan->runs, *last, *end = first + plan->num_runs;            \
         first < end && (last = end_of_group(first, end)); first = last)
/* The coordinates in a block. */
#define LENGTH (run->count - at < BLOCK ? run->count - at : BLOCK)
/* The operands of a block of Coupling. */
#define OPERANDS                                                             \
    const int64_t n = LENGTH;                                                \
    const int64_t place = run->start + at;                                   \
    REAL *restrict p = (REAL *)run->own + at;                                \
    REAL *restrict u = (REAL *)plan->u + place;                              \
    REAL *restrict z = (REAL *)plan->z + place;                              \
    (void)p, (void)u, (void)z

/* The code below, for both types. */
#define REAL float
#define BITS uint32_t
#define TINY FLT_MIN
#define LARGEST FLT_MAX
#define NAME(name) name##_f32
#include "native.c"
#undef REAL
#undef BITS
#undef TINY
#undef LARGEST
#undef NAME
#define REAL double
#define BITS uint64_t
#define TINY DBL_MIN
#define LARGEST DBL_MAX
#define NAME(name) name##_f64
#include "native.c"

#else

/* |w|^2 of a block, in double: lane k has the coordinates k, k + 16, ..., and lanes are added up in
   a tree. EACH computes coordinate j as `x`. */
#define SQUARE(n, EACH)                                                                         \
    double lane[LANES] = {0.0};                                                                 \
    {                                                                                           \
        int64_t i = 0;                                                                          \
        for (; i + LANES <= (n); i += LANES)                                                    \
            for (int k = 0; k < LANES; k++) {                                                   \
                const int64_t j = i + k;                                                        \
                REAL x;                                                                         \
                EACH                                                                            \
                lane[k] += (double)x * (double)x;                                               \
            }                                                                                   \
        for (int k = 0; i + k < (n); k++) {                                                     \
            const int64_t j = i + k;                                                            \
            REAL x;                                                                             \
            EACH                                                                                \
            lane[k] += (double)x * (double)x;                                                   \
        }                                                                                       \
        for (int half = LANES / 2; half > 0; half /= 2)                                         \
            for (int k = 0; k < half; k++)                                                      \
                lane[k] += lane[k + half];                                                      \
    }

/* The step of u in a group, for the sum of the weights. It may be 0, as (|x|^2)' underflows near 0;
   then the sum of c w is 0 as well. */
static REAL NAME(step)(double t_u, REAL weight)
{
    return (REAL)(-t_u / (weight < TINY ? TINY : weight));
}

/* z = p if it is to be `read`; message = u - z, and its |.|^2 of each group. */
void NAME(start_radial)(const struct plan *plan, REAL *message, int read, double *squares)
{
    memset(squares, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        OPERANDS;
        REAL *restrict m = message + place;
        SQUARE(n, const REAL own = read ? p[j] : z[j]; if (read) z[j] = own; m[j] = x = u[j] - own;)
        squares[run->group] += lane[0];
    }
}

/* The sum of c_j w_j over messages in a block, along the tree of tree_sum.py. */
static void NAME(add_block)(REAL *const *messages, int64_t count, int64_t factor, int64_t place,
                            int64_t n, REAL *restrict sum)
{
    if (count == 1) {
        const REAL *restrict w = messages[0] + place, c = messages[0][factor];
        for (int64_t i = 0; i < n; i++)
            sum[i] = c * w[i];
        return;
    }
    if (count == 2) { /* as below, in one loop */
        const REAL *restrict w = messages[0] + place, c = messages[0][factor];
        const REAL *restrict y = messages[1] + place, d = messages[1][factor];
        for (int64_t i = 0; i < n; i++)
            sum[i] = c * w[i] + d * y[i];
        return;
    }
    int64_t children = 2;
    while (count % children)
        children++;
    const int64_t leaves = count / children;
    NAME(add_block)(messages, leaves, factor, place, n, sum);
    for (int64_t child = 1; child < children; child++) {
        REAL part[BLOCK];
        NAME(add_block)(messages + child * leaves, leaves, factor, place, n, part);
        for (int64_t i = 0; i < n; i++)
            sum[i] += part[i];
    }
}

/* total = sum of c_j w_j in some runs. A message is w (size,), and the factor c of each group. */
void NAME(add_scaled)(const struct run *runs, int64_t num_runs, int64_t size,
                      REAL *const *messages, int64_t count, REAL *total)
{
    EACH_BLOCK(runs, runs + num_runs)
        NAME(add_block)(messages, count, size + run->group, run->start + at, LENGTH,
                        total + run->start + at);
}

/* message *= the factor c of each group. */
void NAME(scale)(const struct plan *plan, REAL *message, const double *factors)
{
    ALL_BLOCKS {
        REAL *restrict m = message + run->start + at;
        const REAL c = (REAL)factors[run->group];
        for (int64_t i = 0; i < LENGTH; i++)
            m[i] *= c;
    }
}

/* z = p if it is to be `read`; message = u - z. */
void NAME(start)(const struct plan *plan, REAL *message, int read)
{
    ALL_BLOCKS {
        OPERANDS;
        REAL *restrict m = message + place;
        for (int64_t i = 0; i < n; i++) {
            const REAL own = read ? p[i] : z[i];
            if (read)
                z[i] = own;
            m[i] = u[i] - own;
        }
    }
}

/* u += step total, unless it is NULL; p += c (u - z); z = p if it is kept. */
void NAME(move)(const struct plan *plan, const REAL *total, double step, double c, int keep)
{
    ALL_BLOCKS {
        OPERANDS;
        const REAL factor = (REAL)c, t = (REAL)step;
        const REAL *restrict sum = total ? total + place : NULL;
        for (int64_t i = 0; i < n; i++) {
            REAL center = u[i];
            if (total)
                u[i] = center += t * sum[i];
            p[i] += factor * (center - z[i]);
            if (keep)
                z[i] = p[i];
        }
    }
}

/* u -= t_u total / weight, unless they are NULL; z = u - z, and its |.|^2 of each group. `pull`
   must follow. */
void NAME(lead)(const struct plan *plan, const REAL *total, const REAL *weights, double t_u,
                double *squares)
{
    memset(squares, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        OPERANDS;
        const REAL step = total ? NAME(step)(t_u, weights[run->group]) : 0;
        const REAL *restrict sum = total ? total + place : NULL;
        SQUARE(n, REAL center = u[j]; if (total) u[j] = center += step * sum[j];
                  z[j] = x = center - z[j];)
        squares[run->group] += lane[0];
    }
}

/* p += c w, w in place of z; then z = p if it is kept. In the `chosen` groups; NULL: in all. */
void NAME(pull)(const struct plan *plan, const double *factors, const uint8_t *chosen, int keep)
{
    ALL_BLOCKS {
        OPERANDS;
        const REAL c = (REAL)factors[run->group];
        if (chosen && !chosen[run->group])
            continue;
        for (int64_t i = 0; i < n; i++)
            p[i] += c * z[i];
        if (keep)
            memcpy(z, p, (size_t)n * sizeof(REAL));
    }
}

/* z = p = u, or u and p - z if p was `displaced` from z. */
void NAME(replace)(const struct plan *plan, int displaced)
{
    ALL_BLOCKS {
        OPERANDS;
        if (displaced)
            for (int64_t i = 0; i < n; i++)
                p[i] = p[i] - z[i] + u[i];
        else
            memcpy(p, u, (size_t)n * sizeof(REAL));
        memcpy(z, p, (size_t)n * sizeof(REAL));
    }
}

/* `start` of a separable potential, whose factors are one number c up to a size |w_i| of `reach`.
   In groups that have a larger |w_i|, which are marked `far`, message = w, and no weight is
   written. Message: c w (n,), weights (n,), and the weight of all coordinates, or nan. In `brief`
   messages the weights are written only if that is nan. Returns the number of far groups. */
int64_t NAME(start_near)(const struct plan *plan, REAL *message, int read, double reach, double c,
                         int brief, uint8_t *far)
{
    const REAL factor = (REAL)c, weight = factor < TINY ? TINY : factor, limit = (REAL)reach;
    REAL *weights = message + plan->size;
    int64_t count = 0;
    EACH_GROUP {
        int leaves = 0;
        EACH_BLOCK(first, last) {
            OPERANDS;
            REAL *restrict m = message + place;
            for (int64_t i = 0; i < n; i++) {
                const REAL own = read ? p[i] : z[i], w = u[i] - own;
                if (read)
                    z[i] = own;
                m[i] = factor * w;
                leaves |= !(w <= limit) | !(w >= -limit);
            }
        }
        far[first->group] = (uint8_t)leaves;
        count += leaves;
        if (leaves)
            EACH_BLOCK(first, last) {
                OPERANDS;
                REAL *restrict m = message + place;
                for (int64_t i = 0; i < n; i++)
                    m[i] = u[i] - z[i];
            }
    }
    weights[plan->size] = count ? (REAL)NAN : weight;
    if (count || !brief)
        ALL_BLOCKS {
            REAL *restrict own = weights + run->start + at;
            if (!far[run->group])
                for (int64_t i = 0; i < LENGTH; i++)
                    own[i] = weight;
        }
    return count;
}

/* `move` of a separable potential. `total` is NULL, or a sum of messages of `start_near`. In far
   groups w = u - z remains in place of z, and p as it is: `pull` must follow. Returns the number of
   far groups. `memory` has room for p of a group. */
int64_t NAME(move_near)(const struct plan *plan, const REAL *total, double t_u, double reach,
                        double c, int keep, REAL *restrict memory, uint8_t *far)
{
    const REAL *weights = total ? total + plan->size : NULL;
    const REAL shared = total ? weights[plan->size] : (REAL)1;
    const REAL factor = (REAL)c, limit = (REAL)reach, step = NAME(step)(t_u, shared);
    int64_t count = 0;
    EACH_GROUP {
        int leaves = 0;
        REAL *restrict before = memory;
        EACH_BLOCK(first, last) { /* as if the group were near: one pass over memory */
            OPERANDS;
            const REAL *restrict sum = total ? total + place : NULL;
            if (isnan(shared))
                for (int64_t i = 0; i < n; i++)
                    u[i] -= (REAL)t_u * (sum[i] / weights[place + i]);
            const REAL *restrict rest = isnan(shared) ? NULL : sum;
            for (int64_t i = 0; i < n; i++) {
                REAL center = u[i];
                if (rest)
                    u[i] = center += step * rest[i];
                const REAL w = center - z[i];
                leaves |= !(w <= limit) | !(w >= -limit);
                before[i] = p[i];
                p[i] += factor * w;
            }
            before += n;
        }
        far[first->group] = (uint8_t)leaves;
        count += leaves;
        before = memory;
        if (leaves || keep)
            EACH_BLOCK(first, last) {
                OPERANDS;
                if (leaves)
                    for (int64_t i = 0; i < n; i++) {
                        z[i] = u[i] - z[i];
                        p[i] = before[i];
                    }
                else
                    memcpy(z, p, (size_t)n * sizeof(REAL));
                before += n;
            }
    }
    return count;
}

#include "native_rows.h"

#endif
