// Rotary embedding of one column.
#pragma once

#include "common.cuh"

// Column `dim` of a head after its first `2 × pairs` columns were turned, columns side by side where `interleaved`,
// else half the rotated width apart. `turns` has a token's cosines and sines side by side.
__device__ __forceinline__ float turned(const float *head, int dim, const float *turns, int pairs, int interleaved) {
    float value = head[dim];
    if (dim >= 2 * pairs) {
        return value;
    }
    int pair = interleaved ? dim / 2 : dim % pairs;
    bool first = interleaved ? dim % 2 == 0 : dim < pairs;
    int apart = interleaved ? 1 : pairs;
    float cosine = turns[2 * pair], sine = turns[2 * pair + 1];
    float other = head[first ? dim + apart : dim - apart];
    return first ? value * cosine - other * sine : value * cosine + other * sine;
}
