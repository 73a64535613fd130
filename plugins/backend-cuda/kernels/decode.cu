// Paged attention on tensor cores for rows with few queries, such as those that decode, for one element type of keys
// and values: bound by how fast those come. Prompts go to prefill.cu.
//
// A block takes a tile of queries of one KV head, and a share of the positions that they see. Its warps take turns, STEP
// positions at a time. Keys and values go from memory to registers and from there to the tensor cores, with the next ones
// on their way: a sum over columns may take them in any order, so that a lane's sixteen bytes of a key are two operands
// as they are, and those of four values become operands when their halves are paired.
//
// Each warp has a softmax of its own. They are merged in the block, and by the block of the tile that is done last for
// all shares, in one order both times. That a context is shared out over blocks is from Flash-Decoding (Dao et al., 2023).

#ifndef SETU_DECODE
#define SETU_DECODE
#include "attention.cuh"
#include "formats.cuh"

// Queries of a tile, warps of a block, and positions that a warp takes at a time.
constexpr int DECODE_QUERIES = 16;
constexpr int DECODE_WARPS = 4;
constexpr int STEP = 16;

// Where a row's keys and values are. Pages hold whole steps.
struct Cells {
    Pages pages;
    const u32 *row_pages;
    int skipped, seen_from, seen_to;
    Paging paging;
    // In a page, where this KV head's keys and values begin.
    u64 keys_at, values_at;

    __device__ __forceinline__ bool sees(int position) const { return position >= seen_from && position <= seen_to; }

    // The page of the step at `begin`, of which something is seen.
    __device__ __forceinline__ const u8 *page_of(int begin) const {
        int page = paging.page(min(max(begin, seen_from), seen_to)) - skipped;
        return pages.start + row_pages[page] * pages.page_bytes;
    }

    // Asks for the keys and values of a step: a line of each for each lane.
    __device__ __forceinline__ void prefetch_step(int begin) const {
        const u8 *page = page_of(begin);
        int place = paging.place(begin), lane = lane_of_thread();
        if (lane / 2 < pages.k_padded / 8) {
            prefetch(page + keys_at + (lane / 2 * pages.page_tokens + place) * 16 + lane % 2 * 128);
        }
        if (lane * 64 < STEP * pages.v_dim) {
            prefetch(page + values_at + place * pages.v_dim * 2 + lane * 128);
        }
    }

    // Of keys `lane / 4` and `lane / 4 + 8` of a step, every fourth piece.
    template <int HEAD> __device__ __forceinline__ void load_keys(int begin, uint4 (&keys)[2][HEAD / 32]) const {
        int lane = lane_of_thread(), first = lane % 4, left = pages.k_padded / 8 - first;
        const u8 *from = page_of(begin) + keys_at + (first * pages.page_tokens + paging.place(begin) + lane / 4) * 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bool seen = sees(begin + lane / 4 + 8 * i);
#pragma unroll
            for (int t = 0; t < HEAD / 32; t++) {
                uint4 none = {0, 0, 0, 0};
                const uint4 *piece = reinterpret_cast<const uint4 *>(from + (4 * t * pages.page_tokens + 8 * i) * 16);
                keys[i][t] = seen && 4 * t < left ? *piece : none;
            }
        }
    }

    // Of the four positions whose terms this lane has, columns `8 × (lane / 4)` on of every 64.
    template <int HEAD> __device__ __forceinline__ void load_values(int begin, uint4 (&values)[4][HEAD / 64]) const {
        int lane = lane_of_thread(), first = lane % 4 * 2, left = pages.v_dim - lane / 4 * 8;
        int place = paging.place(begin) + first;
        const u8 *from = page_of(begin) + values_at + (place * pages.v_dim + lane / 4 * 8) * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int behind = i % 2 + i / 2 * 8;
            bool seen = sees(begin + first + behind);
#pragma unroll
            for (int t = 0; t < HEAD / 64; t++) {
                uint4 none = {0, 0, 0, 0};
                const uint4 *piece = reinterpret_cast<const uint4 *>(from + (behind * pages.v_dim + 64 * t) * 2);
                values[i][t] = seen && 64 * t < left ? *piece : none;
            }
        }
    }
};

// Of steps that several blocks share, where the share of block `index` of `count` begins.
__device__ __forceinline__ int share_begin(int steps, int index, int count) {
    return static_cast<int>(static_cast<u32>(steps) * static_cast<u32>(index) / static_cast<u32>(count));
}

__device__ __forceinline__ u32 word_of(const uint4 &words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// The lower, or the upper halves of two words.
__device__ __forceinline__ u32 paired(u32 first, u32 second, bool upper) {
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
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
// values a multiple of eight.
template <Half HALF, int HEAD>
__device__ __forceinline__ void attend_few(Pages pages, const u32 *table_offsets, const u32 *table_pages,
                                           const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions,
                                           const u32 *tiles, const float *q, int q_stride, int group, int window,
                                           float scale, float softcap, const float *sinks, float *y, int y_stride,
                                           u16 *halves, int halves_stride, int half, float *partials, u32 *arrived) {
    wait_for_launches_before();
    int row = tiles[2 * blockIdx.x], first_query = tiles[2 * blockIdx.x + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(DECODE_QUERIES, tokens * group - first_query);
    int kv_head = blockIdx.y, shares = gridDim.z;
    int first_position = static_cast<int>(row_positions[row]);
    auto position_of = [&](int query) { return first_position + (first_query + query) / group; };
    int pieces = pages.k_padded / 8;
    Cells cells = {pages,
                   table_pages + table_offsets[row],
                   static_cast<int>(table_skipped[row]),
                   first_seen(position_of(0), window),
                   position_of(queries - 1),
                   Paging(pages.page_tokens),
                   pages.k_at + static_cast<u64>(kv_head * pieces * pages.page_tokens) * 16,
                   pages.v_at + static_cast<u64>(kv_head * pages.page_tokens * pages.v_dim) * 2};
    int first_step = cells.seen_from / STEP, steps = cells.seen_to / STEP - first_step + 1;
    int lane = lane_of_thread(), warp = warp_of_thread();
    int step = first_step + share_begin(steps, blockIdx.z, shares) + warp;
    int end = first_step + share_begin(steps, blockIdx.z + 1, shares);

    uint4 keys[2][HEAD / 32], values[4][HEAD / 64];
    if (step < end) {
        cells.load_keys<HEAD>(step * STEP, keys);
        cells.load_values<HEAD>(step * STEP, values);
    }
    // This lane's two queries: their columns of the pieces that it has of keys, and what they see.
    u32 query[2][HEAD / 32][4];
    int from[2], to[2];
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int in_tile = lane / 4 + 8 * lower, number = first_query + in_tile;
        to[lower] = in_tile < queries ? position_of(in_tile) : -1;
        from[lower] = first_seen(position_of(in_tile), window);
        const float *start = q + (first_token + number / group) * static_cast<size_t>(q_stride) +
                             (kv_head * group + number % group) * pages.k_dim;
#pragma unroll
        for (int t = 0; t < HEAD / 32; t++) {
            float columns[8];
            load_query(start, (4 * t + lane % 4) * 8, pages.k_dim, in_tile < queries, columns);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                query[lower][t][i] = halves_of<HALF>(columns[2 * i], columns[2 * i + 1]);
            }
        }
    }
    float inverse_cap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    float highest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f};
    float sums[HEAD / 8][4] = {};
    for (; step < end; step += DECODE_WARPS) {
        float scores[2][4] = {};
#pragma unroll
        for (int t = 0; t < HEAD / 32; t++) {
            u32 left[4] = {query[0][t][0], query[1][t][0], query[0][t][1], query[1][t][1]};
            u32 right[4] = {query[0][t][2], query[1][t][2], query[0][t][3], query[1][t][3]};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                multiply_add<HALF>(scores[i], left, keys[i][t].x, keys[i][t].y);
                multiply_add<HALF>(scores[i], right, keys[i][t].z, keys[i][t].w);
            }
        }
        if (step + DECODE_WARPS < end) {
            cells.load_keys<HEAD>((step + DECODE_WARPS) * STEP, keys);
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
            int t = j / 8, word = j % 8 / 2;
            bool upper = j % 2;
            multiply_add<HALF>(sums[j], terms,
                               paired(word_of(values[0][t], word), word_of(values[1][t], word), upper),
                               paired(word_of(values[2][t], word), word_of(values[3][t], word), upper));
        }
        if (step + DECODE_WARPS < end) {
            cells.load_values<HEAD>((step + DECODE_WARPS) * STEP, values);
        }
    }

    // `[DECODE_WARPS][DECODE_QUERIES][found_floats(HEAD)]`.
    DYNAMIC_SHARED(float, shared);
    constexpr int of_query = found_floats(HEAD);
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
            int column = j / 8 * 64 + lane % 4 * 16 + j % 8;
            found[column] = sums[j][2 * lower];
            found[column + 8] = sums[j][2 * lower + 1];
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
                    float *partials, u32 *arrived) {                                                                   \
        attend_few<ELEMENT == F16 ? HALF_F16 : HALF_BF16, HEAD>(                                                       \
            pages, table_offsets, table_pages, table_skipped, row_offsets, row_positions, tiles, q, q_stride, group,   \
            window, scale, softcap, sinks, y, y_stride, halves, halves_stride, half, partials, arrived);               \
    }

DEFINE_DECODE(JOIN(decode_64, ELEMENT), 64)
DEFINE_DECODE(JOIN(decode_128, ELEMENT), 128)

#undef DEFINE_DECODE
