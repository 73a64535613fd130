// Paged attention on tensor cores, for one element type of keys and values: for rows with many queries, such as
// prompts. What has few goes to attention.cu.
//
// A block takes a tile of queries of one KV head: heads of its group and neighbouring tokens. It walks through the
// keys that they see, KEYS at a time, with the next ones on their way. Scores stay in registers, where they become the
// left operand of the product with the values; sums are rescaled whenever a higher score is met.
//
// Of eight bits the codes are copied, and become what tensor cores take when it is their turn.
//
// What a query doesn't see it multiplies by 0, so that a NaN of its own sequence's later tokens reaches it. Those of
// other sequences never do: what nobody of the tile sees is read as 0.

#ifndef SETU_PREFILL
#define SETU_PREFILL
#include "attention.cuh"

// Queries of a block, 16 for each of its warps, and positions at a time.
constexpr int TILE_QUERIES = 64;
constexpr int PREFILL_THREADS = TILE_QUERIES / 16 * 32;
constexpr int KEYS = 64;

// Where piece `piece` of codes of row `row` lies in a tile with rows of HEAD of them: eight rows lie in different banks.
template <int HEAD> __device__ __forceinline__ int code_piece(int row, int piece) {
    return row * HEAD + (piece ^ (HEAD == 64 ? row / 2 & 3 : row & 7)) * 16;
}

// Where a row's keys and values are.
template <Format TYPE, int HEAD> struct Context {
    static constexpr bool scaled = TYPE == F8_E4M3;
    // Pieces of a row of a tile.
    static constexpr int pieces = HEAD / piece_elements(TYPE);

    Pages pages;
    const u32 *row_pages;
    int skipped, kv_head, seen_from, seen_to;
    Paging paging;

    __device__ __forceinline__ const u8 *page_of(int position) const {
        return pages.start + row_pages[paging.page(position) - skipped] * pages.page_bytes;
    }

    __device__ __forceinline__ bool sees(int position) const { return position >= seen_from && position <= seen_to; }

    // A position of which there is a page: what isn't seen is not copied, but its place is computed.
    __device__ __forceinline__ int nearest_seen(int position) const { return min(max(position, seen_from), seen_to); }

    // Starts to copy the keys and values of the positions from `begin` on. A thread has one position's keys, and one piece
    // of several positions' values, so that neighbours read neighbouring memory.
    __device__ __forceinline__ void fetch(int begin, u8 *keys, u8 *values) const {
        constexpr int k_step = PREFILL_THREADS / KEYS, v_step = PREFILL_THREADS / pieces;
        int k_pieces = pages.k_padded / piece_elements(TYPE), v_pieces = pages.v_dim / piece_elements(TYPE);
        int row = threadIdx.x % KEYS, piece = threadIdx.x / KEYS, at = nearest_seen(begin + row);
        bool seen = sees(begin + row);
        int apart = pages.page_tokens * 16;
        const u8 *from = page_of(at) + pages.k_at + (kv_head * k_pieces + piece) * apart + paging.place(at) * 16;
#pragma unroll
        for (int i = 0; i < pieces / k_step; i++) {
            bool exists = seen && piece + i * k_step < k_pieces;
            u8 *to = keys + place_of_piece(row, piece + i * k_step);
            copy_async(to, exists ? from + i * k_step * apart : pages.start, exists);
        }
        row = threadIdx.x / pieces, piece = threadIdx.x % pieces;
        u64 values_at = pages.v_at + (kv_head * pages.page_tokens * v_pieces + piece) * 16;
#pragma unroll
        for (int i = 0; i < KEYS / v_step; i++) {
            at = nearest_seen(begin + row + i * v_step);
            bool exists = sees(begin + row + i * v_step) && piece < v_pieces;
            const u8 *from = page_of(at) + values_at + paging.place(at) * v_pieces * 16;
            copy_async(values + place_of_piece(row + i * v_step, piece), exists ? from : pages.start, exists);
        }
    }

    static __device__ __forceinline__ int place_of_piece(int row, int piece) {
        return scaled ? code_piece<HEAD>(row, piece) : 2 * head_piece<HEAD>(row, piece);
    }

    // The scales of the position whose codes this thread is to decode: the key's, and the value's above it.
    __device__ __forceinline__ u32 fetch_scales(int begin) const {
        int position = begin + threadIdx.x % KEYS, at = nearest_seen(position);
        u16 scales = *reinterpret_cast<const u16 *>(page_of(at) + pages.scales_of(kv_head, paging.place(at)));
        return sees(position) ? scales : 0;
    }

    // Decodes a thread's part of a tile of codes: of one position every other piece.
    static __device__ __forceinline__ void decode(const u8 *codes, u32 scale, u16 *elements) {
        int row = threadIdx.x % KEYS;
        u32 scales = scale_twice(scale);
#pragma unroll
        for (int piece = threadIdx.x / KEYS; piece < pieces; piece += PREFILL_THREADS / KEYS) {
            uint4 four = *reinterpret_cast<const uint4 *>(codes + code_piece<HEAD>(row, piece));
            u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 low = words[2 * i], high = words[2 * i + 1];
                *reinterpret_cast<uint4 *>(elements + head_piece<HEAD>(row, 2 * piece + i)) =
                    uint4{elements_of(__byte_perm(low, 0, 0x1404), scales), elements_of(__byte_perm(low, 0, 0x3424), scales),
                          elements_of(__byte_perm(high, 0, 0x1404), scales),
                          elements_of(__byte_perm(high, 0, 0x3424), scales)};
            }
        }
    }
};

// As `attend` of attention.cu, with blocks in x for KV heads and in y for tiles; a page's tokens are a power of two, heads
// are at most HEAD columns wide, and those of values a multiple of eight, in eight bits of sixteen. `scale` is above 0.
template <Format TYPE, int HEAD>
__device__ __forceinline__ void attend_tile(Pages pages, const u32 *table_offsets, const u32 *table_pages,
                                            const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions,
                                            const u32 *tiles, const float *q, int q_stride, int group, int window,
                                            float scale, float softcap, const float *sinks, float *y, int y_stride,
                                            u16 *halves, int halves_stride, int half, const Turning &turning) {
    wait_for_launches_before();
    int row = tiles[2 * blockIdx.y], first_query = tiles[2 * blockIdx.y + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(TILE_QUERIES, tokens * group - first_query);
    int kv_head = blockIdx.x;
    int first_position = static_cast<int>(row_positions[row]);
    auto position_of = [&](int query) { return first_position + (first_query + query) / group; };
    constexpr Half HALF = half_kept(TYPE);
    constexpr bool scaled = TYPE == F8_E4M3;
    Context<TYPE, HEAD> context = {pages, table_pages + table_offsets[row], static_cast<int>(table_skipped[row]), kv_head,
                                   first_seen(position_of(0), window), position_of(queries - 1), Paging(pages.page_tokens)};

    // Room for queries; for elements of keys and values, twice where those are copied; and twice for codes.
    DYNAMIC_SHARED(u16, shared);
    constexpr int tile_elements = KEYS * HEAD, stages = scaled ? 1 : 2;
    u16 *query = shared, *keys = query + TILE_QUERIES * HEAD, *values = keys + stages * tile_elements;
    u8 *codes = reinterpret_cast<u8 *>(values + tile_elements);
    auto fetch = [&](int tile, int stage) {
        if constexpr (scaled) {
            u8 *to = codes + stage * 2 * tile_elements;
            context.fetch(tile * KEYS, to, to + tile_elements);
        } else {
            context.fetch(tile * KEYS, reinterpret_cast<u8 *>(keys + stage * tile_elements),
                          reinterpret_cast<u8 *>(values + stage * tile_elements));
        }
        commit_copies();
    };
    u32 scales = 0;
    int first_tile = context.seen_from / KEYS, last_tile = context.seen_to / KEYS;
    for (int i = threadIdx.x; i < TILE_QUERIES * HEAD / 8; i += blockDim.x) {
        int in_tile = i / (HEAD / 8), piece = i % (HEAD / 8), number = first_query + in_tile;
        size_t token = first_token + number / group;
        const float *head = q + token * q_stride + (kv_head * group + number % group) * pages.k_dim;
        *reinterpret_cast<uint4 *>(query + head_piece<HEAD>(in_tile, piece)) =
            query_piece<HALF>(turning, token, head, piece * 8, pages.k_dim, in_tile < queries);
    }

    int lane = lane_of_thread(), first_of_warp = 16 * warp_of_thread();
    // This lane's two queries: what they see, the highest score so far, and the sum of what it has of their terms.
    int from[2], to[2];
    float highest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int number = first_of_warp + lane / 4 + 8 * lower;
        to[lower] = number < queries ? position_of(number) : -1;
        from[lower] = first_seen(position_of(number), window);
    }
    float inverse_cap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    // What a score is multiplied with, so that its term is a power of 2.
    float unit = (softcap > 0.0f ? 1.0f : scale) * LOG2_E;
    // What all queries see: most tiles need no further look.
    int all_from = first_seen(position_of(queries - 1), window), all_to = position_of(0);
    float sums[HEAD / 8][4] = {};
    fetch(first_tile, 0);
    if constexpr (scaled) {
        scales = context.fetch_scales(first_tile * KEYS);
    }
    for (int tile = first_tile; tile <= last_tile; tile++) {
        int stage = (tile - first_tile) & 1;
        wait_for_copies<0>();
        // All have what they copied, and are done with the other stage.
        __syncthreads();
        if (tile < last_tile) {
            fetch(tile + 1, stage ^ 1);
        }
        if constexpr (scaled) {
            u32 now = scales;
            scales = tile < last_tile ? context.fetch_scales((tile + 1) * KEYS) : 0;
            const u8 *from = codes + stage * 2 * tile_elements;
            context.decode(from, now & 255, keys);
            context.decode(from + tile_elements, now >> 8, values);
            __syncthreads();
            stage = 0;
        }
        const u16 *stage_keys = keys + stage * tile_elements, *stage_values = values + stage * tile_elements;
        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int piece = 0; piece < HEAD / 8; piece += 2) {
            u32 a[4];
            load_matrices(a, query + head_piece<HEAD>(first_of_warp + lane % 16, piece + lane / 16));
#pragma unroll
            for (int j = 0; j < KEYS / 8; j += 2) {
                u32 b[4];
                int key = 8 * j + lane % 8 + lane / 16 * 8;
                load_matrices(b, stage_keys + head_piece<HEAD>(key, piece + lane / 8 % 2));
                multiply_add<HALF>(scores[j], a, b[0], b[1]);
                multiply_add<HALF>(scores[j + 1], a, b[2], b[3]);
            }
        }
        if (softcap > 0.0f) {
            cap_scores(scores, softcap, scale, inverse_cap);
        }
        if (tile * KEYS < all_from || tile * KEYS + KEYS - 1 > all_to) {
            hide_unseen(scores, tile * KEYS, from, to);
        }
        float above[2] = {highest[0], highest[1]};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                above[i / 2] = fmaxf(above[i / 2], scores[j][i]);
            }
        }
        float base[2];
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            above[lower] = fmaxf(above[lower], __shfl_xor_sync(ALL_LANES, above[lower], 1));
            above[lower] = fmaxf(above[lower], __shfl_xor_sync(ALL_LANES, above[lower], 2));
            // Nothing seen so far: all terms are 0, whatever they are measured from.
            base[lower] = above[lower] == -INFINITY_F ? 0.0f : above[lower] * unit;
            // Exactly 1 where nothing higher was met.
            float keeps = short_exp2(highest[lower] * unit - base[lower]);
            highest[lower] = above[lower];
            total[lower] *= keeps;
#pragma unroll
            for (int j = 0; j < HEAD / 8; j++) {
                sums[j][2 * lower] *= keeps;
                sums[j][2 * lower + 1] *= keeps;
            }
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[j][i] = short_exp2(fmaf(scores[j][i], unit, -base[i / 2]));
                total[i / 2] += scores[j][i];
            }
        }
#pragma unroll
        for (int depth = 0; depth < KEYS / 16; depth++) {
            const float *left = scores[2 * depth], *right = scores[2 * depth + 1];
            u32 a[4] = {halves_of<HALF>(left[0], left[1]), halves_of<HALF>(left[2], left[3]),
                        halves_of<HALF>(right[0], right[1]), halves_of<HALF>(right[2], right[3])};
#pragma unroll
            for (int j = 0; j < HEAD / 8; j += 2) {
                u32 b[4];
                load_transposed(b, stage_values + head_piece<HEAD>(16 * depth + lane % 16, j + lane / 16));
                multiply_add<HALF>(sums[j], a, b[0], b[1]);
                multiply_add<HALF>(sums[j + 1], a, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 1);
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 2);
        int in_tile = first_of_warp + lane / 4 + 8 * lower, number = first_query + in_tile;
        if (in_tile >= queries) {
            continue;
        }
        int head = kv_head * group + number % group;
        float by = share_of_term(highest[lower] * unit, total[lower], sinks, head);
        size_t token = first_token + number / group, of_head = static_cast<size_t>(head) * pages.v_dim;
        float *floats = y ? y + token * y_stride + of_head : nullptr;
        store_attended(sums, lower, by, pages.v_dim, floats, halves ? halves + token * halves_stride + of_head : nullptr, half);
    }
}
#endif

#define DEFINE_PREFILL(NAME, HEAD)                                                                                     \
    DENSE_KERNEL_OF(128, 2, NAME, Pages pages, const u32 *table_offsets, const u32 *table_pages,                       \
                    const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions, const u32 *tiles,      \
                    const float *q, int q_stride, int group, int window, float scale, float softcap,                   \
                    const float *sinks, float *y, int y_stride, u16 *halves, int halves_stride, int half,              \
                    Turning turning) {                                                                                 \
        attend_tile<ELEMENT, HEAD>(                                                                                    \
            pages, table_offsets, table_pages, table_skipped, row_offsets, row_positions, tiles, q, q_stride, group,   \
            window, scale, softcap, sinks, y, y_stride, halves, halves_stride, half, turning);                         \
    }

DEFINE_PREFILL(JOIN(attend_64, ELEMENT), 64)
DEFINE_PREFILL(JOIN(attend_128, ELEMENT), 128)

#undef DEFINE_PREFILL
