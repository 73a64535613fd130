// Paged attention, for one element type of keys and values: writing them, and attending to them.

#ifndef SETU_ATTENTION_LOADS
#define SETU_ATTENTION_LOADS
#include "attention.cuh"
#include "formats.cuh"
#include "rope.cuh"

// Elements in sixteen bytes.
__device__ __forceinline__ constexpr int piece_elements(Format element) { return element == F32 ? 4 : 8; }

template <Format TYPE> __device__ __forceinline__ u32 element_bits(float value) {
    return TYPE == F32 ? __float_as_uint(value) : TYPE == F16 ? f16_of_float(value) : bf16_of_float(value);
}

template <Format TYPE> __device__ __forceinline__ void store_element(u8 *row, size_t at, float value) {
    if constexpr (TYPE == F32) {
        reinterpret_cast<float *>(row)[at] = value;
    } else {
        reinterpret_cast<u16 *>(row)[at] = static_cast<u16>(element_bits<TYPE>(value));
    }
}

// Four elements, from one on whose number is a multiple of four.
template <Format TYPE> __device__ __forceinline__ void store_four(u8 *row, size_t at, float4 values) {
    if constexpr (TYPE == F32) {
        *reinterpret_cast<float4 *>(row + 4 * at) = values;
    } else {
        uint2 words = {element_bits<TYPE>(values.x) | element_bits<TYPE>(values.y) << 16,
                       element_bits<TYPE>(values.z) | element_bits<TYPE>(values.w) << 16};
        *reinterpret_cast<uint2 *>(row + 2 * at) = words;
    }
}

template <Format TYPE> __device__ __forceinline__ void load_piece(const u8 *piece, float *values) {
    if constexpr (TYPE == F32) {
        float4 four = *reinterpret_cast<const float4 *>(piece);
        values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else {
        load_floats<TYPE>(piece, 0, values);
    }
}
#endif

// Writes a token's keys and values into its cell: page × page_tokens + place in the page. With `angles` the first
// `2 × pairs` columns of each head of Q and K are turned on the way, as in rope.cu. Blocks in x are tokens, in y shares of
// the heads: of Q, which go to `q_turned`, then of K and of V. A thread takes the same columns of several heads, four if
// all lies in fours.
#define NAME JOIN(kv_write, ELEMENT)
DENSE_KERNEL_OF(256, 5, NAME, Pages pages, const u32 *cells, const float *q, int q_stride, const float *k, int k_stride,
                const float *v, int v_stride, int q_heads, float *q_turned, int q_turned_stride, const float *angles,
                int pairs, int interleaved) {
    wait_for_launches_before();
    constexpr int piece = piece_elements(ELEMENT);
    size_t token = blockIdx.x;
    u32 cell = cells[token];
    int place = cell % pages.page_tokens;
    u8 *page = pages.start + cell / pages.page_tokens * pages.page_bytes;
    u8 *keys = page + pages.k_at, *values = page + pages.v_at;
    const float *turns = angles + token * 2 * pairs;
    q += token * q_stride, k += token * k_stride, v += token * v_stride, q_turned += token * q_turned_stride;
    u64 starts = reinterpret_cast<u64>(q) | reinterpret_cast<u64>(k) | reinterpret_cast<u64>(v);
    bool aligned = ((starts | reinterpret_cast<u64>(q_turned)) & 15) == 0;
    int columns = aligned && ((pages.k_dim | pages.v_dim | pairs) & 3) == 0 ? 4 : 1;

    int all = max(pages.k_padded, pages.v_dim) / columns, width = min(all, static_cast<int>(blockDim.x));
    int slots = blockDim.x / width, slot = threadIdx.x / width, stride = gridDim.y * slots;
    if (slot >= slots) {
        return;
    }
    auto key_at = [&](int head, int dim) {
        size_t of_head = static_cast<size_t>(head) * (pages.k_padded / piece) + dim / piece;
        return (of_head * pages.page_tokens + place) * piece + dim % piece;
    };
    auto value_at = [&](int head, int dim) {
        return (static_cast<size_t>(head) * pages.page_tokens + place) * pages.v_dim + dim;
    };
    for (int dim = threadIdx.x % width * columns; dim < all * columns; dim += width * columns) {
        int index = blockIdx.y * slots + slot;
        bool in_head = dim < pages.k_dim;
        if (columns == 4) {
            FourTurns four(dim, turns, pairs, interleaved);
            for (; index + stride < q_heads; index += 2 * stride) {
                int at = index * pages.k_dim, next = at + stride * pages.k_dim;
                if (in_head) {
                    // Both are asked for before either is written.
                    float4 first = four.turned(q + at, dim), second = four.turned(q + next, dim);
                    *reinterpret_cast<float4 *>(q_turned + at + dim) = first;
                    *reinterpret_cast<float4 *>(q_turned + next + dim) = second;
                }
            }
            for (; index < q_heads; index += stride) {
                int at = index * pages.k_dim;
                if (in_head) {
                    *reinterpret_cast<float4 *>(q_turned + at + dim) = four.turned(q + at, dim);
                }
            }
            for (index -= q_heads; index < pages.heads; index += stride) {
                float4 key = {0.0f, 0.0f, 0.0f, 0.0f};
                if (in_head) {
                    key = four.turned(k + index * pages.k_dim, dim);
                }
                if (dim < pages.k_padded) {
                    store_four<ELEMENT>(keys, key_at(index, dim), key);
                }
            }
            for (index -= pages.heads; index < pages.heads; index += stride) {
                if (dim < pages.v_dim) {
                    float4 value = *reinterpret_cast<const float4 *>(v + index * pages.v_dim + dim);
                    store_four<ELEMENT>(values, value_at(index, dim), value);
                }
            }
            continue;
        }
        for (; index < q_heads; index += stride) {
            int at = index * pages.k_dim;
            if (in_head) {
                q_turned[at + dim] = turned(q + at, dim, turns, pairs, interleaved);
            }
        }
        for (index -= q_heads; index < pages.heads; index += stride) {
            float key = in_head ? turned(k + index * pages.k_dim, dim, turns, pairs, interleaved) : 0.0f;
            if (dim < pages.k_padded) {
                store_element<ELEMENT>(keys, key_at(index, dim), key);
            }
        }
        for (index -= pages.heads; index < pages.heads; index += stride) {
            if (dim < pages.v_dim) {
                store_element<ELEMENT>(values, value_at(index, dim), v[index * pages.v_dim + dim]);
            }
        }
    }
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
            for (int index = 0; index < pieces; index++) {
                float key[piece];
                size_t at = static_cast<size_t>(kv_head * pieces + index) * pages.page_tokens + place;
                load_piece<ELEMENT>(keys + at * 16, key);
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
            size_t index = (static_cast<size_t>(kv_head) * pages.page_tokens + place) * pages.v_dim + column;
            for (int last = at + in_page; at < last; at++, index += pages.v_dim) {
                float value = load_float<ELEMENT>(values, index);
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
