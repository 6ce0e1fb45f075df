/* Reads and writes the kernels' dtypes. All sums are in float32 and rounded once. */

#ifndef MILORA_NUMBERS_H
#define MILORA_NUMBERS_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;
typedef float float32;

static inline float read_bfloat16(bfloat16 value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline bfloat16 write_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
}

static inline float read_float32(float32 value) { return value; }
static inline float32 write_float32(float value) { return value; }

#define LANES 16

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t bit_lanes __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t half_lanes __attribute__((vector_size(LANES * sizeof(uint16_t))));

static inline lanes lanes_of_bfloat16(const bfloat16 *values)
{
    half_lanes halves;
    memcpy(&halves, values, sizeof halves);
    return (lanes)(__builtin_convertvector(halves, bit_lanes) << 16);
}

static inline lanes lanes_of_float32(const float32 *values)
{
    lanes result;
    memcpy(&result, values, sizeof result);
    return result;
}

#endif
