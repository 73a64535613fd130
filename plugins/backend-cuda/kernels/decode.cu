// Paged attention on tensor cores for rows with few queries, such as those that decode, for one element type of keys
// and values: bound by how fast those come. Prompts go to prefill.cu.
//
// A block takes a tile of queries of one KV head, and a share of the positions that they see. Its warps take turns, STEP
// positions at a time, each with room of its own in shared memory for the next ones: what is on its way at a time decides
// how fast it comes, and warps that wait for nobody keep it on its way.
//
// Each warp has a softmax of its own. They are merged in the block, and by the block of the tile that is done last for
// all shares, in one order both times. That a context is shared out over blocks is from Flash-Decoding (Dao et al., 2023).

#ifndef SETU_DECODE
#define SETU_DECODE
#include "attention.cuh"
#include "formats.cuh"

// Queries of a tile, warps of a block, positions that a warp takes at a time, and times that it has room for those.
constexpr int DECODE_QUERIES = 16;
constexpr int DECODE_WARPS = 4;
constexpr int STEP = 16;
constexpr int DECODE_STAGES = 2;

// Where a row's keys and values are. Pages hold whole steps.
struct Cells {
    Pages pages;
    const u32 *row_pages;
    int skipped, seen_from, seen_to;
    Paging paging;
    // In a page, where this KV head's keys and values begin.
    u64 keys_at, values_at;

    __device__ __forceinline__ bool sees(int position) const { return position >= seen_from && position <= seen_to; }

    // The page of the step at `begin`, or of the nearest of which something is seen.
    __device__ __forceinline__ const u8 *page_of(int begin) const {
        int page = paging.page(min(max(begin, seen_from), seen_to)) - skipped;
        return pages.start + row_pages[page] * pages.page_bytes;
    }

    // Starts to copy the keys of a step. Neighbours read neighbouring memory.
    template <int HEAD> __device__ __forceinline__ void copy_keys(const u8 *page, int begin, u16 *to) const {
        int row = lane_of_thread() % STEP, first = lane_of_thread() / STEP, left = pages.k_padded / 8 - first;
        const u8 *from = page + keys_at + (first * pages.page_tokens + paging.place(begin) + row) * 16;
        int at = head_piece<HEAD>(row, first);
        bool seen = sees(begin + row);
#pragma unroll
        for (int piece = 0; piece < HEAD / 8; piece += 32 / STEP) {
            // Pieces behind the first are where `head_piece` has them.
            copy_async(to + (at ^ piece * 8), from, seen && piece < left);
            from += 32 / STEP * pages.page_tokens * 16;
        }
    }

    // The same of its values.
    template <int HEAD> __device__ __forceinline__ void copy_values(const u8 *page, int begin, u16 *to) const {
        constexpr int at_once = 32 / (HEAD / 8);
        int first = lane_of_thread() / (HEAD / 8), piece = lane_of_thread() % (HEAD / 8);
        const u8 *from = page + values_at + ((paging.place(begin) + first) * pages.v_dim + piece * 8) * 2;
        int at = head_piece<HEAD>(first, piece);
        bool exists = piece * 8 < pages.v_dim;
#pragma unroll
        for (int row = 0; row < STEP; row += at_once) {
            copy_async(to + (at ^ row % 8 * 8) + row * HEAD, from, exists && sees(begin + first + row));
            from += at_once * pages.v_dim * 2;
        }
    }
};

// Of steps that several blocks share, where the share of block `index` of `count` begins.
__device__ __forceinline__ int share_begin(int steps, int index, int count) {
    return static_cast<int>(static_cast<u32>(steps) * static_cast<u32>(index) / static_cast<u32>(count));
}

// Two columns of a query as halves, 0 where none is left of the head's.
template <Half HALF> __device__ __forceinline__ u32 query_pair(const float *head, int dim, int dims, bool exists) {
    float2 pair = {0.0f, 0.0f};
    if (exists && dim < dims) {
        pair = *reinterpret_cast<const float2 *>(head + dim);
    }
    return halves_of<HALF>(pair.x, pair.y);
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

// As `arrives_last`, with one fence for all that the block has written.
__device__ __forceinline__ bool ends_tile(u32 *arrived, u32 count) {
    __shared__ u32 before;
    __syncthreads();
    if (threadIdx.x == 0) {
#if defined(__CUDA_ARCH__)
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
#else
        before = atomicAdd(arrived, 1u);
#endif
    }
    __syncthreads();
    if (before + 1 == count && threadIdx.x == 0) {
        // For the next launch.
        *arrived = 0;
    }
    return before + 1 == count;
}

// As `attend` of attention.cu, in tiles of DECODE_QUERIES. Blocks in z are shares; with more than one, `partials` has room
// for DECODE_QUERIES × (v_dim + 4) floats for each block, and `arrived` has a counter for each tile and KV head, all 0
// between launches. A page's tokens are a power of two, and whole steps. Heads are at most HEAD columns wide, an even number
// of them, and those of values a multiple of eight. `scale` is above 0.
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
    int kv_head = blockIdx.y;
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
    // A row may see less than there are blocks for.
    int shares = max(min(static_cast<int>(gridDim.z), steps / DECODE_WARPS), 1);
    if (static_cast<int>(blockIdx.z) >= shares) {
        return;
    }
    int lane = lane_of_thread(), warp = warp_of_thread();
    int step = first_step + share_begin(steps, blockIdx.z, shares) + warp;
    int end = first_step + share_begin(steps, blockIdx.z + 1, shares);

    // `[DECODE_WARPS][DECODE_STAGES]`, keys and behind them values.
    DYNAMIC_SHARED(u16, shared);
    constexpr int tile = STEP * HEAD, of_warp = DECODE_STAGES * 2 * tile;
    u16 *keys = shared + warp * of_warp, *values = keys + tile;
#pragma unroll
    for (int stage = 0; stage < DECODE_STAGES; stage++) {
        int begin = (step + stage * DECODE_WARPS) * STEP;
        bool exists = step + stage * DECODE_WARPS < end;
        const u8 *page = cells.page_of(begin);
        if (exists) {
            cells.copy_keys<HEAD>(page, begin, keys + stage * 2 * tile);
        }
        commit_copies();
        if (exists) {
            cells.copy_values<HEAD>(page, begin, values + stage * 2 * tile);
        }
        commit_copies();
    }
    // This lane's two queries: their columns in the order of `multiply_add`, and what they see.
    u32 query[HEAD / 16][4];
    int from[2], to[2], place = lane % 4 * 2;
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int in_tile = lane / 4 + 8 * lower, number = first_query + in_tile;
        to[lower] = in_tile < queries ? position_of(in_tile) : -1;
        from[lower] = first_seen(position_of(in_tile), window);
        const float *head = q + (first_token + number / group) * static_cast<size_t>(q_stride) +
                            (kv_head * group + number % group) * pages.k_dim;
#pragma unroll
        for (int t = 0; t < HEAD / 8; t++) {
            query[t / 2][t % 2 * 2 + lower] = query_pair<HALF>(head, 8 * t + place, pages.k_dim, in_tile < queries);
        }
    }
    float inverse_cap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    // What a score is multiplied with, so that its term is a power of 2.
    float unit = (softcap > 0.0f ? 1.0f : scale) * LOG2_E;
    // What all queries see: most steps need no further look.
    int all_from = first_seen(position_of(queries - 1), window), all_to = position_of(0);
    // Where this lane's rows of keys and of values begin, for `load_matrices`; pieces behind are where `head_piece` has
    // them.
    int key_row = head_piece<HEAD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    int value_row = head_piece<HEAD>(lane % 16, lane / 16);
    float highest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f};
    float sums[HEAD / 8][4] = {};
    for (int stage = 0; step < end; step += DECODE_WARPS, stage = (stage + 1) % DECODE_STAGES) {
        int next = step + DECODE_STAGES * DECODE_WARPS, begin = step * STEP;
        const u8 *next_page = cells.page_of(next * STEP);
        u16 *stage_keys = keys + stage * 2 * tile, *stage_values = values + stage * 2 * tile;
        // Keys, then values of each stage: all but those of this one may still be on their way.
        wait_for_copies<2 * DECODE_STAGES - 1>();
        __syncwarp();
        float scores[2][4] = {};
#pragma unroll
        for (int piece = 0; piece < HEAD / 8; piece += 2) {
            u32 b[4];
            load_matrices(b, stage_keys + (key_row ^ piece * 8));
            multiply_add<HALF>(scores[0], query[piece / 2], b[0], b[1]);
            multiply_add<HALF>(scores[1], query[piece / 2], b[2], b[3]);
        }
        __syncwarp();
        if (next < end) {
            cells.copy_keys<HEAD>(next_page, next * STEP, stage_keys);
        }
        commit_copies();
        if (softcap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    scores[i][j] = softcap * short_tanh(scores[i][j] * scale * inverse_cap);
                }
            }
        }
        if (begin < all_from || begin + STEP - 1 > all_to) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int position = begin + 8 * i + place + j % 2;
                    bool seen = position >= from[j / 2] && position <= to[j / 2];
                    scores[i][j] = seen ? scores[i][j] : -INFINITY_F;
                }
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            float first = fmaxf(scores[0][2 * lower], scores[0][2 * lower + 1]);
            float second = fmaxf(scores[1][2 * lower], scores[1][2 * lower + 1]);
            float above = fmaxf(highest[lower], fmaxf(first, second));
            above = fmaxf(above, __shfl_xor_sync(ALL_LANES, above, 1));
            above = fmaxf(above, __shfl_xor_sync(ALL_LANES, above, 2));
            // Nothing seen so far: all terms are 0, whatever they are measured from.
            float base = above == -INFINITY_F ? 0.0f : above * unit;
            float keeps = short_exp2(fmaf(highest[lower], unit, -base));
            highest[lower] = above;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &score = scores[i / 2][2 * lower + i % 2];
                score = short_exp2(fmaf(score, unit, -base));
            }
            total[lower] = fmaf(total[lower], keeps,
                                scores[0][2 * lower] + scores[0][2 * lower + 1] +
                                    (scores[1][2 * lower] + scores[1][2 * lower + 1]));
#pragma unroll
            for (int j = 0; j < HEAD / 8; j++) {
                sums[j][2 * lower] *= keeps;
                sums[j][2 * lower + 1] *= keeps;
            }
        }
        u32 terms[4] = {halves_of<HALF>(scores[0][0], scores[0][1]), halves_of<HALF>(scores[0][2], scores[0][3]),
                        halves_of<HALF>(scores[1][0], scores[1][1]), halves_of<HALF>(scores[1][2], scores[1][3])};
        wait_for_copies<2 * DECODE_STAGES - 1>();
        __syncwarp();
#pragma unroll
        for (int j = 0; j < HEAD / 8; j += 2) {
            u32 b[4];
            load_transposed(b, stage_values + (value_row ^ j * 8));
            multiply_add<HALF>(sums[j], terms, b[0], b[1]);
            multiply_add<HALF>(sums[j + 1], terms, b[2], b[3]);
        }
        __syncwarp();
        if (next < end) {
            cells.copy_values<HEAD>(next_page, next * STEP, stage_values);
        }
        commit_copies();
    }

    // In the same places `[DECODE_QUERIES][of_query]` for each warp, in rows that lie in different banks.
    constexpr int of_query = HEAD + 8;
    static_assert(DECODE_QUERIES * of_query * 4 <= of_warp * 2, "what a warp has found fits into its stages");
    float *found_by = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 1);
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 2);
        float *found = found_by + warp * of_warp / 2 + (lane / 4 + 8 * lower) * of_query;
        if (lane % 4 == 0) {
            *reinterpret_cast<float2 *>(found + HEAD) = float2{highest[lower] * unit, total[lower]};
        }
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
            *reinterpret_cast<float2 *>(found + 8 * j + place) = float2{sums[j][2 * lower], sums[j][2 * lower + 1]};
        }
    }
    __syncthreads();

    // A thread merges four columns of a query.
    int fours = pages.v_dim / 4, floats = found_floats(pages.v_dim);
    size_t number_of_tile = blockIdx.x * gridDim.y + kv_head;
    float *of_tile = partials + number_of_tile * gridDim.z * DECODE_QUERIES * floats;
    auto merge_warps = [&](int query, int column) {
        Merged merged = nothing_merged();
#pragma unroll
        for (int other = 0; other < DECODE_WARPS; other++) {
            merged.add(found_by + other * of_warp / 2 + query * of_query, HEAD, column, false);
        }
        return merged;
    };
    if (shares > 1) {
        for (int i = threadIdx.x; i < queries * fours; i += blockDim.x) {
            int in_tile = i / fours, column = i % fours * 4;
            merge_warps(in_tile, column)
                .leave(of_tile + (blockIdx.z * DECODE_QUERIES + in_tile) * floats, pages.v_dim, column);
        }
        if (!ends_tile(arrived + number_of_tile, shares)) {
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
    DENSE_KERNEL_OF(128, 3, NAME, Pages pages, const u32 *table_offsets, const u32 *table_pages,                       \
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
