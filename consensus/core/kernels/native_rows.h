/* Lines 3 and 6 of the trainer, for K workers in rows of n coordinates: a part of native.c, for
   each type. `plan` gives the groups. */

/* |u - z_k|^2 of each group, (K, G). */
void NAME(squares_of_rows)(const struct plan *plan, const REAL *u, const REAL *z, int64_t workers,
                           double *squares)
{
    memset(squares, 0, (size_t)(workers * plan->num_groups) * sizeof(double));
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        REAL w[BLOCK];
        for (int64_t k = 0; k < workers; k++) {
            const REAL *restrict own = z + k * plan->size + place;
            for (int64_t i = 0; i < n; i++)
                w[i] = u[place + i] - own[i];
            squares[k * plan->num_groups + run->group] += NAME(square)(w, n);
        }
    }
}

/* sum_k c_k (u - z_k), in this order; c (K, G). */
void NAME(forces)(const struct plan *plan, const REAL *u, const REAL *z, int64_t workers,
                  const double *factors, REAL *out)
{
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        REAL *restrict sum = out + place;
        for (int64_t k = 0; k < workers; k++) {
            const REAL *restrict own = z + k * plan->size + place;
            const REAL c = (REAL)factors[k * plan->num_groups + run->group];
            if (k == 0)
                for (int64_t i = 0; i < n; i++)
                    sum[i] = c * (u[place + i] - own[i]);
            else
                for (int64_t i = 0; i < n; i++)
                    sum[i] += c * (u[place + i] - own[i]);
        }
    }
}

/* |a|^2 and |b|^2 of each group. */
void NAME(squares_of_both)(const struct plan *plan, const REAL *a, const REAL *b, double *of_a,
                           double *of_b)
{
    memset(of_a, 0, (size_t)plan->num_groups * sizeof(double));
    memset(of_b, 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        of_a[run->group] += NAME(square)(a + run->start + at, LENGTH);
        of_b[run->group] += NAME(square)(b + run->start + at, LENGTH);
    }
}

/* u += step total. */
void NAME(move_u)(const struct plan *plan, REAL *u, const REAL *total, double step)
{
    NAME(advance)(u, (REAL)step, total, plan->size);
}

/* Of each group: |u - z|^2, |v+|^2 and |u|^2, with v+ = kappa v - sigma (delta + nu z). */
void NAME(squares_before)(const struct plan *plan, const REAL *u, const REAL *z, const REAL *v,
                          const REAL *delta, double kappa, double sigma, double nu, double *of_w,
                          double *of_v, double *of_u)
{
    const REAL k = (REAL)kappa, s = (REAL)sigma, weight = (REAL)nu;
    double *found[] = {of_w, of_v, of_u};
    for (int i = 0; i < 3; i++)
        memset(found[i], 0, (size_t)plan->num_groups * sizeof(double));
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        const REAL *restrict own = z + place;
        REAL w[BLOCK];
        of_u[run->group] += NAME(square)(u + place, n);
        for (int64_t i = 0; i < n; i++)
            w[i] = u[place + i] - own[i];
        of_w[run->group] += NAME(square)(w, n);
        for (int64_t i = 0; i < n; i++)
            w[i] = k * v[place + i] - s * (delta[place + i] + weight * own[i]);
        of_v[run->group] += NAME(square)(w, n);
    }
}

/* v = kappa v - sigma (delta + nu z); z += d = v + c (u - z), c by groups, NULL: 0; v = d if the
   coupling goes `through` the velocity. */
void NAME(move_row)(const struct plan *plan, const REAL *u, REAL *z, REAL *v, const REAL *delta,
                    double kappa, double sigma, double nu, const double *factors, int through)
{
    const REAL k = (REAL)kappa, s = (REAL)sigma, weight = (REAL)nu;
    ALL_BLOCKS {
        const int64_t n = LENGTH, place = run->start + at;
        REAL *restrict own = z + place, *restrict velocity = v + place;
        const REAL *restrict center = u + place, *restrict gradient = delta + place;
        const REAL c = factors ? (REAL)factors[run->group] : (REAL)0;
        if (!factors)
            for (int64_t i = 0; i < n; i++) {
                velocity[i] = k * velocity[i] - s * (gradient[i] + weight * own[i]);
                own[i] += velocity[i];
            }
        else if (through)
            for (int64_t i = 0; i < n; i++) {
                velocity[i] = k * velocity[i] - s * (gradient[i] + weight * own[i])
                              + c * (center[i] - own[i]);
                own[i] += velocity[i];
            }
        else
            for (int64_t i = 0; i < n; i++) {
                velocity[i] = k * velocity[i] - s * (gradient[i] + weight * own[i]);
                own[i] += velocity[i] + c * (center[i] - own[i]);
            }
    }
}
