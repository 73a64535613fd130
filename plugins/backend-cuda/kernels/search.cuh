// Prefixes of an order over the vocabulary, without sorting it.
//
// What sampling's filters keep are prefixes: the most likely tokens up to a count or a share. Tokens are ordered by a key
// that isn't negative, and those of the same key by number. A prefix is found by its sum of weights: the keys' range is cut
// into bins, the bin in which the prefix ends is cut into bins in turn, and so on down to one key.
//
// Weights are whole numbers. Their sums are the same in whatever order threads come to add them, so that the same row
// gives the same token always.
#pragma once

#include "common.cuh"

// A number that orders floats as `total_cmp` does.
__device__ __forceinline__ u32 ordered(float value) {
    u32 bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The last entry of a prefix: the bits of its key, which order keys as keys do, and its token.
struct Cut {
    u32 key;
    u32 token;

    __device__ __forceinline__ bool keeps(u32 other_key, u32 other_token) const {
        return other_key < key || (other_key == key && other_token <= token);
    }
};

__device__ __forceinline__ Cut keep_all() { return {~0u, NO_TOKEN}; }

constexpr int BINS = 512;

// What a block shares while it searches.
struct Search {
    u64 bins[BINS];
    u64 partial[32];
    // The bin, or the place, that was found, and what lies before it.
    u32 found;
    u64 before;
};

// Calls `visit(token, value)` for all values of a row. Loads of several go ahead of what is done with them.
template <class Visit> __device__ __forceinline__ void each_token(const float *row, int vocab, Visit visit) {
    constexpr int AHEAD = 4;
    const float4 *fours = reinterpret_cast<const float4 *>(row);
    int whole = vocab / 4, threads = blockDim.x, at = threadIdx.x;
    auto visit_four = [&](int index, const float4 &four) {
        visit(4 * index, four.x), visit(4 * index + 1, four.y), visit(4 * index + 2, four.z), visit(4 * index + 3, four.w);
    };
    for (; at + (AHEAD - 1) * threads < whole; at += AHEAD * threads) {
        float4 four[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            four[i] = fours[at + i * threads];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            visit_four(at + i * threads, four[i]);
        }
    }
    for (; at < whole; at += threads) {
        visit_four(at, fours[at]);
    }
    int token = 4 * whole + threadIdx.x;
    if (token < vocab) {
        visit(token, row[token]);
    }
}

// The same where a visit is long: there is one copy of it.
template <class Visit> __device__ __forceinline__ void each_token_in_turn(const float *row, int vocab, Visit visit) {
    constexpr int AHEAD = 8;
    int threads = blockDim.x;
    for (int first = threadIdx.x; first < vocab; first += AHEAD * threads) {
        float values[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            values[i] = first + i * threads < vocab ? row[first + i * threads] : 0.0f;
        }
#pragma unroll 1
        for (int i = 0; i < AHEAD; i++) {
            int token = first + i * threads;
            if (token < vocab) {
                visit(token, values[0]);
            }
#pragma unroll
            for (int j = 1; j < AHEAD; j++) {
                values[j - 1] = values[j];
            }
        }
    }
}

// The sum of a row's weights, the same in every thread.
template <class Weight>
__device__ __forceinline__ u64 weight_sum(const float *row, int vocab, Search &search, Weight weight) {
    u64 sum = 0;
    each_token_in_turn(row, vocab, [&](int token, float value) { sum += weight(token, value); });
    return block_sum(sum, search.partial);
}

// The sum over the lanes up to this one.
__device__ __forceinline__ u64 sum_up_to(u64 value) {
    int lane = lane_of_thread();
    for (int apart = 1; apart < 32; apart *= 2) {
        u64 other = __shfl_sync(ALL_LANES, value, max(lane - apart, 0));
        value += lane >= apart ? other : 0;
    }
    return value;
}

// The first lane for which something holds, the last where it does for none.
__device__ __forceinline__ int first_lane(bool holds) {
    u32 lanes = __ballot_sync(ALL_LANES, holds);
    return lanes ? __ffs(lanes) - 1 : 31;
}

// The first token, in the order of their numbers, up to which weights reach `wanted`, which is at least 1 and at most the
// sum of all.
template <class Weight>
__device__ __forceinline__ u32 find_token(const float *row, int vocab, Search &search, u64 wanted, Weight weight) {
    int begin = 0, end = vocab;
    u64 before = 0;
    // The range is cut into shares, of which each warp sums some; the one in which it happens becomes the range.
    while (end - begin > 32) {
        int size = (end - begin + 31) / 32;
        for (int share = warp_of_thread(); share < 32; share += blockDim.x / 32) {
            int first = begin + share * size, last = min(first + size, end);
            u64 sum = 0;
#pragma unroll 4
            for (int token = first + lane_of_thread(); token < last; token += 32) {
                sum += weight(token, row[token]);
            }
            sum = warp_sum(sum);
            if (lane_of_thread() == 0) {
                search.partial[share] = sum;
            }
        }
        __syncthreads();
        int share = 0;
        while (share < 31 && before + search.partial[share] < wanted) {
            before += search.partial[share++];
        }
        begin += share * size;
        end = min(begin + size, end);
        __syncthreads();
    }
    // All warps do the same.
    int token = begin + lane_of_thread();
    u64 sum = sum_up_to(token < end ? weight(token, row[token]) : 0);
    return begin + first_lane(before + sum >= wanted);
}

// Counts `search.bins` up to the one in which `wanted` is reached: its number, with what lies before it added to `before`.
__device__ __forceinline__ u32 find_bin(Search &search, u64 wanted, u64 &before) {
    __syncthreads();
    if (warp_of_thread() == 0) {
        constexpr int of_lane = BINS / 32;
        int lane = lane_of_thread();
        u64 sum = 0;
        for (int i = 0; i < of_lane; i++) {
            sum += search.bins[lane * of_lane + i];
        }
        u64 own = sum;
        sum = sum_up_to(own);
        int first = first_lane(before + sum >= wanted);
        if (lane == first) {
            u64 at = before + sum - own;
            int bin = lane * of_lane;
            while (bin + 1 < (lane + 1) * of_lane && at + search.bins[bin] < wanted) {
                at += search.bins[bin++];
            }
            search.found = bin;
            search.before = at;
        }
    }
    __syncthreads();
    before = search.before;
    return search.found;
}

// The shortest prefix, in the order of keys, whose weights reach `wanted`, which is at least 1 and at most the sum of all.
// `key(token, value)` is a float that isn't negative; the first bins are 1 / `per_unit` wide.
template <class Key, class Weight>
__device__ __forceinline__ Cut find_cut(const float *row, int vocab, Search &search, u64 wanted, float per_unit, Key key,
                                        Weight weight) {
    auto bin_of = [&](float key) { return static_cast<int>(fminf(key * per_unit, BINS - 1)); };
    auto clear = [&] {
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
            search.bins[bin] = 0;
        }
        __syncthreads();
    };
    u64 before = 0;
    clear();
    each_token_in_turn(row, vocab, [&](int token, float value) {
        u64 own = weight(token, value);
        if (own) {
            atomicAdd(&search.bins[bin_of(key(token, value))], own);
        }
    });
    int coarse = find_bin(search, wanted, before);
    // Its keys' bits, and some more on either side for what rounding may do.
    float width = 1.0f / per_unit;
    u32 low = coarse == 0 ? 0 : __float_as_uint(coarse * width * 0.999f);
    u32 high = coarse == BINS - 1 ? __float_as_uint(INFINITY_F) : __float_as_uint((coarse + 1) * width * 1.001f);
    for (;;) {
        int shift = 0;
        while ((high - low) >> shift >= BINS) {
            shift++;
        }
        clear();
        each_token_in_turn(row, vocab, [&](int token, float value) {
            float own_key = key(token, value);
            u32 bits = __float_as_uint(own_key);
            if (bits >= low && bits <= high && bin_of(own_key) == coarse) {
                u64 own = weight(token, value);
                if (own) {
                    atomicAdd(&search.bins[(bits - low) >> shift], own);
                }
            }
        });
        u32 bin = find_bin(search, wanted, before);
        low += bin << shift;
        if (shift == 0) {
            break;
        }
        high = min(high, low + (1u << shift) - 1);
    }
    auto of_key = [&](int token, float value) {
        return __float_as_uint(key(token, value)) == low ? weight(token, value) : 0;
    };
    u32 token = find_token(row, vocab, search, wanted - before, of_key);
    return {low, token};
}
