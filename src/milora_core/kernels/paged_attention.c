/*
 * Attention of single tokens over a paged cache of keys and values. Each token belongs to a different text:
 *
 *     y[i, h] = sum_t a_t v[t, g],   a = softmax_t(s q[i, h] . k[t, g])     over the text's tokens t
 *
 * g is the key-value head of head h. With a soft cap c, a score x becomes c tanh(x / c). With a window w, only the last
 * w tokens count. Keys and values of the pass's new tokens are stored first. The cache is read in place, in bfloat16 or
 * float32, once for all heads that share a key-value head. All sums are in float32 and rounded once. Threads divide the
 * work by tokens and key-value heads, so the result does not depend on the number of threads.
 */

#include "numbers.h"

#include <math.h>

struct attention {
    int64_t rows, tokens, heads, groups, key_size, value_size; /* tokens: all tokens of the pass; rows come first */
    int64_t page_tokens, pages_stride, window, threads;         /* window: 0 for none */
    const int64_t *slots;   /* (tokens): the slot of each token's key and value */
    const int64_t *lengths; /* (rows): tokens of the row's text, including itself */
    const int64_t *pages;   /* (rows, pages_stride) */
    int64_t query_token, query_head, key_token, key_head, value_token, value_head; /* strides, in elements */
    float scaling, softcap; /* softcap: 0 for none */
};

#define BLOCK 64        /* tokens per block: scores first, then values; a multiple of LANES */
#define MOST_SHARED 16  /* maximum number of heads per key-value head */
#define MOST_SIZE 512   /* maximum size of a key or value */

/* e^x for x <= 0, within 2 units in the last place; 0 below -87; NaN stays NaN. */
static inline lanes exponential(lanes x)
{
    const bit_lanes is_small = (bit_lanes)(x < -87.0f);
    lanes shifted = x * 1.44269504f + 12582912.0f; /* the nearest integer is in the low bits */
    bit_lanes power = (bit_lanes)shifted << 23;
    lanes whole = shifted - 12582912.0f;
    lanes r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    lanes sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    return (lanes)(((bit_lanes)sum + power) & ~is_small);
}

#define DEFINE(X, READ, WRITE)                                                                                         \
    static void store_##X(const struct attention *of, const X *from, int64_t of_token, int64_t of_head, int64_t size,  \
                          X *cache, int64_t token)                                                                     \
    {                                                                                                                  \
        for (int64_t group = 0; group < of->groups; group++)                                                           \
            memcpy(cache + (of->slots[token] * of->groups + group) * size, from + token * of_token + group * of_head,  \
                   (size_t)size * sizeof(X));                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    static inline float dot_##X(const float *query, const X *key, int64_t size)                                        \
    {                                                                                                                  \
        lanes sums = {0};                                                                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + LANES <= size; i += LANES)                                                                          \
            sums += lanes_of_float32(query + i) * lanes_of_##X(key + i);                                               \
        float sum = 0;                                                                                                 \
        for (int lane = 0; lane < LANES; lane++)                                                                       \
            sum += sums[lane];                                                                                         \
        for (; i < size; i++)                                                                                          \
            sum += query[i] * READ(key[i]);                                                                            \
        return sum;                                                                                                    \
    }                                                                                                                  \
                                                                                                                       \
    static void attend_row_##X(const struct attention *of, const X *keys, const X *values, const X *query, X *output,  \
                               int64_t row, int64_t group)                                                             \
    {                                                                                                                  \
        const int64_t shared = of->heads / of->groups, size = of->key_size, width = of->value_size;                    \
        const int64_t *pages = of->pages + row * of->pages_stride;                                                     \
        float queries[MOST_SHARED][MOST_SIZE], sums[MOST_SHARED][MOST_SIZE], most[MOST_SHARED], total[MOST_SHARED];    \
        for (int64_t head = 0; head < shared; head++) {                                                                \
            const X *of_head = query + row * of->query_token + (group * shared + head) * of->query_head;               \
            for (int64_t i = 0; i < size; i++)                                                                         \
                queries[head][i] = READ(of_head[i]) * of->scaling;                                                     \
            memset(sums[head], 0, (size_t)width * sizeof(float));                                                      \
            most[head] = -INFINITY, total[head] = 0;                                                                   \
        }                                                                                                              \
        const int64_t length = of->lengths[row];                                                                       \
        int64_t first = of->window && of->window < length ? length - of->window : 0;                                   \
        for (; first < length; first += BLOCK) {                                                                       \
            const int64_t count = length - first < BLOCK ? length - first : BLOCK;                                     \
            int64_t places[BLOCK];                                                                                     \
            for (int64_t t = 0; t < count; t++) {                                                                      \
                const int64_t token = first + t;                                                                       \
                const int64_t slot = pages[token / of->page_tokens] * of->page_tokens + token % of->page_tokens;       \
                places[t] = slot * of->groups + group;                                                                 \
            }                                                                                                          \
            for (int64_t head = 0; head < shared; head++) {                                                            \
                float scores[BLOCK], best = most[head];                                                                \
                for (int64_t t = 0; t < count; t++) {                                                                  \
                    float score = dot_##X(queries[head], keys + places[t] * size, size);                               \
                    if (of->softcap > 0)                                                                               \
                        score = of->softcap * tanhf(score / of->softcap);                                              \
                    scores[t] = score;                                                                                 \
                    if (!(score <= best)) /* keeps a NaN, so it propagates as in torch */                              \
                        best = score;                                                                                  \
                }                                                                                                      \
                for (int64_t t = count; t < BLOCK; t++)                                                                \
                    scores[t] = -INFINITY;                                                                             \
                const float rescaled = most[head] == -INFINITY ? 0 : expf(most[head] - best);                          \
                most[head] = best;                                                                                     \
                float sum = 0;                                                                                         \
                for (int64_t t = 0; t < count; t += LANES) {                                                           \
                    lanes shares = exponential(lanes_of_float32(scores + t) - best);                                   \
                    memcpy(scores + t, &shares, sizeof shares);                                                        \
                    for (int lane = 0; lane < LANES; lane++)                                                           \
                        sum += shares[lane];                                                                           \
                }                                                                                                      \
                total[head] = total[head] * rescaled + sum;                                                            \
                float *of_head = sums[head];                                                                           \
                int64_t i = 0;                                                                                         \
                for (; i + 4 * LANES <= width; i += 4 * LANES) {                                                       \
                    lanes kept[4];                                                                                     \
                    for (int k = 0; k < 4; k++)                                                                        \
                        kept[k] = lanes_of_float32(of_head + i + k * LANES) * rescaled;                                \
                    for (int64_t t = 0; t < count; t++) {                                                              \
                        const X *value = values + places[t] * width + i;                                               \
                        for (int k = 0; k < 4; k++)                                                                    \
                            kept[k] += scores[t] * lanes_of_##X(value + k * LANES);                                    \
                    }                                                                                                  \
                    memcpy(of_head + i, kept, sizeof kept);                                                            \
                }                                                                                                      \
                for (; i < width; i++) {                                                                               \
                    float kept = of_head[i] * rescaled;                                                                \
                    for (int64_t t = 0; t < count; t++)                                                                \
                        kept += scores[t] * READ(values[places[t] * width + i]);                                       \
                    of_head[i] = kept;                                                                                 \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t head = 0; head < shared; head++)                                                                  \
            for (int64_t i = 0; i < width; i++)                                                                        \
                output[(row * of->heads + group * shared + head) * width + i] = WRITE(sums[head][i] / total[head]);    \
    }                                                                                                                  \
                                                                                                                       \
    void attend_##X(const struct attention *of, void *keys, void *values, const void *query, const void *key,          \
                    const void *value, void *output)                                                                   \
    {                                                                                                                  \
        _Pragma("omp parallel num_threads((int)of->threads)")                                                          \
        {                                                                                                              \
            _Pragma("omp for schedule(static)") for (int64_t t = 0; t < of->tokens; t++)                               \
            {                                                                                                          \
                store_##X(of, (const X *)key, of->key_token, of->key_head, of->key_size, (X *)keys, t);                \
                store_##X(of, (const X *)value, of->value_token, of->value_head, of->value_size, (X *)values, t);      \
            }                                                                                                          \
            _Pragma("omp for schedule(dynamic)") for (int64_t i = 0; i < of->rows * of->groups; i++)                   \
                attend_row_##X(of, (const X *)keys, (const X *)values, (const X *)query, (X *)output, i / of->groups,  \
                               i % of->groups);                                                                        \
        }                                                                                                              \
    }

DEFINE(bfloat16, read_bfloat16, write_bfloat16)
DEFINE(float32, read_float32, write_float32)
