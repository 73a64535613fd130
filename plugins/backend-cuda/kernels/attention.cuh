// How attention over a long context is put together, so that its bits depend on positions alone.
//
// The context is cut into parts of 128 positions, counted from the sequence's start. Each part is attended to by
// itself and merged into what the parts before it gave, in order. Whether one block walks through the parts or
// each has a block of its own and `attend_combine` merges them, the arithmetic is the same.
#pragma once

#include "e4m3.cuh"
#include "formats.cuh"
#include "product.cuh"
#include "rope.cuh"

// Positions in a part; a block's threads take one each.
constexpr int PART = 128;
// Queries that a block handles together: heads of the same KV head, and neighbouring tokens.
constexpr int QUERIES = 8;

// The softmax of scores seen so far, and the sum of values under it: `exp(score - highest)` is summed.
struct Attended {
    float highest, total, value;
};

__device__ __forceinline__ Attended nothing_attended() { return {-INFINITY_F, 0.0f, 0.0f}; }

__device__ __forceinline__ Attended merge(Attended before, Attended part) {
    float highest = fmaxf(before.highest, part.highest);
    float keeps = expf(before.highest - highest), adds = expf(part.highest - highest);
    return {highest, fmaf(before.total, keeps, part.total * adds), fmaf(before.value, keeps, part.value * adds)};
}

// The result, with a head's sink, a logit that takes part in the softmax only, where there is one.
__device__ __forceinline__ float finish(Attended all, const float *sinks, int head) {
    if (!sinks) {
        return all.value / all.total;
    }
    float highest = fmaxf(all.highest, sinks[head]);
    float keeps = expf(all.highest - highest);
    return all.value * keeps / fmaf(all.total, keeps, expf(sinks[head] - highest));
}

// Takes a result in, in floats, in halves, or in both.
__device__ __forceinline__ void store_attended(float *y, size_t at, u16 *halves, size_t half_at, int half, float value) {
    if (y) {
        y[at] = value;
    }
    if (halves) {
        halves[half_at] = half_by(half, value);
    }
}

constexpr float LOG2_E = 1.44269504088896341f;

// What a sum of terms, powers of 2 measured from `highest`, is multiplied with, with a head's sink where there is one.
__device__ __forceinline__ float share_of_term(float highest, float total, const float *sinks, int head) {
    if (!sinks) {
        return 1.0f / total;
    }
    float sink = sinks[head] * LOG2_E, most = fmaxf(highest, sink);
    float keeps = exp2f(highest - most);
    return keeps / (total * keeps + exp2f(sink - most));
}

// 2 to the power of x in one instruction; what is too small for a normal number becomes 0.
__device__ __forceinline__ float short_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}

// The hyperbolic tangent in few instructions, since there is one for every score.
__device__ __forceinline__ float short_tanh(float x) {
    return 1.0f - __fdividef(2.0f, exp2f(2.88539008177792682f * x) + 1.0f);
}

// The first position that a query at `position` sees.
__device__ __forceinline__ int first_seen(int position, int window) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

// Bytes of an element of keys and values, and elements in a piece of sixteen bytes.
__device__ __forceinline__ constexpr int element_bytes(Format element) {
    return element == F32 ? 4 : element == F8_E4M3 ? 1 : 2;
}
__device__ __forceinline__ constexpr int piece_elements(Format element) { return 16 / element_bytes(element); }

// What tensor cores take elements as.
__device__ __forceinline__ constexpr Half half_kept(Format element) { return element == F16 ? HALF_F16 : HALF_BF16; }

// Where keys and values lie. A page holds, at `k_at` for each head, keys in pieces of sixteen bytes, a piece of
// all tokens together so that neighbouring threads read neighbouring memory; at `v_at` for each head its tokens'
// values one behind the other; and at `scales_at`, in formats that have scales, for each head its tokens' pairs of the
// key's scale and the value's, a byte each.
struct Pages {
    u8 *start;
    u64 page_bytes, k_at, v_at, scales_at;
    int page_tokens, heads, k_dim, k_padded, v_dim;

    // Where in a page the scales of a cell are.
    __device__ __forceinline__ u64 scales_of(int head, int place) const {
        return scales_at + static_cast<u64>(head * page_tokens + place) * 2;
    }
};

// In which page a position lies, and where in it, where a page's tokens are a power of two.
struct Paging {
    int bits;

    __device__ __forceinline__ explicit Paging(int page_tokens) : bits(__ffs(page_tokens) - 1) {}

    __device__ __forceinline__ int page(int position) const { return position >> bits; }
    __device__ __forceinline__ int place(int position) const { return position & ((1 << bits) - 1); }
};

// Where piece `piece` of row `row` lies in a tile with rows of HEAD halves: eight rows lie in different banks.
template <int HEAD> __device__ __forceinline__ int head_piece(int row, int piece) {
    return row * HEAD + (piece ^ (row & 7)) * 8;
}

// Eight columns of a query from `dim` on, 0 where none is left of the head's.
__device__ __forceinline__ void load_query(const float *head, int dim, int dims, bool exists, float (&columns)[8]) {
    int left = exists ? dims - dim : 0;
    if (dims % 4 == 0) {
        float4 none = {0.0f, 0.0f, 0.0f, 0.0f};
        float4 first = left > 0 ? *reinterpret_cast<const float4 *>(head + dim) : none;
        float4 second = left > 4 ? *reinterpret_cast<const float4 *>(head + dim + 4) : none;
        columns[0] = first.x, columns[1] = first.y, columns[2] = first.z, columns[3] = first.w;
        columns[4] = second.x, columns[5] = second.y, columns[6] = second.z, columns[7] = second.w;
    } else {
        for (int i = 0; i < 8; i++) {
            columns[i] = i < left ? head[dim + i] : 0.0f;
        }
    }
}

// How the kernels on tensor cores turn the queries that they load; `angles` is null where these are as they shall be.
struct Turning {
    const float *angles;
    int pairs, interleaved;

    // How four columns of a token's queries are turned.
    __device__ __forceinline__ FourTurns of(size_t token, int dim) const {
        return FourTurns(dim, angles + token * 2 * pairs, pairs, interleaved);
    }
};

// The same eight columns in halves; where they are turned, columns come in fours.
template <Half HALF>
__device__ __forceinline__ uint4 query_piece(const Turning &turning, size_t token, const float *head, int dim, int dims,
                                             bool exists) {
    float columns[8];
    if (turning.angles) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
            if (exists && dim + i < dims) {
                four = turning.of(token, dim + i).turned(head, dim + i);
            }
            columns[i] = four.x, columns[i + 1] = four.y, columns[i + 2] = four.z, columns[i + 3] = four.w;
        }
    } else {
        load_query(head, dim, dims, exists, columns);
    }
    return {halves_of<HALF>(columns[0], columns[1]), halves_of<HALF>(columns[2], columns[3]),
            halves_of<HALF>(columns[4], columns[5]), halves_of<HALF>(columns[6], columns[7])};
}

// What follows is for scores and sums of a warp's sixteen queries as `multiply_add` leaves them: a lane has those of two, at
// two neighbouring columns of each eight.

// Scales scores, and has them approach `softcap` at most.
template <int COUNT>
__device__ __forceinline__ void cap_scores(float (&scores)[COUNT][4], float softcap, float scale, float inverse_cap) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scores[j][i] = softcap * short_tanh(scores[j][i] * scale * inverse_cap);
        }
    }
}

// Takes away what the lane's queries don't see, of the keys from position `begin` on.
template <int COUNT>
__device__ __forceinline__ void hide_unseen(float (&scores)[COUNT][4], int begin, const int (&from)[2], const int (&to)[2]) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int position = begin + 8 * j + lane_of_thread() % 4 * 2 + i % 2;
            bool seen = position >= from[i / 2] && position <= to[i / 2];
            scores[j][i] = seen ? scores[j][i] : -INFINITY_F;
        }
    }
}

// Takes in what a lane has of its upper or lower query's sums, times `by`: a head's `dims` columns, in floats, in halves, or
// in both.
template <int COUNT>
__device__ __forceinline__ void store_attended(const float (&sums)[COUNT][4], int lower, float by, int dims, float *floats,
                                               u16 *halves, int half) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        if (8 * j >= dims) {
            break;
        }
        float first = sums[j][2 * lower] * by, second = sums[j][2 * lower + 1] * by;
        int at = 8 * j + lane_of_thread() % 4 * 2;
        if (floats) {
            *reinterpret_cast<float2 *>(floats + at) = float2{first, second};
        }
        if (halves) {
            *reinterpret_cast<u32 *>(halves + at) =
                half == HALF_F16 ? halves_of<HALF_F16>(first, second) : halves_of<HALF_BF16>(first, second);
        }
    }
}
