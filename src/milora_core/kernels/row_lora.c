/*
 * LoRA or DoRA for the rows of a decode step, and for chunks of prompts, whose tokens are rows. A piece is one adapter's
 * part in a module. For each row i of a piece:
 *
 *     d    = A x[i]                                   (rank)
 *     y[i] = y[i] + g_i s B d                         LoRA
 *     y[i] = y[i] + g_i ((f - 1) (y[i] - bias) + f s B d)     DoRA, with one factor f per feature
 *
 * Weights are read once, in place, in bfloat16 or float32. All sums are in float32 and rounded once. Threads divide the
 * work by features, so the result does not depend on the number of threads.
 */

#include "numbers.h"

struct plan {
    int64_t pieces, rank, d_in, d_out;
    int64_t b_stride;           /* elements from one row of B to the next */
    int64_t threads;
    int64_t y_stride;           /* elements from one row of the result to the next */
    const int64_t *starts;      /* (pieces + 1): index of each piece's first entry */
    const int64_t *rows;        /* (entries): row index in x and in the result */
    const float *gates;         /* (entries) */
    const float *scalings;      /* (pieces) */
    const void *const *a;       /* (pieces): (rank, d_in) */
    const void *const *b;       /* (pieces): (d_out, rank) */
    const float *const *factors; /* (pieces): (d_out), or NULL for LoRA */
    const float *bias;          /* (d_out), or NULL */
    float *low;                 /* (entries, rank): scratch memory for d */
};

#define FEATURES 64 /* output features per thread at a time */
#define RANKS 4     /* rows of A multiplied together */
#define GROUP 4     /* rows of x multiplied together; GROUP * RANKS is LANES */
#define MANY 8      /* rows of a piece from which transposing B pays */
#define MOST 128    /* the maximum number of rows in a piece of a packed pass, so threads can divide a long chunk */

/* Clang has only the first built-in, GCC before 12 only the second. */
#ifdef __clang__
#define SHUFFLED(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define SHUFFLED(A, B, ...) __builtin_shuffle(A, B, (bit_lanes){__VA_ARGS__})
#endif

/* GCC otherwise loads a vector again for each product, and a core makes fewer loads than products. */
#ifdef __AVX512F__
#define KEPT(VECTOR) __asm__("" : "+v"(VECTOR))
#else
#define KEPT(VECTOR)
#endif

/* Each level adds pairs of lanes of two vectors. After log2(LANES) levels, lane i is the sum of the i-th vector. */
static inline lanes halved_16(lanes a, lanes b)
{
    return SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

static inline lanes halved_8(lanes a, lanes b)
{
    return SHUFFLED(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLED(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

static inline lanes halved_4(lanes a, lanes b)
{
    return SHUFFLED(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLED(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

static inline lanes halved_2(lanes a, lanes b)
{
    return SHUFFLED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLED(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

#define DEFINE(NAME, X, READ_X, WRITE_X, W, READ_W, LANES_OF_X, LANES_OF_W)                                            \
    /* The dot products of GROUP rows of x with RANKS rows of A; `sums` has those of one row of x side by side. */     \
    static inline void down_many_##NAME(const W *a, const X *const *x, int64_t d_in, float *sums)                      \
    {                                                                                                                  \
        lanes parts[GROUP * RANKS] = {0};                                                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= d_in; i += LANES) {                                                                        \
            lanes of_a[RANKS];                                                                                         \
            for (int r = 0; r < RANKS; r++) {                                                                          \
                of_a[r] = LANES_OF_W(a + r * d_in + i);                                                                \
                KEPT(of_a[r]);                                                                                         \
            }                                                                                                          \
            for (int t = 0; t < GROUP; t++) {                                                                          \
                lanes of_x = LANES_OF_X(x[t] + i);                                                                     \
                KEPT(of_x);                                                                                            \
                for (int r = 0; r < RANKS; r++)                                                                        \
                    parts[t * RANKS + r] += of_a[r] * of_x;                                                            \
            }                                                                                                          \
        }                                                                                                              \
        for (int k = 0; k < LANES / 2; k++)                                                                            \
            parts[k] = halved_16(parts[2 * k], parts[2 * k + 1]);                                                      \
        for (int k = 0; k < LANES / 4; k++)                                                                            \
            parts[k] = halved_8(parts[2 * k], parts[2 * k + 1]);                                                       \
        for (int k = 0; k < LANES / 8; k++)                                                                            \
            parts[k] = halved_4(parts[2 * k], parts[2 * k + 1]);                                                       \
        parts[0] = halved_2(parts[0], parts[1]);                                                                       \
        memcpy(sums, parts, sizeof parts[0]);                                                                          \
        for (; i < d_in; i++)                                                                                          \
            for (int k = 0; k < LANES; k++)                                                                            \
                sums[k] += READ_W(a[k % RANKS * d_in + i]) * READ_X(x[k / RANKS][i]);                                  \
    }                                                                                                                  \
                                                                                                                       \
    static void down_##NAME(const struct plan *plan, int64_t piece, int64_t first, const X *x)                         \
    {                                                                                                                  \
        const int64_t d_in = plan->d_in, rank = plan->rank, end = plan->starts[piece + 1];                             \
        const W *a = (const W *)plan->a[piece] + first * d_in;                                                         \
        int64_t entry = plan->starts[piece];                                                                           \
        for (; first + RANKS <= rank && entry + GROUP <= end; entry += GROUP) {                                        \
            const X *rows[GROUP];                                                                                      \
            float sums[LANES];                                                                                         \
            for (int t = 0; t < GROUP; t++)                                                                            \
                rows[t] = x + plan->rows[entry + t] * d_in;                                                            \
            down_many_##NAME(a, rows, d_in, sums);                                                                     \
            for (int t = 0; t < GROUP; t++)                                                                            \
                memcpy(plan->low + (entry + t) * rank + first, sums + t * RANKS, RANKS * sizeof(float));               \
        }                                                                                                              \
        for (; entry < end; entry++) {                                                                                 \
            const X *of_row = x + plan->rows[entry] * d_in;                                                            \
            float *low = plan->low + entry * rank + first;                                                             \
            if (first + RANKS <= rank) {                                                                               \
                const W *a1 = a + d_in, *a2 = a1 + d_in, *a3 = a2 + d_in;                                              \
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                                  \
                _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") for (int64_t i = 0; i < d_in; i++)                   \
                {                                                                                                      \
                    float value = READ_X(of_row[i]);                                                                   \
                    s0 += READ_W(a[i]) * value;                                                                        \
                    s1 += READ_W(a1[i]) * value;                                                                       \
                    s2 += READ_W(a2[i]) * value;                                                                       \
                    s3 += READ_W(a3[i]) * value;                                                                       \
                }                                                                                                      \
                low[0] = s0, low[1] = s1, low[2] = s2, low[3] = s3;                                                    \
            } else {                                                                                                   \
                for (int64_t r = 0; first + r < rank; r++) {                                                           \
                    float sum = 0;                                                                                     \
                    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < d_in; i++) sum +=                   \
                        READ_W(a[r * d_in + i]) * READ_X(of_row[i]);                                                   \
                    low[r] = sum;                                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static inline lanes dot_##NAME(const W *b, const float *low, int64_t rank)                                         \
    {                                                                                                                  \
        lanes sum = LANES_OF_W(b) * lanes_of_float32(low);                                                             \
        for (int64_t r = LANES; r < rank; r += LANES)                                                                  \
            sum += LANES_OF_W(b + r) * lanes_of_float32(low + r);                                                      \
        return sum;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* The dot products of LANES rows of B, `stride` apart, with `low`; `rank` is a multiple of LANES. */              \
    static inline lanes dots_##NAME(const W *b, int64_t stride, const float *low, int64_t rank)                        \
    {                                                                                                                  \
        lanes eights[2];                                                                                               \
        for (int i = 0; i < 2; i++) {                                                                                  \
            lanes fours[2];                                                                                            \
            for (int j = 0; j < 2; j++) {                                                                              \
                lanes twos[2];                                                                                         \
                for (int k = 0; k < 2; k++) {                                                                          \
                    const W *of_pairs = b + (8 * i + 4 * j + 2 * k) * stride;                                          \
                    twos[k] = halved_16(dot_##NAME(of_pairs, low, rank), dot_##NAME(of_pairs + stride, low, rank));    \
                }                                                                                                      \
                fours[j] = halved_8(twos[0], twos[1]);                                                                 \
            }                                                                                                          \
            eights[i] = halved_4(fours[0], fours[1]);                                                                  \
        }                                                                                                              \
        return halved_2(eights[0], eights[1]);                                                                         \
    }                                                                                                                  \
                                                                                                                       \
    /* The same for rank 8 or 4 where the rows of B are adjacent, so a vector holds two or four of them. */            \
    static inline lanes few_dots_##NAME(const W *b, lanes low, int64_t rank)                                           \
    {                                                                                                                  \
        lanes eights[2];                                                                                               \
        for (int i = 0; i < 2; i++) {                                                                                  \
            lanes fours[2];                                                                                            \
            for (int j = 0; j < 2; j++) {                                                                              \
                const W *of_pairs = b + (8 * i + 4 * j) * rank;                                                        \
                fours[j] = LANES_OF_W(of_pairs) * low;                                                                 \
                if (rank == 8)                                                                                         \
                    fours[j] = halved_8(fours[j], LANES_OF_W(of_pairs + LANES) * low);                                 \
            }                                                                                                          \
            eights[i] = halved_4(fours[0], fours[1]);                                                                  \
        }                                                                                                              \
        return halved_2(eights[0], eights[1]);                                                                         \
    }                                                                                                                  \
                                                                                                                       \
    /* Adds the products of one row and one block of features to the result. */                                        \
    static inline void write_##NAME(const struct plan *plan, int64_t piece, int64_t entry, int64_t first,              \
                                    int64_t end, const float *sums, X *y)                                              \
    {                                                                                                                  \
        const float *factors = plan->factors[piece];                                                                   \
        const float gate = plan->gates[entry], scaling = plan->scalings[piece];                                        \
        X *of_row = y + plan->rows[entry] * plan->y_stride;                                                            \
        for (int64_t o = first; o < end; o++) {                                                                        \
            float value = READ_X(of_row[o]), change = sums[o - first] * scaling;                                       \
            if (factors) {                                                                                             \
                float bare = plan->bias ? value - plan->bias[o] : value;                                               \
                change = (factors[o] - 1) * bare + factors[o] * change;                                                \
            }                                                                                                          \
            of_row[o] = WRITE_X(value + gate * change);                                                                \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* For many rows, a block of B is transposed once, so its features fill vectors whatever the rank is. */           \
    static void up_many_##NAME(const struct plan *plan, int64_t piece, int64_t first, int64_t end, X *y)               \
    {                                                                                                                  \
        const int64_t rank = plan->rank, last = plan->starts[piece + 1];                                               \
        const W *b = (const W *)plan->b[piece] + first * plan->b_stride;                                               \
        lanes transposed[rank][FEATURES / LANES];                                                                      \
        for (int64_t o = 0; o < FEATURES; o++)                                                                         \
            for (int64_t r = 0; r < rank; r++)                                                                         \
                transposed[r][o / LANES][o % LANES] = first + o < end ? READ_W(b[o * plan->b_stride + r]) : 0;         \
        for (int64_t entry = plan->starts[piece]; entry < last; entry += GROUP) {                                      \
            const int64_t count = entry + GROUP <= last ? GROUP : last - entry;                                        \
            const float *low[GROUP];                                                                                   \
            for (int t = 0; t < GROUP; t++)                                                                            \
                low[t] = plan->low + (t < count ? entry + t : entry) * rank;                                           \
            lanes sums[GROUP][FEATURES / LANES] = {0};                                                                 \
            for (int64_t r = 0; r < rank; r++) {                                                                       \
                lanes of_b[FEATURES / LANES];                                                                          \
                for (int k = 0; k < FEATURES / LANES; k++) {                                                           \
                    of_b[k] = transposed[r][k];                                                                        \
                    KEPT(of_b[k]);                                                                                     \
                }                                                                                                      \
                for (int t = 0; t < GROUP; t++)                                                                        \
                    for (int k = 0; k < FEATURES / LANES; k++)                                                         \
                        sums[t][k] += low[t][r] * of_b[k];                                                             \
            }                                                                                                          \
            for (int t = 0; t < count; t++)                                                                            \
                write_##NAME(plan, piece, entry + t, first, end, (const float *)sums[t], y);                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void up_##NAME(const struct plan *plan, int64_t piece, int64_t first, X *y)                                 \
    {                                                                                                                  \
        const int64_t rank = plan->rank, d_out = plan->d_out;                                                          \
        const int64_t end = first + FEATURES < d_out ? first + FEATURES : d_out;                                       \
        const W *b = (const W *)plan->b[piece];                                                                        \
        if (plan->starts[piece + 1] - plan->starts[piece] >= MANY) {                                                   \
            up_many_##NAME(plan, piece, first, end, y);                                                                \
            return;                                                                                                    \
        }                                                                                                              \
        for (int64_t entry = plan->starts[piece]; entry < plan->starts[piece + 1]; entry++) {                          \
            const float *low = plan->low + entry * rank;                                                               \
            float sums[FEATURES];                                                                                      \
            int64_t o = first;                                                                                         \
            if ((rank == 8 || rank == 4) && plan->b_stride == rank) {                                                  \
                float repeated[LANES];                                                                                 \
                for (int64_t r = 0; r < LANES; r++)                                                                    \
                    repeated[r] = low[r % rank];                                                                       \
                for (; o + LANES <= end; o += LANES) {                                                                 \
                    lanes dots = few_dots_##NAME(b + o * rank, lanes_of_float32(repeated), rank);                      \
                    memcpy(sums + o - first, &dots, sizeof dots);                                                      \
                }                                                                                                      \
            }                                                                                                          \
            if (rank % LANES == 0)                                                                                     \
                for (; o + LANES <= end; o += LANES) {                                                                 \
                    lanes dots = dots_##NAME(b + o * plan->b_stride, plan->b_stride, low, rank);                       \
                    memcpy(sums + o - first, &dots, sizeof dots);                                                      \
                }                                                                                                      \
            for (; o < end; o++) {                                                                                     \
                const W *of_feature = b + o * plan->b_stride;                                                          \
                float sum = 0;                                                                                         \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t r = 0; r < rank; r++) sum +=                       \
                    READ_W(of_feature[r]) * low[r];                                                                    \
                sums[o - first] = sum;                                                                                 \
            }                                                                                                          \
            write_##NAME(plan, piece, entry, first, end, sums, y);                                                     \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void add_##NAME(const struct plan *plan, void *result, const void *x)                                              \
    {                                                                                                                  \
        const int64_t of_a = (plan->rank + RANKS - 1) / RANKS, of_b = (plan->d_out + FEATURES - 1) / FEATURES;         \
        _Pragma("omp parallel num_threads((int)plan->threads)")                                                        \
        {                                                                                                              \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < plan->pieces * of_a; i++)                      \
                down_##NAME(plan, i / of_a, i % of_a * RANKS, (const X *)x);                                           \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < plan->pieces * of_b; i++)                      \
                up_##NAME(plan, i / of_b, i % of_b * FEATURES, (X *)result);                                           \
        }                                                                                                              \
    }

DEFINE(bfloat16_bfloat16, bfloat16, read_bfloat16, write_bfloat16, bfloat16, read_bfloat16,
       lanes_of_bfloat16, lanes_of_bfloat16)
DEFINE(bfloat16_float32, bfloat16, read_bfloat16, write_bfloat16, float32, read_float32,
       lanes_of_bfloat16, lanes_of_float32)
DEFINE(float32_bfloat16, float32, read_float32, write_float32, bfloat16, read_bfloat16,
       lanes_of_float32, lanes_of_bfloat16)
DEFINE(float32_float32, float32, read_float32, write_float32, float32, read_float32,
       lanes_of_float32, lanes_of_float32)

/* One adapter in one module, not copied. */
struct part {
    const void *a, *b;      /* (rank, d_in), (d_out, rank); a is NULL if the adapter does not adapt the module */
    const float *factors;   /* (d_out), or NULL for LoRA */
    int64_t rank, b_stride;
    float scaling;
};

struct module {
    const struct part *parts; /* indexed by the adapter's number */
    const float *bias;        /* (d_out), or NULL */
    int64_t d_in, d_out;
    int64_t column;           /* column of the module's gates */
};

struct packed {
    int64_t spans, threads;
    const int64_t *firsts;   /* (spans): index of the first row in x and in the result */
    const int64_t *counts;   /* (spans): number of adjacent rows */
    const int64_t *adapters; /* (spans); the spans of one adapter are adjacent */
    const float *gates;      /* (spans, gates_stride) */
    int64_t gates_stride;
    int64_t rows;            /* in all spans */
    int64_t *entries;        /* scratch memory, (rows) */
    int64_t *starts;         /* scratch memory, (rows + 1) */
    float *weights;          /* scratch memory, (rows) */
    float *scalings;         /* scratch memory, (rows) */
    const void **pointers;   /* scratch memory, (3, rows) */
    float *low;              /* scratch memory, (rows, largest rank) */
};

#define PACKED(NAME)                                                                                                   \
    void add_packed_##NAME(const struct packed *of, const struct module *module, void *result, const void *x)          \
    {                                                                                                                  \
        int64_t span = 0;                                                                                              \
        /* Adjacent adapters with the same shape are computed together. A change of shape starts another call. */      \
        while (span < of->spans) {                                                                                     \
            struct plan plan = {0};                                                                                    \
            int64_t entries = 0, adapter = -1;                                                                         \
            for (; span < of->spans; span++) {                                                                         \
                const struct part *part = module->parts + of->adapters[span];                                          \
                const float gate = of->gates[span * of->gates_stride + module->column];                                \
                if (!part->a || gate == 0)                                                                             \
                    continue;                                                                                          \
                if (plan.pieces && (part->rank != plan.rank || part->b_stride != plan.b_stride))                       \
                    break;                                                                                             \
                for (int64_t i = 0; i < of->counts[span]; i++) {                                                       \
                    if (of->adapters[span] != adapter || entries - of->starts[plan.pieces - 1] == MOST) {              \
                        adapter = of->adapters[span];                                                                  \
                        plan.rank = part->rank, plan.b_stride = part->b_stride;                                        \
                        of->starts[plan.pieces] = entries;                                                             \
                        of->scalings[plan.pieces] = part->scaling;                                                     \
                        of->pointers[plan.pieces] = part->a;                                                           \
                        of->pointers[of->rows + plan.pieces] = part->b;                                                \
                        of->pointers[2 * of->rows + plan.pieces] = part->factors;                                      \
                        plan.pieces++;                                                                                 \
                    }                                                                                                  \
                    of->entries[entries] = of->firsts[span] + i;                                                       \
                    of->weights[entries++] = gate;                                                                     \
                }                                                                                                      \
            }                                                                                                          \
            if (!entries)                                                                                              \
                return;                                                                                                \
            of->starts[plan.pieces] = entries;                                                                         \
            plan.d_in = module->d_in, plan.d_out = plan.y_stride = module->d_out;                                      \
            plan.starts = of->starts, plan.rows = of->entries, plan.gates = of->weights, plan.threads = of->threads;   \
            plan.scalings = of->scalings, plan.bias = module->bias, plan.low = of->low;                                \
            plan.a = of->pointers, plan.b = of->pointers + of->rows;                                                   \
            plan.factors = (const float *const *)(of->pointers + 2 * of->rows);                                        \
            add_##NAME(&plan, result, x);                                                                              \
        }                                                                                                              \
    }

PACKED(bfloat16_bfloat16)
PACKED(bfloat16_float32)
PACKED(float32_bfloat16)
PACKED(float32_float32)
