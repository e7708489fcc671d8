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
   a tree. */
static double NAME(square)(const REAL *restrict w, int64_t n)
{
    double lane[LANES] = {0.0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) {
            const double x = w[i + k];
            lane[k] += x * x;
        }
    for (int k = 0; i < n; i++, k++) {
        const double x = w[i];
        lane[k] += x * x;
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++)
            lane[k] += lane[k + half];
    return lane[0];
}

/* u += step total in a block. */
static void NAME(advance)(REAL *restrict u, REAL step, const REAL *restrict total, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        u[i] += step * total[i];
}

/* p += c w in a block, w in place of z; then z = p if it is kept. */
static void NAME(add)(REAL *restrict p, REAL c, REAL *restrict z, int64_t n, int keep)
{
    for (int64_t i = 0; i < n; i++)
        p[i] += c * z[i];
    if (keep)
        memcpy(z, p, (size_t)n * sizeof(REAL));
}

/* The step of u in a group, for the sum of the weights. It may be 0, as (|x|^2)' underflows near 0;
   then the sum of c w is 0 as well. */
static REAL NAME(step)(double t_u, REAL weight)
{
    return (REAL)(-t_u / (weight < TINY ? TINY : weight));
}

/* Whether a |w_i| of a block is above `reach`, or nan. */
static int NAME(leaves)(const REAL *restrict w, REAL reach, int64_t n)
{
    int found = 0;
    for (int64_t i = 0; i < n; i++)
        found |= !(w[i] <= reach) | !(w[i] >= -reach);
    return found;
}

/* |u - z|^2 of each group, with p in place of z if it is to be `read`. */
void NAME(squares)(const struct plan *plan, int read, double *squares)
{
    memset(squares, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        OPERANDS;
        REAL w[BLOCK];
        const REAL *restrict own = read ? p : z;
        for (int64_t i = 0; i < n; i++)
            w[i] = u[i] - own[i];
        squares[run->group] += NAME(square)(w, n);
    }
}

/* z = p if it is to be `read`; message = c (u - z), and the factors c of the groups to `weights`,
   unless it is NULL. */
void NAME(start)(const struct plan *plan, REAL *message, int read, const double *factors,
                 REAL *weights)
{
    for (int64_t group = 0; weights && group < plan->num_groups; group++)
        weights[group] = (REAL)factors[group];
    ALL_BLOCKS {
        OPERANDS;
        REAL *restrict m = message + place;
        const REAL c = (REAL)factors[run->group];
        if (read)
            for (int64_t i = 0; i < n; i++) {
                m[i] = c * (u[i] - p[i]);
                z[i] = p[i];
            }
        else
            for (int64_t i = 0; i < n; i++)
                m[i] = c * (u[i] - z[i]);
    }
}

/* u += step total, unless it is NULL; p += c (u - z); z = p if it is kept. */
void NAME(move)(const struct plan *plan, const REAL *total, double step, double c, int keep)
{
    ALL_BLOCKS {
        OPERANDS;
        const REAL factor = (REAL)c;
        if (total)
            NAME(advance)(u, (REAL)step, total + place, n);
        if (keep)
            for (int64_t i = 0; i < n; i++) {
                p[i] += factor * (u[i] - z[i]);
                z[i] = p[i];
            }
        else
            for (int64_t i = 0; i < n; i++)
                p[i] += factor * (u[i] - z[i]);
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
        if (total)
            NAME(advance)(u, NAME(step)(t_u, weights[run->group]), total + place, n);
        for (int64_t i = 0; i < n; i++)
            z[i] = u[i] - z[i];
        squares[run->group] += NAME(square)(z, n);
    }
}

/* p += c w, w in place of z; then z = p if it is kept. In the `chosen` groups; NULL: in all. */
void NAME(pull)(const struct plan *plan, const double *factors, const uint8_t *chosen, int keep)
{
    ALL_BLOCKS {
        OPERANDS;
        if (!chosen || chosen[run->group])
            NAME(add)(p, (REAL)factors[run->group], z, n, keep);
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
   written. Message: c w (n,), weights (n,), and the weight of all coordinates, or nan. Returns the
   number of far groups. */
int64_t NAME(start_near)(const struct plan *plan, REAL *message, int read, double reach, double c,
                         uint8_t *far)
{
    const REAL factor = (REAL)c, weight = factor < TINY ? TINY : factor;
    REAL *weights = message + plan->size;
    int64_t count = 0;
    EACH_GROUP {
        int leaves = 0;
        EACH_BLOCK(first, last) {
            OPERANDS;
            REAL *restrict m = message + place;
            if (read)
                memcpy(z, p, (size_t)n * sizeof(REAL));
            for (int64_t i = 0; i < n; i++)
                m[i] = u[i] - z[i];
            leaves |= reach < INFINITY && NAME(leaves)(m, (REAL)reach, n);
        }
        far[first->group] = (uint8_t)leaves;
        count += leaves;
        if (leaves)
            continue;
        EACH_BLOCK(first, last) {
            OPERANDS;
            REAL *restrict m = message + place, *restrict own = weights + place;
            for (int64_t i = 0; i < n; i++)
                m[i] *= factor;
            for (int64_t i = 0; i < n; i++)
                own[i] = weight;
        }
    }
    weights[plan->size] = count ? (REAL)NAN : weight;
    return count;
}

/* `move` of a separable potential. `total` is NULL, or a sum of messages of `start_near`. In far
   groups w = u - z remains in place of z, and p as it is: `pull` must follow. Returns the number of
   far groups. */
int64_t NAME(move_near)(const struct plan *plan, const REAL *total, double t_u, double reach,
                        double c, int keep, uint8_t *far)
{
    const REAL *weights = total ? total + plan->size : NULL;
    const REAL shared = total ? weights[plan->size] : (REAL)0;
    int64_t count = 0;
    EACH_GROUP {
        int leaves = 0;
        EACH_BLOCK(first, last) {
            OPERANDS;
            if (total && !isnan(shared))
                NAME(advance)(u, NAME(step)(t_u, shared), total + place, n);
            else if (total)
                for (int64_t i = 0; i < n; i++)
                    u[i] -= (REAL)t_u * (total[place + i] / weights[place + i]);
            for (int64_t i = 0; i < n; i++)
                z[i] = u[i] - z[i];
            leaves |= reach < INFINITY && NAME(leaves)(z, (REAL)reach, n);
        }
        far[first->group] = (uint8_t)leaves;
        count += leaves;
        if (!leaves)
            EACH_BLOCK(first, last) {
                OPERANDS;
                NAME(add)(p, (REAL)c, z, n, keep);
            }
    }
    return count;
}

#include "native_rows.h"

#endif
