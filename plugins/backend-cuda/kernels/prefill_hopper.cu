// Paged attention for rows with many queries on Hopper's tensor cores: as that of prefill.cu, which see.
//
// The manner is FlashAttention-3's (Shah et al., 2024). One warpgroup copies keys and values, and two attend, 64 queries
// each. A warpgroup has the scores of the next keys computed before it sums up the values of the last ones, so that the
// softmax of one runs while tensor cores are busy with the other; and the two take turns at them.

#include "attention.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Warpgroups that attend, queries of one, positions at a time, and times that there is room for those.
constexpr int GROUPS = 2;
constexpr int GROUP_QUERIES = 64;
constexpr int KEYS = 128;
constexpr int STAGES = 2;
constexpr int HOPPER_THREADS = 128 * (GROUPS + 1);

// Barriers in hardware: 0 is __syncthreads'. Each warpgroup that attends has two.
constexpr int QUERIES_HERE = 1, TURN = 1 + GROUPS;

__device__ __forceinline__ void wait_at(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_at(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive(Barrier &barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier.state)) : "memory");
}

// Where a piece of a row lies in a tile of `rows` rows, which has 64 columns of all of them after another.
__device__ __forceinline__ int piece_at(int rows, int row, int piece) {
    return (piece / 8 * rows + row) * 128 + ((piece ^ row) & 7) * 16;
}

// Where the piece lies that is `by` behind one in a row of 128 bytes: as `piece_at`, with less to keep in registers.
__device__ __forceinline__ u8 *permuted(u8 *place, int by) {
    return reinterpret_cast<u8 *>(reinterpret_cast<u64>(place) ^ (by & 7) * 16);
}

// The barriers of a stage's keys, or of its values.
struct Handover {
    Barrier full[STAGES], empty[STAGES];

    __device__ __forceinline__ void init(int groups) {
        for (int stage = 0; stage < STAGES; stage++) {
            full[stage].init(128);
            // A thread of each warp.
            empty[stage].init(4 * groups);
        }
    }

    // A tile's copies of this thread are done.
    __device__ __forceinline__ void give(int tile) {
        show_to_tensor_cores();
        arrive(full[tile % STAGES]);
    }

    __device__ __forceinline__ void wait_until_given(int tile) { full[tile % STAGES].wait(tile / STAGES & 1); }

    // This warp is done with a tile.
    __device__ __forceinline__ void give_back(int tile) {
        if (lane_of_thread() == 0) {
            arrive(empty[tile % STAGES]);
        }
    }

    __device__ __forceinline__ void wait_until_given_back(int tile) {
        empty[tile % STAGES].wait((tile / STAGES & 1) ^ 1);
    }
};

// Where a row's keys and values are, for the warpgroup that copies them. A lane knows the page of one position.
template <int HEAD> struct Copier {
    Pages pages;
    const u32 *row_pages;
    int skipped, kv_head, seen_from, seen_to;
    Paging paging;

    // Its row of a tile.
    __device__ __forceinline__ int row() const { return threadIdx.x % 128; }

    __device__ __forceinline__ bool sees(int position) const { return position >= seen_from && position <= seen_to; }

    // What isn't seen is not copied, but its place is computed.
    __device__ __forceinline__ int nearest_seen(int position) const { return min(max(position, seen_from), seen_to); }

    __device__ __forceinline__ u32 page_of(int begin) const {
        return row_pages[paging.page(nearest_seen(begin + row())) - skipped];
    }

    __device__ __forceinline__ void copy_keys(int begin, u32 page, u8 *to) const {
        int pieces = pages.k_padded / 8, apart = pages.page_tokens * 16;
        int place = paging.place(nearest_seen(begin + row()));
        const u8 *from = pages.start + page * pages.page_bytes + pages.k_at + kv_head * pieces * apart + place * 16;
        bool seen = sees(begin + row());
        to += piece_at(KEYS, row(), 0);
#pragma unroll
        for (int piece = 0; piece < HEAD / 8; piece++) {
            copy_async(permuted(to, piece) + piece / 8 * KEYS * 128, from, seen && piece < pieces);
            from += apart;
        }
    }

    // The lanes of a warp take the pieces of a few of its rows at a time, so that neighbours read neighbouring memory.
    __device__ __forceinline__ void copy_values(int begin, u32 page, u8 *to) const {
        constexpr int pieces = HEAD / 8, rows = 32 / pieces;
        int piece = lane_of_thread() % pieces, first = row() / 32 * 32 + lane_of_thread() / pieces;
        bool exists = piece < pages.v_dim / 8;
        int place = kv_head * pages.page_tokens + paging.place(nearest_seen(begin + row()));
        u64 mine = page * pages.page_bytes + pages.v_at + static_cast<u64>(place) * pages.v_dim * 2;
        const u8 *pieces_of_pages = pages.start + piece * 16;
        to += piece_at(KEYS, first, piece);
#pragma unroll
        for (int i = 0; i < 32; i += rows) {
            u64 from = __shfl_sync(ALL_LANES, mine, (first + i) % 32);
            copy_async(permuted(to, i) + i * 128, pieces_of_pages + from, exists && sees(begin + first + i));
        }
    }

    // Copies the tiles from `first` on. One's values, or the next one's keys, are on their way while others are waited for.
    __device__ __forceinline__ void copy(int first, int count, u8 *keys, u8 *values, Handover &of_keys,
                                         Handover &of_values) const {
        constexpr int bytes = KEYS * HEAD * 2;
        u32 page = page_of(first * KEYS);
        for (int tile = 0; tile < count; tile++) {
            int begin = (first + tile) * KEYS, stage = tile % STAGES;
            u32 next_page = tile + 1 < count ? page_of(begin + KEYS) : 0;
            of_keys.wait_until_given_back(tile);
            copy_keys(begin, page, keys + stage * bytes);
            commit_copies();
            if (tile > 0) {
                wait_for_copies<1>();
                of_values.give(tile - 1);
            }
            of_values.wait_until_given_back(tile);
            copy_values(begin, page, values + stage * bytes);
            commit_copies();
            wait_for_copies<1>();
            of_keys.give(tile);
            page = next_page;
        }
        wait_for_copies<0>();
        of_values.give(count - 1);
    }
};

// As `attend` of attention.cu, with tiles of GROUPS × GROUP_QUERIES queries, and blocks in x for KV heads and in y for tiles;
// as for `attend_tile` of prefill.cu a page's tokens are a power of two, heads are at most HEAD columns wide, and those of
// values a multiple of eight. `scale` is above 0.
template <Half HALF, int HEAD>
__device__ __forceinline__ void attend_on_hopper(Pages pages, const u32 *table_offsets, const u32 *table_pages,
                                                 const u32 *table_skipped, const u32 *row_offsets,
                                                 const u32 *row_positions, const u32 *tiles, const float *q, int q_stride,
                                                 int group, int window, float scale, float softcap, const float *sinks,
                                                 float *y, int y_stride, u16 *halves, int halves_stride, int half,
                                                 const Turning &turning) {
    wait_for_launches_before();
    DYNAMIC_SHARED(u8, shared);
    __shared__ Handover of_keys, of_values;
    int row = tiles[2 * blockIdx.y], first_query = tiles[2 * blockIdx.y + 1];
    int first_token = row_offsets[row], tokens = row_offsets[row + 1] - first_token;
    int queries = min(GROUPS * GROUP_QUERIES, tokens * group - first_query);
    int kv_head = blockIdx.x, first_position = static_cast<int>(row_positions[row]);
    auto position_of = [&](int query) { return first_position + (first_query + query) / group; };
    int seen_from = first_seen(position_of(0), window), seen_to = position_of(queries - 1);
    int first_tile = seen_from / KEYS, count = seen_to / KEYS - first_tile + 1;

    // Tiles begin at multiples of 1024 bytes.
    constexpr int query_bytes = GROUP_QUERIES * HEAD * 2, bytes = KEYS * HEAD * 2;
    u8 *query = shared + (-shared_address(shared) & 1023), *keys = query + GROUPS * query_bytes;
    u8 *values = keys + STAGES * bytes;
    // Those that have queries.
    int groups = (queries + GROUP_QUERIES - 1) / GROUP_QUERIES;
    if (threadIdx.x == 0) {
        of_keys.init(groups);
        of_values.init(groups);
        Barrier::show();
    }
    __syncthreads();
    int number = threadIdx.x / 128;
    if (number == GROUPS) {
        take_fewer_registers<COPYING_REGISTERS>();
        const u32 *row_pages = table_pages + table_offsets[row];
        int skipped = static_cast<int>(table_skipped[row]);
        Copier<HEAD> copier = {pages, row_pages, skipped, kv_head, seen_from, seen_to, Paging(pages.page_tokens)};
        copier.copy(first_tile, count, keys, values, of_keys, of_values);
        return;
    }
    if (number >= groups) {
        return;
    }
    take_more_registers<MULTIPLYING_REGISTERS>();
    int thread = threadIdx.x % 128, lane = lane_of_thread(), first_of_group = number * GROUP_QUERIES;
    query += number * query_bytes;
#pragma unroll
    for (int i = 0; i < GROUP_QUERIES * HEAD / 8; i += 128) {
        int in_group = (i + thread) / (HEAD / 8), piece = (i + thread) % (HEAD / 8);
        int in_tile = first_of_group + in_group, in_row = first_query + in_tile;
        size_t token = first_token + in_row / group;
        const float *head = q + token * q_stride + (kv_head * group + in_row % group) * pages.k_dim;
        *reinterpret_cast<uint4 *>(query + piece_at(GROUP_QUERIES, in_group, piece)) =
            query_piece<HALF>(turning, token, head, piece * 8, pages.k_dim, in_tile < queries);
    }
    show_to_tensor_cores();
    wait_at(QUERIES_HERE + number, 128);

    // This lane's two queries: what they see, the highest score so far, and the sum of what it has of their terms.
    int first_of_lane = first_of_group + thread / 32 * 16 + lane / 4;
    int from[2], to[2];
    float highest[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f}, keeps[2];
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        int in_tile = first_of_lane + 8 * lower;
        to[lower] = in_tile < queries ? position_of(in_tile) : -1;
        from[lower] = first_seen(position_of(in_tile), window);
    }
    float inverse_cap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
    // What a score is multiplied with, so that its term is a power of 2.
    float unit = (softcap > 0.0f ? 1.0f : scale) * LOG2_E;
    // What all queries of the warpgroup see: most tiles need no further look.
    int last_of_group = min(first_of_group + GROUP_QUERIES, queries) - 1;
    int all_from = first_seen(position_of(last_of_group), window), all_to = position_of(first_of_group);
    float sums[HEAD / 8][4] = {}, scores[KEYS / 8][4] = {};
    u32 terms[KEYS / 16][4];

    auto multiply_keys = [&](int tile) {
        u64 left = matrix_descriptor(query), right = matrix_descriptor(keys + tile % STAGES * bytes);
        begin_products();
#pragma unroll
        for (int depth = 0; depth < HEAD / 16; depth++) {
            multiply_tiles<HALF>(scores, left + depth / 4 * next_rows(GROUP_QUERIES) + depth % 4 * NEXT_COLUMNS,
                                 right + depth / 4 * next_rows(KEYS) + depth % 4 * NEXT_COLUMNS, depth > 0);
        }
        commit_products();
    };
    auto multiply_values = [&](int tile) {
        u64 right = transposed_descriptor(values + tile % STAGES * bytes, KEYS * 128);
        begin_products();
#pragma unroll
        for (int depth = 0; depth < KEYS / 16; depth++) {
            multiply_transposed<HALF, HEAD>(sums, terms[depth], right + depth * next_rows(16));
        }
        commit_products();
    };
    // Makes terms of scores, as floats, measured from the highest score so far; `keeps` is what earlier ones come to.
    auto weigh = [&](int tile) {
        int begin = (first_tile + tile) * KEYS;
        if (softcap > 0.0f) {
            cap_scores(scores, softcap, scale, inverse_cap);
        }
        if (begin < all_from || begin + KEYS - 1 > all_to) {
            hide_unseen(scores, begin, from, to);
        }
        // Two chains for each query.
        float above[4] = {highest[0], highest[0], highest[1], highest[1]}, base[2], part[4] = {};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                above[i] = fmaxf(above[i], scores[j][i]);
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            float most = fmaxf(above[2 * lower], above[2 * lower + 1]);
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            // Nothing seen so far: all terms are 0, whatever they are measured from.
            base[lower] = most == -INFINITY_F ? 0.0f : most * unit;
            // Exactly 1 where nothing higher was met.
            keeps[lower] = short_exp2(highest[lower] * unit - base[lower]);
            highest[lower] = most;
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[j][i] = short_exp2(fmaf(scores[j][i], unit, -base[i / 2]));
                part[i] += scores[j][i];
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            total[lower] = fmaf(total[lower], keeps[lower], part[2 * lower] + part[2 * lower + 1]);
        }
    };
    auto pack_terms = [&] {
#pragma unroll
        for (int depth = 0; depth < KEYS / 16; depth++) {
            const float *left = scores[2 * depth], *right = scores[2 * depth + 1];
            terms[depth][0] = halves_of<HALF>(left[0], left[1]), terms[depth][1] = halves_of<HALF>(left[2], left[3]);
            terms[depth][2] = halves_of<HALF>(right[0], right[1]), terms[depth][3] = halves_of<HALF>(right[2], right[3]);
        }
        hold(terms);
    };

    of_keys.wait_until_given(0);
    hold(scores);
    multiply_keys(0);
    wait_for_products<0>();
    hold(scores);
    of_keys.give_back(0);
    weigh(0);
    pack_terms();
    bool in_turn = groups == GROUPS;
    if (in_turn && number == 0 && count > 1) {
        arrive_at(TURN, 128 * GROUPS);
    }
    for (int tile = 1; tile < count; tile++) {
        of_values.wait_until_given(tile - 1);
        of_keys.wait_until_given(tile);
        if (in_turn) {
            wait_at(TURN + number, 128 * GROUPS);
        }
        hold(scores);
        hold(sums);
        multiply_keys(tile);
        multiply_values(tile - 1);
        // The other's next turn; after the last one there is none.
        if (in_turn && (number == 0 || tile + 1 < count)) {
            arrive_at(TURN + (number ^ 1), 128 * GROUPS);
        }
        wait_for_products<1>();
        hold(scores);
        of_keys.give_back(tile);
        weigh(tile);
        wait_for_products<0>();
        hold(sums);
        hold(terms);
        of_values.give_back(tile - 1);
#pragma unroll
        for (int j = 0; j < HEAD / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[j][i] *= keeps[i / 2];
            }
        }
        pack_terms();
    }
    of_values.wait_until_given(count - 1);
    hold(sums);
    multiply_values(count - 1);
    wait_for_products<0>();
    hold(sums);

#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 1);
        total[lower] += __shfl_xor_sync(ALL_LANES, total[lower], 2);
        int in_tile = first_of_lane + 8 * lower, in_row = first_query + in_tile;
        if (in_tile >= queries) {
            continue;
        }
        int head = kv_head * group + in_row % group;
        float by = share_of_term(highest[lower] * unit, total[lower], sinks, head);
        size_t token = first_token + in_row / group, of_head = static_cast<size_t>(head) * pages.v_dim;
        float *floats = y ? y + token * y_stride + of_head : nullptr;
        store_attended(sums, lower, by, pages.v_dim, floats, halves ? halves + token * halves_stride + of_head : nullptr, half);
    }
}

#define DEFINE_PREFILL(NAME, HEAD)                                                                                     \
    DENSE_KERNEL_OF(HOPPER_THREADS, 1, NAME, Pages pages, const u32 *table_offsets, const u32 *table_pages,            \
                    const u32 *table_skipped, const u32 *row_offsets, const u32 *row_positions, const u32 *tiles,      \
                    const float *q, int q_stride, int group, int window, float scale, float softcap,                   \
                    const float *sinks, float *y, int y_stride, u16 *halves, int halves_stride, int half,              \
                    Turning turning) {                                                                                 \
        attend_on_hopper<ELEMENT == F16 ? HALF_F16 : HALF_BF16, HEAD>(                                                 \
            pages, table_offsets, table_pages, table_skipped, row_offsets, row_positions, tiles, q, q_stride, group,   \
            window, scale, softcap, sinks, y, y_stride, halves, halves_stride, half, turning);                         \
    }

DEFINE_PREFILL(JOIN(attend_64, ELEMENT), 64)
DEFINE_PREFILL(JOIN(attend_128, ELEMENT), 128)

#undef DEFINE_PREFILL
