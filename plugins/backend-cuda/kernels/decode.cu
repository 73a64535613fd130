// Paged attention on tensor cores for rows with few queries, such as those that decode, for one element type of keys
// and values: bound by how fast those come. Prompts go to prefill.cu.
//
// A block takes a tile of queries of one KV head, and a share of the positions that they see. Its warps take turns, STEP
// positions at a time. Keys and values go from memory to registers and from there to the tensor cores, with the next ones
// on their way: a sum over columns may take them in any order, so that a lane's sixteen bytes of a key are two operands
// as they are, and those of four values become operands when their halves are paired.
//
// In eight bits the four codes of a word become two words of two elements, whose order the queries are loaded in.
//
// Each warp has a softmax of its own. They are merged in the block, and by the block of the tile that is done last for
// all shares, in one order both times. That a context is shared out over blocks is from Flash-Decoding (Dao et al., 2023).

#ifndef SETU_DECODE
#define SETU_DECODE
#include "cells.cuh"

// Queries of a tile, warps of a block, and positions that a warp takes at a time.
constexpr int DECODE_QUERIES = 16;
constexpr int DECODE_WARPS = 4;
constexpr int STEP = 16;

// What a lane has of a step, as it came from memory.
template <Format TYPE, int HEAD> struct Fetched {
    // Elements in a piece of sixteen bytes, and pieces that a lane has of a key: every fourth.
    static constexpr int piece = piece_elements(TYPE), key_pieces = HEAD / (4 * piece);
    // Columns side by side that a lane has of a value, in so many bytes, and how often.
    static constexpr int value_bytes = HEAD * element_bytes(TYPE) / 8 < 16 ? 8 : 16;
    static constexpr int columns = value_bytes / element_bytes(TYPE), value_pieces = HEAD / (8 * columns);

    // Keys `lane / 4` and `lane / 4 + 8`, and the values of the four positions whose terms this lane has.
    u32 keys[2][key_pieces][4];
    u32 values[4][value_pieces][value_bytes / 4];
    // Of each key in both halves; and of the values two and two.
    u32 key_scales[2], value_scales[2];

    // The words of key `i` for product number `at` of those over its columns.
    __device__ __forceinline__ void key_operand(int i, int at, u32 (&words)[2]) const {
        if constexpr (TYPE == F8_E4M3) {
            u32 codes = keys[i][at / 4][at % 4];
            words[0] = elements_of(codes << 8, key_scales[i]), words[1] = elements_of(codes, key_scales[i]);
        } else {
            words[0] = keys[i][at / 2][at % 2 * 2], words[1] = keys[i][at / 2][at % 2 * 2 + 1];
        }
    }

    // Elements `at` of the upper two of the lane's positions, or of the lower two, side by side.
    __device__ __forceinline__ u32 value_operand(int at, int lower) const {
        int index = at / columns, element = at % columns;
        const auto &first = values[2 * lower][index], &second = values[2 * lower + 1][index];
        if constexpr (TYPE == F8_E4M3) {
            u32 codes = __byte_perm(first[element / 4], second[element / 4], element % 4 * 0x1010 | 0x4000);
            return elements_of(codes, value_scales[lower]);
        } else {
            return __byte_perm(first[element / 2], second[element / 2], element % 2 ? 0x7632 : 0x5410);
        }
    }

    // Which of eight columns of a query comes at place `i`, so that they meet those of `key_operand`.
    static __device__ __forceinline__ constexpr int key_order(int i) {
        return TYPE == F8_E4M3 ? i / 4 * 4 + i % 4 / 2 + i % 2 * 2 : i;
    }
};

// Where a row's keys and values are. Pages hold whole steps.
template <Format TYPE, int HEAD> struct Cells {
    using Lane = Fetched<TYPE, HEAD>;

    Pages pages;
    const u32 *row_pages;
    int skipped, kv_head, seen_from, seen_to;
    Paging paging;

    __device__ __forceinline__ bool sees(int position) const { return position >= seen_from && position <= seen_to; }

    // The page of the step at `begin`, of which something is seen.
    __device__ __forceinline__ const u8 *page_of(int begin) const {
        int page = paging.page(min(max(begin, seen_from), seen_to)) - skipped;
        return pages.start + row_pages[page] * pages.page_bytes;
    }

    // In a page, where this KV head's keys and values begin.
    __device__ __forceinline__ u64 keys_at() const {
        return pages.k_at + static_cast<u64>(kv_head) * pages.page_tokens * pages.k_padded * element_bytes(TYPE);
    }
    __device__ __forceinline__ u64 values_at() const {
        return pages.v_at + static_cast<u64>(kv_head) * pages.page_tokens * pages.v_dim * element_bytes(TYPE);
    }

    // Asks for the keys and values of a step: a line of each for each lane.
    __device__ __forceinline__ void prefetch_step(int begin) const {
        const u8 *page = page_of(begin);
        int place = paging.place(begin), lane = lane_of_thread();
        if (lane / 2 < pages.k_padded / Lane::piece) {
            prefetch(page + keys_at() + (lane / 2 * pages.page_tokens + place) * 16 + lane % 2 * 128);
        }
        if (lane * 128 < STEP * pages.v_dim * element_bytes(TYPE)) {
            prefetch(page + values_at() + place * pages.v_dim * element_bytes(TYPE) + lane * 128);
        }
    }

    __device__ __forceinline__ void load_keys(int begin, Lane &fetched) const {
        int lane = lane_of_thread(), first = lane % 4, left = pages.k_padded / Lane::piece - first;
        const u8 *page = page_of(begin);
        const u8 *from = page + keys_at() + (first * pages.page_tokens + paging.place(begin) + lane / 4) * 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bool seen = sees(begin + lane / 4 + 8 * i);
#pragma unroll
            for (int t = 0; t < Lane::key_pieces; t++) {
                load(from + (4 * t * pages.page_tokens + 8 * i) * 16, seen && 4 * t < left, fetched.keys[i][t]);
            }
            if constexpr (TYPE == F8_E4M3) {
                u64 scale = pages.scales_of(kv_head, paging.place(begin) + lane / 4 + 8 * i);
                fetched.key_scales[i] = scale_twice(seen ? page[scale] : 0);
            }
        }
    }

    __device__ __forceinline__ void load_values(int begin, Lane &fetched) const {
        int lane = lane_of_thread(), first = lane % 4 * 2, left = pages.v_dim - lane / 4 * Lane::columns;
        int place = paging.place(begin) + first;
        const u8 *page = page_of(begin);
        const u8 *from = page + values_at() + (place * pages.v_dim + lane / 4 * Lane::columns) * element_bytes(TYPE);
        u32 scales[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int behind = i % 2 + i / 2 * 8;
            bool seen = sees(begin + first + behind);
#pragma unroll
            for (int t = 0; t < Lane::value_pieces; t++) {
                int column = 8 * Lane::columns * t;
                load(from + (behind * pages.v_dim + column) * element_bytes(TYPE), seen && column < left,
                     fetched.values[i][t]);
            }
            if constexpr (TYPE == F8_E4M3) {
                scales[i] = seen ? page[pages.scales_of(kv_head, place + behind) + 1] : 0;
            }
        }
        if constexpr (TYPE == F8_E4M3) {
            fetched.value_scales[0] = scale_pair(scales[0], scales[1]);
            fetched.value_scales[1] = scale_pair(scales[2], scales[3]);
        }
    }

    // Words from memory, or 0.
    static __device__ __forceinline__ void load(const u8 *from, bool exists, u32 (&words)[4]) {
        uint4 none = {0, 0, 0, 0}, loaded = exists ? *reinterpret_cast<const uint4 *>(from) : none;
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    }
    static __device__ __forceinline__ void load(const u8 *from, bool exists, u32 (&words)[2]) {
        uint2 none = {0, 0}, loaded = exists ? *reinterpret_cast<const uint2 *>(from) : none;
        words[0] = loaded.x, words[1] = loaded.y;
    }
};

// Keys and values that are yet to be written to their cells, of one token for each row; `cells` is null if all have been.
struct Unwritten {
    const u32 *cells;
    const float *k, *v;
    int k_stride, v_stride;

    __device__ __forceinline__ Token token(size_t number, const Pages &pages, Paging paging, const Turning &turning) const {
        u32 cell = cells[number];
        return {pages, pages.start + paging.page(cell) * pages.page_bytes, paging.place(cell), nullptr, k + number * k_stride,
                v + number * v_stride, 0, nullptr, turning.angles + number * 2 * turning.pairs, turning.pairs, turning.interleaved};
    }
};

// Of steps that several blocks share, where the share of block `index` of `count` begins.
__device__ __forceinline__ int share_begin(int steps, int index, int count) {
    return static_cast<int>(static_cast<u32>(steps) * static_cast<u32>(index) / static_cast<u32>(count));
}

// `exp2(value - highest)`, 0 for what isn't there.
__device__ __forceinline__ float term_of(float value, float highest) {
    return value == -INFINITY_F ? 0.0f : short_exp2(value - highest);
}

// Floats of what a warp, or a block, has found for a query: the sums of its columns, the highest score, and the total. They
// are read four at a time.
__device__ __forceinline__ constexpr int found_floats(int columns) { return columns + 4; }

// What is merged: the softmax so far, and the sums of four columns.
struct Merged {
    float highest, total, sums[4];

    __device__ __forceinline__ void add(const float *found, int columns, int column, bool of_other_block) {
        const float4 *four = reinterpret_cast<const float4 *>(found + column);
        const float4 *tail = reinterpret_cast<const float4 *>(found + columns);
        // What other blocks wrote must not come from the cache of this one's multiprocessor.
        float4 sum = of_other_block ? __ldcg(four) : *four, softmax = of_other_block ? __ldcg(tail) : *tail;
        float above = fmaxf(highest, softmax.x);
        float keeps = term_of(highest, above), adds = term_of(softmax.x, above);
        highest = above;
        total = total * keeps + softmax.y * adds;
        sums[0] = sums[0] * keeps + sum.x * adds, sums[1] = sums[1] * keeps + sum.y * adds;
        sums[2] = sums[2] * keeps + sum.z * adds, sums[3] = sums[3] * keeps + sum.w * adds;
    }

    __device__ __forceinline__ void leave(float *found, int columns, int column) const {
        *reinterpret_cast<float4 *>(found + column) = float4{sums[0], sums[1], sums[2], sums[3]};
        if (column == 0) {
            *reinterpret_cast<float4 *>(found + columns) = float4{highest, total, 0.0f, 0.0f};
        }
    }
};

__device__ __forceinline__ Merged nothing_merged() { return {-INFINITY_F, 0.0f, {}}; }

// As `attend` of attention.cu, in tiles of DECODE_QUERIES. Blocks in z are shares; with more than one, `partials` has room
// for DECODE_QUERIES × (v_dim + 4) floats for each block, and `arrived` has a counter for each tile and KV head, all 0
// between launches. A page's tokens are a power of two, and whole steps. Heads are at most HEAD columns wide, and those of
// values a multiple of eight, in eight bits of sixteen.
//
// With unwritten tokens a tile has all queries of a row and KV head, and the last of its blocks, which sees the token, writes
// its key and value; columns lie in fours then.
template <Format TYPE, int HEAD>
__device__ __forceinline__ void attend_few(Pages pages, const u32 *table_offsets, const u32 *table_pages,
                                           const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions,
                                           const u32 *tiles, const float *q, int q_stride, int group, int window,
                                           float scale, float softcap, const float *sinks, float *y, int y_stride,
                                           u16 *halves, int halves_stride, int half, const Turning &turning,
                                           float *partials, u32 *arrived, const Unwritten &unwritten) {
    // No launch writes a step's tables.
    int row = tiles[2 * blockIdx.x], first_query = tiles[2 * blockIdx.x + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(DECODE_QUERIES, tokens * group - first_query);
    int kv_head = blockIdx.y, shares = gridDim.z;
    int first_position = static_cast<int>(row_positions[row]);
    auto position_of = [&](int query) { return first_position + (first_query + query) / group; };
    constexpr Half HALF = half_kept(TYPE);
    Cells<TYPE, HEAD> cells = {pages,
                               table_pages + table_offsets[row],
                               static_cast<int>(table_skipped[row]),
                               kv_head,
                               first_seen(position_of(0), window),
                               position_of(queries - 1),
                               Paging(pages.page_tokens)};
    int first_step = cells.seen_from / STEP, steps = cells.seen_to / STEP - first_step + 1;
    int lane = lane_of_thread(), warp = warp_of_thread();
    int step = first_step + share_begin(steps, blockIdx.z, shares) + warp;
    int end = first_step + share_begin(steps, blockIdx.z + 1, shares);

    // In the end `[DECODE_WARPS][DECODE_QUERIES][found_floats(HEAD)]`.
    DYNAMIC_SHARED(float, shared);
    constexpr int of_query = found_floats(HEAD);
    if (step < end) {
        cells.prefetch_step(step * STEP);
    }
    wait_for_launches_before();
    // Where a query of the tile lies, not turned.
    auto query_of = [&](int in_tile) {
        int number = first_query + in_tile;
        return q + (first_token + number / group) * static_cast<size_t>(q_stride) +
               (kv_head * group + number % group) * pages.k_dim;
    };
    if (turning.angles) {
        // All warps need them.
        int fours = pages.k_dim / 4;
        for (int i = threadIdx.x; i < queries * fours; i += blockDim.x) {
            int in_tile = i / fours, dim = i % fours * 4;
            FourTurns turns = turning.of(first_token + (first_query + in_tile) / group, dim);
            *reinterpret_cast<float4 *>(shared + in_tile * of_query + dim) = turns.turned(query_of(in_tile), dim);
        }
    }
    if (unwritten.cells && static_cast<int>(blockIdx.z) == shares - 1) {
        write_head<TYPE>(unwritten.token(first_token, pages, cells.paging, turning), kv_head);
    }
    __syncthreads();

    using Lane = Fetched<TYPE, HEAD>;
    Lane fetched;
    if (step < end) {
        cells.load_keys(step * STEP, fetched);
        cells.load_values(step * STEP, fetched);
    }
    // This lane's two queries: their columns of the pieces that it has of keys, for each product, and what they see.
    u32 query[2][HEAD / 16][2];
    int from[2], to[2];
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int in_tile = lane / 4 + 8 * lower;
        to[lower] = in_tile < queries ? position_of(in_tile) : -1;
        from[lower] = first_seen(position_of(in_tile), window);
        const float *start = turning.angles ? shared + in_tile * of_query : query_of(in_tile);
#pragma unroll
        for (int t = 0; t < HEAD / 32; t++) {
            constexpr int eights = Lane::piece / 8;
            float columns[8];
            int dim = (4 * (t / eights) + lane % 4) * Lane::piece + t % eights * 8;
            load_query(start, dim, pages.k_dim, in_tile < queries, columns);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                query[lower][2 * t + i / 2][i % 2] =
                    halves_of<HALF>(columns[Lane::key_order(2 * i)], columns[Lane::key_order(2 * i + 1)]);
            }
        }
    }
    // The queries' place is taken in the end.
    __syncthreads();
    float inverse_cap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    float highest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f};
    float sums[HEAD / 8][4] = {};
    for (; step < end; step += DECODE_WARPS) {
        float scores[2][4] = {};
#pragma unroll
        for (int at = 0; at < HEAD / 16; at++) {
            u32 columns[4] = {query[0][at][0], query[1][at][0], query[0][at][1], query[1][at][1]};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 key[2];
                fetched.key_operand(i, at, key);
                multiply_add<HALF>(scores[i], columns, key[0], key[1]);
            }
        }
        if (step + DECODE_WARPS < end) {
            cells.load_keys((step + DECODE_WARPS) * STEP, fetched);
        }
        if (step + 2 * DECODE_WARPS < end) {
            cells.prefetch_step((step + 2 * DECODE_WARPS) * STEP);
        }
        float above[2] = {highest[0], highest[1]};
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int position = step * STEP + 8 * i + lane % 4 * 2 + j % 2;
                float score = scores[i][j] * scale;
                score = (softcap > 0.0f ? softcap * short_tanh(score * inverse_cap) : score) * LOG2_E;
                bool seen = position >= from[j / 2] && position <= to[j / 2];
                scores[i][j] = seen ? score : -INFINITY_F;
                above[j / 2] = fmaxf(above[j / 2], scores[i][j]);
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            above[lower] = fmaxf(above[lower], __shfl_xor_sync(ALL_LANES, above[lower], 1));
            above[lower] = fmaxf(above[lower], __shfl_xor_sync(ALL_LANES, above[lower], 2));
            float keeps = term_of(highest[lower], above[lower]);
            highest[lower] = above[lower];
            total[lower] *= keeps;
#pragma unroll
            for (int j = 0; j < HEAD / 8; j++) {
                sums[j][2 * lower] *= keeps;
                sums[j][2 * lower + 1] *= keeps;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                scores[i][j] = term_of(scores[i][j], highest[j / 2]);
                total[j / 2] += scores[i][j];
            }
        }
        u32 terms[4] = {halves_of<HALF>(scores[0][0], scores[0][1]), halves_of<HALF>(scores[0][2], scores[0][3]),
                        halves_of<HALF>(scores[1][0], scores[1][1]), halves_of<HALF>(scores[1][2], scores[1][3])};
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
            multiply_add<HALF>(sums[j], terms, fetched.value_operand(j, 0), fetched.value_operand(j, 1));
        }
        if (step + DECODE_WARPS < end) {
            cells.load_values((step + DECODE_WARPS) * STEP, fetched);
        }
    }

#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 1);
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 2);
        float *found = shared + (warp * DECODE_QUERIES + lane / 4 + 8 * lower) * of_query;
        if (lane % 4 == 0) {
            found[HEAD] = highest[lower];
            found[HEAD + 1] = total[lower];
        }
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
            constexpr int columns = Lane::columns;
            int column = (j / columns * 8 + lane % 4 * 2) * columns + j % columns;
            found[column] = sums[j][2 * lower];
            found[column + columns] = sums[j][2 * lower + 1];
        }
    }
    __syncthreads();

    // A thread merges four columns of a query.
    int fours = pages.v_dim / 4, floats = found_floats(pages.v_dim);
    size_t tile = blockIdx.x * gridDim.y + kv_head;
    float *of_tile = partials + tile * shares * DECODE_QUERIES * floats;
    auto merge_warps = [&](int query, int column) {
        Merged merged = nothing_merged();
#pragma unroll
        for (int other = 0; other < DECODE_WARPS; other++) {
            merged.add(shared + (other * DECODE_QUERIES + query) * of_query, HEAD, column, false);
        }
        return merged;
    };
    if (shares > 1) {
        for (int i = threadIdx.x; i < queries * fours; i += blockDim.x) {
            int in_tile = i / fours, column = i % fours * 4;
            merge_warps(in_tile, column)
                .leave(of_tile + (blockIdx.z * DECODE_QUERIES + in_tile) * floats, pages.v_dim, column);
        }
        if (!arrives_last(arrived + tile, shares, [] { __syncthreads(); })) {
            return;
        }
    }
    for (int i = threadIdx.x; i < queries * fours; i += blockDim.x) {
        int in_tile = i / fours, column = i % fours * 4, number = first_query + in_tile;
        int head = kv_head * group + number % group;
        Merged merged;
        if (shares > 1) {
            merged = nothing_merged();
#pragma unroll 8
            for (int other = 0; other < shares; other++) {
                merged.add(of_tile + (other * DECODE_QUERIES + in_tile) * floats, pages.v_dim, column, true);
            }
        } else {
            merged = merge_warps(in_tile, column);
        }
        float by = share_of_term(merged.highest, merged.total, sinks, head);
        size_t token = first_token + number / group, place = static_cast<size_t>(head) * pages.v_dim + column;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            store_attended(y, token * y_stride + place + j, halves, token * halves_stride + place + j, half,
                           merged.sums[j] * by);
        }
    }
}
#endif

#define DEFINE_DECODE(NAME, HEAD)                                                                                      \
    DENSE_KERNEL_OF(128, 2, NAME, Pages pages, const u32 *table_offsets, const u32 *table_pages,                       \
                    const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions, const u32 *tiles,      \
                    const float *q, int q_stride, int group, int window, float scale, float softcap,                   \
                    const float *sinks, float *y, int y_stride, u16 *halves, int halves_stride, int half,              \
                    Turning turning, float *partials, u32 *arrived, Unwritten unwritten) {                             \
        attend_few<ELEMENT, HEAD>(                                                                                     \
            pages, table_offsets, table_pages, table_skipped, row_offsets, row_positions, tiles, q, q_stride, group,   \
            window, scale, softcap, sinks, y, y_stride, halves, halves_stride, half, turning, partials, arrived,       \
            unwritten);                                                                                                \
    }

DEFINE_DECODE(JOIN(decode_64, ELEMENT), 64)
DEFINE_DECODE(JOIN(decode_128, ELEMENT), 128)

#undef DEFINE_DECODE
