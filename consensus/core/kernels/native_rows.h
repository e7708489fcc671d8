/* Lines 3 and 6 of the trainer, for K workers in rows of n coordinates: a part of native.c.

`plan` gives the groups; a separable potential has one. The `size` of a vector in a group is its
|.|^2, or the largest |w_i|^2 of a separable potential. Where `forces` or `move_consensus` returns
0, or a row is left, nothing but memory has been written: the line search must look closer, or psi'
is not known here. */

#ifndef ROWS
#define ROWS

/* psi' as a function of s = scale^2 |w|^2; GIVEN: Python writes the factors 2 psi' scale^2. */
enum { GIVEN, CONSTANT, CUBE, TAN, LOG };

struct potential {
    int64_t psi, separable;
    double slope;  /* psi' if it is CONSTANT */
    double scale;  /* x = scale w */
    double bound;  /* of the domain: s < bound */
    double limit;  /* the s below which psi' is known for separable potentials */
    double eps;    /* of the type of vectors */
};

static double slope_at(const struct potential *phi, double s)
{
    switch (phi->psi) {
    case CUBE:
        return 1.5 * sqrt(s);
    case TAN:
        return 1.0 / (cos(s) * cos(s));
    case LOG:
        return 1.0 / (1.0 - s);
    default:
        return phi->slope;
    }
}

/* Whether the factor differs between the coordinates of a group. */
static int elementwise(const struct potential *phi)
{
    return phi->separable && phi->psi != CONSTANT;
}

static double norm_of(const struct potential *phi, double size)
{
    return phi->scale * sqrt(size);
}

/* The factors strength 2 psi' scale^2, nan outside the domain; of `elementwise` ones without psi'.
   Returns 0 where psi' is not known. */
static int find_factors(const struct potential *phi, double strength, const double *sizes,
                        int64_t count, double *factors)
{
    const double common = strength * 2.0 * phi->scale * phi->scale;
    for (int64_t i = 0; i < count; i++) {
        const double s = sizes[i] * phi->scale * phi->scale;
        factors[i] = common;
        if (elementwise(phi) && !(s < phi->limit))
            return 0;
        if (phi->psi == CONSTANT)
            factors[i] *= phi->slope;
        else if (!elementwise(phi))
            factors[i] *= phi->bound < INFINITY && !(s < phi->bound) ? NAN : slope_at(phi, s);
    }
    return 1;
}

/* `Domain.far_inside` of an upper bound of |x| + |d|, and the norm of u; not so if one is nan. */
static int far_inside(const struct potential *phi, double reach, double norm_of_u)
{
    const double radius = sqrt(phi->bound);
    const double rounding = phi->eps * (32.0 * radius + 4.0 * norm_of_u);
    return reach <= 0.875 * (radius - rounding);
}

/* Norms of a row in each group, in units of x. After a move these are upper bounds. */
struct norms {
    double *w, *v, *u; /* of u - z, v and u */
};

/* The size of a group from those of two of its blocks. */
static double join(const struct potential *phi, double a, double b)
{
    if (!phi->separable)
        return a + b;
    return isnan(a) || b <= a ? a : b;
}

/* Join `size` with that of a block of n coordinates; EACH computes coordinate j as `x`. |w_i| are
   compared as bits: in the order of the numbers, and nan is above inf. */
#define JOIN_SIZE(size, n, EACH)                                                                \
    if (!phi->separable) {                                                                      \
        SQUARE(n, EACH)                                                                         \
        (size) = join(phi, size, lane[0]);                                                      \
    } else {                                                                                    \
        BITS most = 0;                                                                          \
        for (int64_t j = 0; j < (n); j++) {                                                     \
            REAL x;                                                                             \
            BITS bits;                                                                          \
            EACH                                                                                \
            memcpy(&bits, &x, sizeof bits);                                                     \
            bits &= ~(BITS)0 >> 1;                                                              \
            most = bits > most ? bits : most;                                                   \
        }                                                                                       \
        REAL largest;                                                                           \
        memcpy(&largest, &most, sizeof largest);                                                \
        (size) = join(phi, size, (double)largest * largest);                                    \
    }

/* For each coordinate i of a block `pull` = factor w, with psi' of each coordinate where it differs
   between them; DO uses it. TAN as in profiles.py: 1 / cos^2 s = 1 + s^2 + (2/3) s^4 + ... */
#define EACH_PULL(n, W, DO)                                                                     \
    if (!elementwise(phi))                                                                      \
        for (int64_t i = 0; i < (n); i++) {                                                     \
            const REAL pull = factor * (W);                                                     \
            DO                                                                                  \
        }                                                                                       \
    else if (phi->psi == LOG)                                                                   \
        for (int64_t i = 0; i < (n); i++) {                                                     \
            const REAL w = W, pull = factor * w / ((REAL)1 - scale2 * (w * w));                 \
            DO                                                                                  \
        }                                                                                       \
    else                                                                                        \
        for (int64_t i = 0; i < (n); i++) {                                                     \
            const REAL w = W, s = scale2 * (w * w), s2 = s * s;                                 \
            const REAL pull = w * (factor * ((REAL)1 + (s2 + (REAL)(2.0 / 3.0) * (s2 * s2))));  \
            DO                                                                                  \
        }

#endif

/* Whether the factors, or nan, are numbers of the type. With a tiny eta they are too large for it:
   the operations of torch multiply w by the scale first. */
static int NAME(fit)(const struct potential *phi, const double *factors, int64_t count)
{
    double most = phi->scale * phi->scale;
    for (int64_t i = 0; i < count; i++)
        if (fabs(factors[i]) > most)
            most = fabs(factors[i]);
    return most <= LARGEST;
}

/* The sizes of u - z_k, (K, G). */
void NAME(sizes_of_rows)(const struct plan *plan, const struct potential *phi, const REAL *u,
                         const REAL *z, int64_t workers, double *sizes)
{
    memset(sizes, 0, (size_t)(workers * plan->num_groups) * sizeof(double));
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        const REAL *restrict center = u + place;
        for (int64_t k = 0; k < workers; k++) {
            const REAL *restrict own = z + k * plan->size + place;
            double *found = sizes + k * plan->num_groups + run->group;
            JOIN_SIZE(*found, n, x = center[j] - own[j];)
        }
    }
}

/* sum_k grad phi(u - z_k), in this order, to `out`; the reaches of the u - z_k (K, G) to `reach`,
   unless it is NULL. `sizes` and `factors` are memory (K, G); GIVEN: they hold both. */
int NAME(forces)(const struct plan *plan, const struct potential *phi, const REAL *u, const REAL *z,
                 int64_t workers, double *sizes, double *factors, REAL *out, REAL *reach)
{
    const int64_t count = workers * plan->num_groups;
    if (phi->psi != GIVEN) {
        if (phi->psi != CONSTANT || reach)
            NAME(sizes_of_rows)(plan, phi, u, z, workers, sizes);
        if (!find_factors(phi, 1.0, sizes, count, factors))
            return 0;
    }
    if (!NAME(fit)(phi, factors, count))
        return 0;
    const REAL scale2 = (REAL)(phi->scale * phi->scale);
    for (int64_t i = 0; reach && i < count; i++)
        reach[i] = (REAL)norm_of(phi, sizes[i]);
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        const REAL *restrict center = u + place;
        REAL *restrict sum = out + place;
        for (int64_t k = 0; k < workers; k++) {
            const REAL *restrict own = z + k * plan->size + place;
            const REAL factor = (REAL)factors[k * plan->num_groups + run->group];
            EACH_PULL(n, center[i] - own[i], sum[i] = k == 0 ? pull : sum[i] + pull;)
        }
    }
    return 1;
}

/* u += step total, if u - z_j is then far inside the domain for all reaches (G,). `memory` (2, G).
   The reaches and the memory are not used in an unbounded domain. */
int NAME(move_consensus)(const struct plan *plan, const struct potential *phi, REAL *u,
                         const REAL *total, const REAL *reach, double step, double *memory)
{
    double *of_total = memory, *of_u = memory + plan->num_groups;
    if (phi->bound < INFINITY) {
        memset(memory, 0, (size_t)(2 * plan->num_groups) * sizeof(double));
        ALL_BLOCKS {
            const int64_t n = LENGTH, g = run->group;
            const REAL *restrict sum = total + run->start + at, *restrict center = u + run->start + at;
            JOIN_SIZE(of_total[g], n, x = sum[j];)
            JOIN_SIZE(of_u[g], n, x = center[j];)
        }
        for (int64_t g = 0; g < plan->num_groups; g++)
            if (!far_inside(phi, reach[g] + fabs(step) * norm_of(phi, of_total[g]),
                            norm_of(phi, of_u[g])))
                return 0;
    }
    REAL *restrict center = u;
    const REAL *restrict sum = total, t = (REAL)step;
    for (int64_t i = 0; i < plan->size; i++)
        center[i] += t * sum[i];
    return 1;
}

/* Of each group the sizes of u - z, of v+ = kappa v - sigma (delta + nu z), and of u. */
static void NAME(sizes_before)(const struct plan *plan, const struct potential *phi, const REAL *u,
                               const REAL *z, const REAL *v, const REAL *delta, REAL kappa,
                               REAL sigma, REAL nu, double *of_w, double *of_v, double *of_u)
{
    double *found[] = {of_w, of_v, of_u};
    for (int i = 0; i < 3; i++)
        memset(found[i], 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at, g = run->group;
        const REAL *restrict own = z + place, *restrict center = u + place;
        const REAL *restrict velocity = v + place, *restrict gradient = delta + place;
        JOIN_SIZE(of_u[g], n, x = center[j];)
        JOIN_SIZE(of_w[g], n, x = center[j] - own[j];)
        JOIN_SIZE(of_v[g], n, x = kappa * velocity[j] - sigma * (gradient[j] + nu * own[j]);)
    }
}

/* v = kappa v - sigma (delta + nu z); z += d = v + force at u - z with these factors, NULL: 0;
   v = d if the coupling goes `through` the velocity. The sizes of the new v to `of_v`, unless it is
   NULL or there are factors. */
static void NAME(move_row)(const struct plan *plan, const struct potential *phi, const REAL *u,
                           REAL *z, REAL *v, const REAL *delta, REAL kappa, REAL sigma, REAL nu,
                           const double *factors, int through, double *of_v)
{
    const REAL scale2 = (REAL)(phi->scale * phi->scale);
    if (of_v)
        memset(of_v, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at, g = run->group;
        REAL *restrict own = z + place, *restrict velocity = v + place;
        const REAL *restrict gradient = delta + place, *restrict center = u + place;
#define NEXT(i) (kappa * velocity[i] - sigma * (gradient[i] + nu * own[i]))
        if (factors) {
            const REAL factor = (REAL)factors[g];
            EACH_PULL(n, center[i] - own[i],
                      const REAL alone = NEXT(i); const REAL both = alone + pull;
                      velocity[i] = through ? both : alone; own[i] += both;)
        } else if (of_v)
            JOIN_SIZE(of_v[g], n, velocity[j] = x = NEXT(j); own[j] += x;)
        else
            for (int64_t i = 0; i < n; i++) {
                velocity[i] = NEXT(i);
                own[i] += velocity[i];
            }
#undef NEXT
    }
}

/* The sizes that line 6 needs, (3, K, G): of the u - z_k, and in a bounded domain of the v_k+ and u. */
void NAME(sizes_of_line_6)(const struct plan *plan, const struct potential *phi, const REAL *u,
                           const REAL *z, const REAL *v, const REAL *delta, int64_t workers,
                           double kappa, double sigma, double nu, double *sizes)
{
    const int64_t count = workers * plan->num_groups;
    if (!(phi->bound < INFINITY)) {
        NAME(sizes_of_rows)(plan, phi, u, z, workers, sizes);
        return;
    }
    for (int64_t k = 0; k < workers; k++) {
        const int64_t row = k * plan->size;
        double *found = sizes + k * plan->num_groups;
        NAME(sizes_before)(plan, phi, u, z + row, v + row, delta + row, (REAL)kappa, (REAL)sigma,
                           (REAL)nu, found, found + count, found + 2 * count);
    }
}

/* Whether a row without a coupling stays far inside by its bounds: of all vectors only delta is
   read. Its sizes to `memory` (G,). */
static int NAME(stays_inside)(const struct plan *plan, const struct potential *phi,
                              const struct norms *row, const REAL *delta, double kappa,
                              double sigma, double nu, double *memory)
{
    memset(memory, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        const REAL *restrict gradient = delta + run->start + at;
        JOIN_SIZE(memory[run->group], LENGTH, x = gradient[j];)
    }
    for (int64_t g = 0; g < plan->num_groups; g++) {
        const double z = row->u[g] + row->w[g];
        const double of_step = fabs(sigma) * (norm_of(phi, memory[g]) + fabs(nu) * z);
        const double of_v = fabs(kappa) * row->v[g] + of_step;
        if (!far_inside(phi, row->w[g] + of_v, row->u[g]))
            return 0;
    }
    return 1;
}

/* Line 6 of the workers that stay far inside the domain, `coupled` to u by a strength `pull` or not.
   The others are marked `left`; returns their number. Each worker is decided by itself. `sizes` is
   memory (3, K, G), and `factors` (K, G); GIVEN: they hold both if `coupled`. `bounds` (3, K, G)
   are kept from call to call for a bounded domain, and are `known` if nobody else has changed u, z
   or v since the last one. */
int64_t NAME(move_rows)(const struct plan *plan, const struct potential *phi, const REAL *u, REAL *z,
                        REAL *v, const REAL *delta, int64_t workers, double kappa, double sigma,
                        double nu, double pull, int coupled, int through, double *sizes,
                        double *factors, uint8_t *left, double *bounds, int known)
{
    const int64_t groups = plan->num_groups, count = workers * groups;
    const int bounded = phi->bound < INFINITY, given = phi->psi == GIVEN && coupled;
    const double eps = phi->eps;
    int64_t others = 0;
    for (int64_t k = 0; k < workers; k++) {
        const int64_t row = k * plan->size, own = k * groups;
        double *of_w = sizes + own, *of_v = of_w + count, *of_u = of_v + count;
        double *pulls = coupled ? factors + own : NULL;
        const struct norms norms = {bounds + own, bounds + own + count, bounds + own + 2 * count};
        int inside = bounded && known && !coupled
                     && NAME(stays_inside)(plan, phi, &norms, delta + row, kappa, sigma, nu, of_v);
        const int measured = !inside;
        if (measured) {
            if (!given && bounded)
                NAME(sizes_before)(plan, phi, u, z + row, v + row, delta + row, (REAL)kappa,
                                   (REAL)sigma, (REAL)nu, of_w, of_v, of_u);
            else if (!given && coupled && phi->psi != CONSTANT)
                NAME(sizes_of_rows)(plan, phi, u, z + row, 1, of_w);
            inside = !coupled || given || find_factors(phi, pull, of_w, groups, pulls);
            for (int64_t g = 0; given && g < groups; g++)
                pulls[g] *= pull;
            inside = inside && (!coupled || NAME(fit)(phi, pulls, groups));
            for (int64_t g = 0; bounded && inside && g < groups; g++) {
                double c = coupled ? pulls[g] : 0.0;
                if (elementwise(phi)) /* psi' increases */
                    c *= slope_at(phi, phi->scale * phi->scale * of_w[g]);
                /* The triangle inequality: |x + d| <= |x| + |v+| + c |w|. */
                norms.v[g] = norm_of(phi, of_v[g]) + (through ? c * norm_of(phi, of_w[g]) : 0.0);
                norms.w[g] = (1.0 + c) * norm_of(phi, of_w[g]) + norm_of(phi, of_v[g]);
                norms.u[g] = norm_of(phi, of_u[g]);
                inside = far_inside(phi, norms.w[g], norms.u[g]);
            }
        }
        left[k] = (uint8_t)!inside;
        others += !inside;
        if (inside)
            NAME(move_row)(plan, phi, u, z + row, v + row, delta + row, (REAL)kappa, (REAL)sigma,
                           (REAL)nu, pulls, through, measured ? NULL : of_v);
        for (int64_t g = 0; bounded && g < groups; g++) {
            if (!measured) {
                norms.v[g] = norm_of(phi, of_v[g]);
                norms.w[g] += norms.v[g];
            }
            /* The rounding of z; a row that is left will move in an unknown way. */
            norms.w[g] = inside ? norms.w[g] + eps * (norms.u[g] + norms.w[g]) : INFINITY;
        }
    }
    return others;
}
