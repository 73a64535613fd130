// Paged attention, for one element type of keys and values: writing them, and attending to them.

#ifndef SETU_ATTENTION_LOADS
#define SETU_ATTENTION_LOADS
#include "cells.cuh"

// A piece of a key; `scale` is the key's, if it has one.
template <Format TYPE> __device__ __forceinline__ void load_piece(const u8 *piece, u32 scale, float *values) {
    if constexpr (TYPE == F32) {
        float4 four = *reinterpret_cast<const float4 *>(piece);
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else if constexpr (TYPE == F8_E4M3) {
        uint4 codes = *reinterpret_cast<const uint4 *>(piece);
        u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            u32 two = words[i / 4] >> i % 4 * 8;
            u32 elements = elements_of(__byte_perm(two, 0, 0x1404), scale_twice(scale));
            values[i] = float_of_bf16(static_cast<u16>(elements));
            values[i + 1] = float_of_bf16(static_cast<u16>(elements >> 16));
        }
    } else {
        load_floats<TYPE>(piece, 0, values);
    }
}

// The same of one element of values.
template <Format TYPE> __device__ __forceinline__ float load_value(const u8 *values, size_t at, u32 scale) {
    if constexpr (TYPE == F8_E4M3) {
        return element_at(values, at, scale);
    } else {
        return load_float<TYPE>(values, at);
    }
}
#endif

// Writes a token's keys and values into its cell: page × page_tokens + place in the page. With `angles` the first
// `2 × pairs` columns of each head of K, and of Q if there are any, are turned on the way, as in rope.cu. Blocks in x are
// tokens, in y shares of the heads: of Q, which go to `q_turned`, then of K and of V.
#define NAME JOIN(kv_write, ELEMENT)
DENSE_KERNEL_OF(256, WRITE_BLOCKS, NAME, Pages pages, const u32 *cells, const float *q, int q_stride, const float *k,
                int k_stride, const float *v, int v_stride, int q_heads, float *q_turned, int q_turned_stride, const float *angles,
                int pairs, int interleaved) {
    wait_for_launches_before();
    size_t token = blockIdx.x;
    u32 cell = cells[token];
    write_cells<ELEMENT>({pages, pages.start + cell / pages.page_tokens * pages.page_bytes,
                          static_cast<int>(cell % pages.page_tokens), q + token * q_stride, k + token * k_stride,
                          v + token * v_stride, q_heads, q_turned + token * q_turned_stride, angles + token * 2 * pairs,
                          pairs, interleaved});
}
#undef NAME

// Attends from a tile of queries: of row `tiles[2i]` the query number `tiles[2i + 1]` and those behind it, where
// token t of a row and head h of a group have the number `t × group + h`. Blocks in y are KV heads, once for
// every 128 columns of values. With `partials` a block does one part, the z-th that its tile sees, and leaves
// what it found there; without, all parts, and writes the result.
#define NAME JOIN(attend, ELEMENT)
KERNEL_OF(128, NAME, Pages pages, const u32 *table_offsets, const u32 *table_pages, const u32 *table_skipped,
          const u32 *row_offsets, const u32 *row_positions, const u32 *tiles, const float *q, int q_stride, int group,
          int window, float scale, float softcap, const float *sinks, float *y, int y_stride, u16 *halves,
          int halves_stride, int half, float *partials, int most_parts) {
    wait_for_launches_before();
    constexpr int piece = piece_elements(ELEMENT);
    int row = tiles[2 * blockIdx.x], first_query = tiles[2 * blockIdx.x + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(QUERIES, tokens * group - first_query);
    int kv_head = blockIdx.y % pages.heads;
    int column = blockIdx.y / pages.heads * PART + threadIdx.x;
    const u32 *row_pages = table_pages + table_offsets[row];
    int skipped = table_skipped[row];
    int heads = pages.heads * group;

    DYNAMIC_SHARED(float, shared);
    float *query = shared;                              // [QUERIES][k_padded]
    float *scores = query + QUERIES * pages.k_padded;   // [QUERIES][PART]
    float *part_highest = scores + QUERIES * PART;      // [QUERIES]
    float *part_total = part_highest + QUERIES;         // [QUERIES]

    // What each query sees: nothing where there is no such query.
    int from[QUERIES], to[QUERIES];
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        int position = static_cast<int>(row_positions[row]) + (first_query + i) / group;
        from[i] = first_seen(position, window);
        to[i] = i < queries ? position : -1;
    }
    int seen_from = from[0];
    int seen_to = static_cast<int>(row_positions[row]) + (first_query + queries - 1) / group;
    int part = seen_from / PART, last_part = seen_to / PART;
    if (partials) {
        part += blockIdx.z;
        if (part > last_part) {
            return;
        }
        last_part = part;
    }

    for (int i = threadIdx.x; i < QUERIES * pages.k_padded; i += blockDim.x) {
        int number = first_query + i / pages.k_padded, dim = i % pages.k_padded;
        bool exists = i / pages.k_padded < queries && dim < pages.k_dim;
        size_t token = first_token + number / group;
        int head = kv_head * group + number % group;
        query[i] = exists ? q[token * q_stride + static_cast<size_t>(head) * pages.k_dim + dim] : 0.0f;
    }
    __syncthreads();

    Attended all[QUERIES];
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        all[i] = nothing_attended();
    }
    for (; part <= last_part; part++) {
        int begin = part * PART;
        // A thread scores one position for all queries.
        int position = begin + threadIdx.x;
        float dots[QUERIES];
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            dots[i] = 0.0f;
        }
        if (position >= seen_from && position <= seen_to) {
            u64 page = row_pages[position / pages.page_tokens - skipped];
            int place = position % pages.page_tokens;
            const u8 *keys = pages.start + page * pages.page_bytes + pages.k_at;
            int pieces = pages.k_padded / piece;
            u32 key_scale = 0;
            if constexpr (ELEMENT == F8_E4M3) {
                key_scale = pages.start[page * pages.page_bytes + pages.scales_of(kv_head, place)];
            }
            for (int index = 0; index < pieces; index++) {
                float key[piece];
                size_t at = static_cast<size_t>(kv_head * pieces + index) * pages.page_tokens + place;
                load_piece<ELEMENT>(keys + at * 16, key_scale, key);
#pragma unroll
                for (int i = 0; i < QUERIES; i++) {
#pragma unroll
                    for (int dim = 0; dim < piece; dim++) {
                        dots[i] = fmaf(query[i * pages.k_padded + index * piece + dim], key[dim], dots[i]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            float score = dots[i] * scale;
            scores[i * PART + threadIdx.x] = softcap > 0.0f ? softcap * tanhf(score / softcap) : score;
        }
        __syncthreads();

        // A warp turns a query's scores into the terms of its softmax.
        for (int i = warp_of_thread(); i < queries; i += PART / 32) {
            int at = static_cast<int>(row_positions[row]) + (first_query + i) / group;
            int least = first_seen(at, window);
            float highest = -INFINITY_F;
            for (int index = lane_of_thread(); index < PART; index += 32) {
                if (begin + index >= least && begin + index <= at) {
                    highest = fmaxf(highest, scores[i * PART + index]);
                }
            }
            highest = warp_max(highest);
            float total = 0.0f;
            for (int index = lane_of_thread(); index < PART; index += 32) {
                if (begin + index >= least && begin + index <= at) {
                    float term = expf(scores[i * PART + index] - highest);
                    scores[i * PART + index] = term;
                    total += term;
                }
            }
            total = warp_sum(total);
            if (lane_of_thread() == 0) {
                part_highest[i] = highest;
                part_total[i] = total;
            }
        }
        __syncthreads();

        // A thread sums one column of values for all queries, position by position. A query skips what it
        // doesn't see, for a NaN there is none of its business.
        float sums[QUERIES];
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            sums[i] = 0.0f;
        }
        int end = min(begin + PART - 1, seen_to);
        for (int at = max(begin, seen_from); column < pages.v_dim && at <= end;) {
            int place = at % pages.page_tokens;
            int in_page = min(pages.page_tokens - place, end + 1 - at);
            u64 page = row_pages[at / pages.page_tokens - skipped];
            const u8 *values = pages.start + page * pages.page_bytes + pages.v_at;
            const u8 *scales = pages.start + page * pages.page_bytes + pages.scales_of(kv_head, place) + 1;
            size_t index = (static_cast<size_t>(kv_head) * pages.page_tokens + place) * pages.v_dim + column;
            for (int last = at + in_page; at < last; at++, index += pages.v_dim, scales += 2) {
                u32 value_scale = ELEMENT == F8_E4M3 ? *scales : 0;
                float value = load_value<ELEMENT>(values, index, value_scale);
#pragma unroll
                for (int i = 0; i < QUERIES; i++) {
                    if (at >= from[i] && at <= to[i]) {
                        sums[i] = fmaf(scores[i * PART + at - begin], value, sums[i]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            if (max(begin, from[i]) <= min(end, to[i])) {
                Attended found = {part_highest[i], part_total[i], sums[i]};
                int number = first_query + i;
                size_t token = first_token + number / group;
                int head = kv_head * group + number % group;
                if (partials) {
                    size_t at = (token * heads + head) * most_parts + part - from[i] / PART;
                    float *place = partials + at * (pages.v_dim + 2);
                    if (column < pages.v_dim) {
                        place[2 + column] = found.value;
                    }
                    if (column == 0) {
                        place[0] = found.highest;
                        place[1] = found.total;
                    }
                } else {
                    all[i] = merge(all[i], found);
                }
            }
        }
        __syncthreads();
    }
    if (partials || column >= pages.v_dim) {
        return;
    }
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
        if (i < queries) {
            int number = first_query + i;
            int head = kv_head * group + number % group;
            size_t token = first_token + number / group;
            size_t to = static_cast<size_t>(head) * pages.v_dim + column;
            store_attended(y, token * y_stride + to, halves, token * halves_stride + to, half,
                           finish(all[i], sinks, head));
        }
    }
}
#undef NAME
