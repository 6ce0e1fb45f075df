/*
 * The computations of a router, in float32. Pooling of a prompt to one vector, over the tokens t of the mask:
 *
 *     p = sum_t a_t x_t,   a = softmax_t(w . x_t)     or the mean, without w
 *
 * A rational function of each feature:
 *
 *     g(x) = sum_j a_j x^j / (1 + |sum_i b_i x^i|)
 *
 * x_t is the hidden state h_t, or h_t divided by its root mean square: x_t = s_t h_t, s_t = rsqrt(mean(h_t^2) + 1e-6).
 * The factors s_t are multiplied into the scores and the shares, so no normalised copy is written.
 *
 * Tokens outside the mask are not read. Threads divide the work by tokens and by features, so the result does not
 * depend on the number of threads or on the position of padding.
 */

#include "numbers.h"

#include <math.h>

#define POOLED 256 /* features per thread at a time */

/* Converts one prompt's scores to shares, in place. */
static void softmax(float *scores, const uint8_t *mask, int64_t tokens)
{
    float most = -INFINITY, sum = 0;
    for (int64_t t = 0; t < tokens; t++)
        if (mask[t] && !(scores[t] <= most)) /* keeps a NaN, so it propagates as in torch */
            most = scores[t];
    for (int64_t t = 0; t < tokens; t++)
        if (mask[t])
            sum += scores[t] = expf(scores[t] - most);
    for (int64_t t = 0; t < tokens; t++)
        scores[t] = mask[t] ? scores[t] / sum : 0;
}

#define DEFINE(X)                                                                                                      \
    static float score_##X(const X *x, const float *weight, int64_t size)                                              \
    {                                                                                                                  \
        lanes sums[2] = {{0}, {0}};                                                                                    \
        int64_t i = 0;                                                                                                 \
        for (; i + 2 * LANES <= size; i += 2 * LANES) {                                                                \
            sums[0] += lanes_of_##X(x + i) * lanes_of_float32(weight + i);                                             \
            sums[1] += lanes_of_##X(x + i + LANES) * lanes_of_float32(weight + i + LANES);                             \
        }                                                                                                              \
        sums[0] += sums[1];                                                                                            \
        float sum = 0;                                                                                                 \
        for (int lane = 0; lane < LANES; lane++)                                                                       \
            sum += sums[0][lane];                                                                                      \
        for (; i < size; i++)                                                                                          \
            sum += read_##X(x[i]) * weight[i];                                                                         \
        return sum;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    static float scale_##X(const X *x, int64_t size)                                                                   \
    {                                                                                                                  \
        lanes sums = {0};                                                                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= size; i += LANES)                                                                          \
            sums += lanes_of_##X(x + i) * lanes_of_##X(x + i);                                                         \
        float sum = 0;                                                                                                 \
        for (int lane = 0; lane < LANES; lane++)                                                                       \
            sum += sums[lane];                                                                                         \
        for (; i < size; i++)                                                                                          \
            sum += read_##X(x[i]) * read_##X(x[i]);                                                                    \
        return 1 / sqrtf(sum / (float)size + 1e-6f);                                                                   \
    }                                                                                                                  \
                                                                                                                       \
    static void pool_features_##X(const X *x, const uint8_t *mask, const float *shares, float *pooled, int64_t tokens, \
                                  int64_t size, int64_t count)                                                         \
    {                                                                                                                  \
        float sums[POOLED] = {0};                                                                                      \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            if (!mask[t])                                                                                              \
                continue;                                                                                              \
            const X *of_token = x + t * size;                                                                          \
            const float share = shares[t];                                                                             \
            if (count == POOLED)                                                                                       \
                for (int64_t f = 0; f < POOLED; f++)                                                                   \
                    sums[f] += share * read_##X(of_token[f]);                                                          \
            else                                                                                                       \
                for (int64_t f = 0; f < count; f++)                                                                    \
                    sums[f] += share * read_##X(of_token[f]);                                                          \
        }                                                                                                              \
        memcpy(pooled, sums, (size_t)count * sizeof *sums);                                                            \
    }                                                                                                                  \
                                                                                                                       \
    /* x: (batch, tokens, size); mask: (batch, tokens); weight: (size), or NULL for the mean; shares and scales:       \
       scratch memory, (batch, tokens); scales is NULL to use unnormalised tokens; pooled: (batch, size). */           \
    void pool_##X(const void *hidden, const uint8_t *mask, const float *weight, float *shares, float *scales,          \
                  float *pooled, int64_t batch, int64_t tokens, int64_t size, int64_t threads)                         \
    {                                                                                                                  \
        const X *x = (const X *)hidden;                                                                                \
        const int64_t parts = (size + POOLED - 1) / POOLED;                                                            \
        _Pragma("omp parallel num_threads((int)threads)")                                                              \
        {                                                                                                              \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < batch * tokens; i++)                           \
            {                                                                                                          \
                shares[i] = mask[i] && weight ? score_##X(x + i * size, weight, size) : 0;                             \
                if (scales) {                                                                                          \
                    scales[i] = mask[i] ? scale_##X(x + i * size, size) : 0;                                           \
                    shares[i] *= scales[i];                                                                            \
                }                                                                                                      \
            }                                                                                                          \
            _Pragma("omp for schedule(static)") for (int64_t b = 0; b < batch; b++)                                    \
            {                                                                                                          \
                softmax(shares + b * tokens, mask + b * tokens, tokens);                                               \
                for (int64_t i = b * tokens; scales && i < (b + 1) * tokens; i++)                                      \
                    shares[i] *= scales[i];                                                                            \
            }                                                                                                          \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < batch * parts; i++)                            \
            {                                                                                                          \
                const int64_t b = i / parts, first = i % parts * POOLED;                                               \
                const int64_t count = size - first < POOLED ? size - first : POOLED;                                   \
                pool_features_##X(x + b * tokens * size + first, mask + b * tokens, shares + b * tokens,               \
                                  pooled + b * size + first, tokens, size, count);                                     \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(bfloat16)
DEFINE(float32)

static inline lanes horner(lanes x, const float *coefficients, int64_t count)
{
    lanes value = {0};
    for (int64_t j = count - 1; j >= 0; j--)
        value = value * x + coefficients[j];
    return value;
}

/* numerator: a_0, ...; denominator: b_1, ...; y may be x. */
void rational(const float *x, float *y, int64_t size, const float *numerator, int64_t numerators,
              const float *denominator, int64_t denominators)
{
    for (int64_t i = 0; i < size; i += LANES) {
        const size_t bytes = (size_t)(size - i < LANES ? size - i : LANES) * sizeof *x;
        lanes value = {0};
        memcpy(&value, x + i, bytes);
        lanes below = value * horner(value, denominator, denominators);
        for (int lane = 0; lane < LANES; lane++)
            below[lane] = fabsf(below[lane]);
        value = horner(value, numerator, numerators) / (1 + below);
        memcpy(y + i, &value, bytes);
    }
}
