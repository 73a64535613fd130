// Prefixes of an order, without sorting.
//
// What sampling's filters keep are prefixes: the most likely tokens up to a count or a share. A prefix ends at a
// rank, which is found by halving the range of ranks: each time a block adds up the weights that lie before the
// middle. Sums are in double precision and in one order, so that the same row gives the same token always.
#pragma once

#include "common.cuh"

// A number that orders floats as `total_cmp` does.
__device__ __forceinline__ u32 ordered(float value) {
    u32 bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The last entry of a prefix. Entries of the same rank are in the order of tokens.
struct Cut {
    u64 rank;
    u32 token;

    __device__ __forceinline__ bool keeps(u64 other_rank, u32 other_token) const {
        return other_rank < rank || (other_rank == rank && other_token <= token);
    }
};

__device__ __forceinline__ Cut keep_all() { return {~0ull, NO_TOKEN}; }

// The sum over the tokens of a vocabulary, the same in every thread.
template <class Term> __device__ __forceinline__ double vocabulary_sum(int vocab, double *partial, Term term) {
    double sum = 0.0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        sum += term(token);
    }
    return block_sum(sum, partial);
}

// The shortest prefix whose weights reach `wanted`, or where `strictly` are over it; the whole where none does.
// Ranks have `rank_bits` bits.
template <class Rank, class Weight>
__device__ __forceinline__ Cut find_cut(int vocab, double *partial, int rank_bits, Rank rank, Weight weight, double wanted,
                        bool strictly) {
    auto reached = [&](Cut cut) {
        double sum = vocabulary_sum(
            vocab, partial, [&](int token) { return cut.keeps(rank(token), token) ? weight(token) : 0.0; });
        return strictly ? sum > wanted : sum >= wanted;
    };
    Cut cut = {0, NO_TOKEN};
    for (u64 low = 0, high = rank_bits == 0 ? 0 : ~0ull >> (64 - rank_bits); low < high;) {
        u64 middle = low + (high - low) / 2;
        if (reached({middle, NO_TOKEN})) {
            high = middle;
        } else {
            low = middle + 1;
        }
        cut.rank = high;
    }
    u32 first = 0, last = vocab - 1;
    while (first < last) {
        u32 middle = first + (last - first) / 2;
        if (reached({cut.rank, middle})) {
            last = middle;
        } else {
            first = middle + 1;
        }
    }
    cut.token = last;
    return cut;
}
