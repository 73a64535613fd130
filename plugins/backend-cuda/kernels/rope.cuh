// Rotary embedding of one column, and of four.
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

// How four neighbouring columns are turned, the same in all heads: `dim` and `pairs` are multiples of four.
struct FourTurns {
    // Where the columns begin that they are turned with: they themselves, if pairs lie side by side.
    int other;
    bool stay;
    float cosine[4] = {}, sine[4] = {};

    __device__ __forceinline__ FourTurns(int dim, const float *turns, int pairs, int interleaved)
        : other(interleaved || dim >= 2 * pairs ? dim : dim < pairs ? dim + pairs : dim - pairs), stay(dim >= 2 * pairs) {
        if (stay) {
            return;
        }
        const float4 *from = reinterpret_cast<const float4 *>(turns + (interleaved ? dim : 2 * min(dim, other)));
        float4 first = from[0], second = interleaved ? first : from[1];
        float angles[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Chosen, not indexed: an index that isn't known would put the angles into memory.
            float of_pair = interleaved ? angles[i / 2 * 2 + 1] : angles[2 * i + 1];
            bool minus = interleaved ? i % 2 == 0 : dim < pairs;
            cosine[i] = interleaved ? angles[i / 2 * 2] : angles[2 * i];
            sine[i] = minus ? -of_pair : of_pair;
        }
    }

    // Columns `dim` on of a head. Without a branch before the loads, so that those of several heads run ahead.
    __device__ __forceinline__ float4 turned(const float *head, int dim) const {
        float4 value = *reinterpret_cast<const float4 *>(head + dim);
        float4 with = *reinterpret_cast<const float4 *>(head + other);
        with = other == dim ? float4{with.y, with.x, with.w, with.z} : with;
        float4 sum = {value.x * cosine[0] + with.x * sine[0], value.y * cosine[1] + with.y * sine[1],
                      value.z * cosine[2] + with.z * sine[2], value.w * cosine[3] + with.w * sine[3]};
        return stay ? value : sum;
    }
};
