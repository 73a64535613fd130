// Products of a few rows with quantized weights on tensor cores: bound by how fast weights come.
//
// Codes are whole numbers that BF16 holds exactly, so weights are multiplied without their scales: those are applied to the
// sums over a group of columns that shares one. Where elements have a minimum, that goes by the sum of the group's x, and so
// codes are multiplied as 128 + code, which takes less to make: the sum of x has what is too much as well.
//
// A block computes 128 rows of weights, 32 for each warp, for TOKENS tokens. Stages of 256 columns pass through shared memory, as
// the checkpoint stores them, while the ones before are multiplied. A lane decodes the scales of one row for all. Of a
// product's sixteen columns a lane takes four neighbouring ones: which is which in a product is free where both operands
// agree, and so x needs no other order than it has.
#pragma once

#include "formats.cuh"
#include "tile.cuh"
#include "work.cuh"

// Products of 16 rows of weights that a warp computes at a time. With two matrices it is one of each.
constexpr int TILES = 2;
constexpr int ROWS = 16 * TILES;
static_assert(ROWS == 32, "each lane has a row whose scales it decodes");

// Whether this is for GPUs after Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool IS_LATER = true;
#else
constexpr bool IS_LATER = false;
#endif

// How a step's columns lie in memory: in units, each with the columns of a few products.
template <Format TYPE> struct Step {
    static constexpr bool in_blocks = block_elements(TYPE) == 32;
    // A lane takes eight neighbouring columns of 32, or else four of either sixteen.
    static constexpr bool wide = TYPE == Q8_0 || TYPE == Q4_K || TYPE == Q5_K;
    // Columns that share a scale.
    static constexpr int group = TYPE == Q2_K || TYPE == Q3_K || TYPE == Q6_K ? 16 : 32;
    static constexpr int columns = TYPE == Q8_0 || TYPE == Q5_0 ? 64 : in_blocks || TYPE == Q6_K ? 128 : 256;
    static constexpr int units = in_blocks ? columns / 32 : TYPE == Q4_K || TYPE == Q5_K ? 4 : 2;
    // Times 32 columns in a unit.
    static constexpr int members = columns / 32 / units;

    // The first column of member `member` of a unit.
    static __device__ __forceinline__ constexpr int column_of(int unit, int member) {
        return TYPE == Q6_K ? 32 * unit + 64 * member : 32 * (members * unit + member);
    }

    // The first byte of a unit, from the block on that a step at column `at` begins in.
    static __device__ __forceinline__ int byte_of_unit(int at, int unit) {
        return in_blocks ? unit * block_bytes(TYPE) : 32 * unit + (TYPE == Q6_K ? at % 256 / 128 * 64 : 0);
    }
};

__device__ __forceinline__ u32 word_at(const u8 *bytes) { return *reinterpret_cast<const u32 *>(bytes); }

// Two bytes a word, of which `joined` makes one: so are words loaded where blocks begin at any even address.
template <int COUNT> __device__ __forceinline__ void load_halves(u32 *to, const u8 *bytes) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        to[i] = half_at(bytes + 2 * i);
    }
}

__device__ __forceinline__ u32 joined(const u32 *halves) { return __byte_perm(halves[0], halves[1], 0x5410); }

// The scales of a row in a step.
template <Format TYPE> struct Scales {
    static constexpr int count = Step<TYPE>::in_blocks            ? Step<TYPE>::units
                                 : TYPE == Q3_K                   ? 7
                                 : TYPE == Q4_K || TYPE == Q5_K ? 4
                                                                  : 5;
    // For each row of a group a scale, and a minimum over -128.
    static constexpr int floats = has_minimum(TYPE) ? 2 : 1;

    u32 words[count];

    __device__ __forceinline__ void fetch(const u8 *block, int at) {
        if constexpr (Step<TYPE>::in_blocks) {
#pragma unroll
            for (int i = 0; i < count; i++) {
                const u8 *from = block + i * block_bytes(TYPE);
                words[i] = has_minimum(TYPE) ? word_at(from) : half_at(from);
            }
        } else if constexpr (TYPE == Q2_K) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                words[i] = word_at(block + 4 * i);
            }
            words[4] = word_at(block + 80);
        } else if constexpr (TYPE == Q3_K) {
            load_halves<7>(words, block + 96);
        } else if constexpr (TYPE == Q6_K) {
            load_halves<4>(words, block + 192 + at % 256 / 128 * 8);
            words[4] = half_at(block + 208);
        } else {
            uint4 all = *reinterpret_cast<const uint4 *>(block);
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        }
    }

    // Byte `index` of a word, as a half's bits.
    static __device__ __forceinline__ float small_half(u32 word, int index) {
        u32 both = __byte_perm(word, 0, index < 2 ? 0x4140 : 0x4342);
        return float_of_f16(static_cast<u16>(both >> index % 2 * 16));
    }

    // Leaves those of COUNT groups from `first` on in `to`, which is this row's place in the first of them.
    template <int COUNT> __device__ __forceinline__ void decode(float *to, int first) const {
        if constexpr (Step<TYPE>::in_blocks) {
#pragma unroll
            for (int i = 0; i < count; i++) {
                float minimum = float_of_f16(static_cast<u16>(words[i] >> 16)) * (-1.0f / 128.0f);
                store(to, i, float_of_f16(static_cast<u16>(words[i])), minimum);
            }
        } else {
            u32 both = words[TYPE == Q4_K || TYPE == Q5_K ? 0 : count - 1];
            // Whole numbers below 2¹⁰ are halves in units of 2⁻²⁴. Minima are subtracted.
            constexpr float unit = 1.0f / 16777216.0f;
            float scale = float_of_f16(static_cast<u16>(both)) / unit;
            float minimum = float_of_f16(static_cast<u16>(both >> 16)) / (128.0f * unit);
            u32 scales[4], minima[4] = {};
            if constexpr (TYPE == Q2_K) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    scales[i] = words[i] & 0x0f0f0f0f, minima[i] = words[i] >> 4 & 0x0f0f0f0f;
                }
            } else if constexpr (TYPE == Q3_K) {
                u32 first = joined(words), second = joined(words + 2), top = joined(words + 4);
                scales[0] = (first & 0x0f0f0f0f) | (top << 4 & 0x30303030);
                scales[1] = (second & 0x0f0f0f0f) | (top << 2 & 0x30303030);
                scales[2] = (first >> 4 & 0x0f0f0f0f) | (top & 0x30303030);
                scales[3] = (second >> 4 & 0x0f0f0f0f) | (top >> 2 & 0x30303030);
            } else if constexpr (TYPE == Q6_K) {
                scales[0] = joined(words) ^ 0x80808080, scales[1] = joined(words + 2) ^ 0x80808080;
            } else {
                scales[0] = six_bits(words[1], 0, false), scales[1] = six_bits(words[1], words[3], true);
                minima[0] = six_bits(words[2], 0, false), minima[1] = six_bits(words[2], words[3] >> 4, true);
            }
            // A product with a scale is exact, whatever is subtracted.
            constexpr float zero = (TYPE == Q3_K ? 32.0f : TYPE == Q6_K ? 128.0f : 0.0f) * unit;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                int group = first + i;
                float number = small_half(scales[group / 4], group % 4);
                float product = zero == 0.0f ? scale * number : fmaf(scale, number, scale * -zero);
                store(to, i, product, minimum * small_half(minima[group / 4], group % 4));
            }
        }
    }

    // The minimum is that over -128.
    static __device__ __forceinline__ void store(float *to, int group, float scale, float minimum) {
        float *place = to + group * ROWS * floats;
        if constexpr (has_minimum(TYPE)) {
            *reinterpret_cast<float2 *>(place) = {scale, minimum};
        } else {
            *place = scale;
        }
    }
};

// A lane's codes of a row in a step.
template <Format TYPE> struct Codes {
    static constexpr bool from_halves = TYPE == Q4_0 || TYPE == Q5_0 || TYPE == Q8_0 || TYPE == Q3_K || TYPE == Q6_K;
    // Of four bytes, and whether those have the codes of both sixteens.
    static constexpr int words = from_halves ? 2 : 1;
    static constexpr bool paired = TYPE == Q4_0 || TYPE == Q5_0 || TYPE == Q4_1 || TYPE == Q5_1;
    static constexpr int low_words = paired ? words : 2 * words;
    static constexpr int high_words = TYPE == Q5_0 ? 2 : TYPE == Q5_1 ? 1 : 0;

    // A unit's, and those that all share.
    u32 low[low_words], high[high_words + 1], shared[2];

    __device__ __forceinline__ void fetch_shared(const u8 *block, int at, int place) {
        if constexpr (TYPE == Q5_K) {
            uint2 both = *reinterpret_cast<const uint2 *>(block + 16 + 8 * place);
            shared[0] = both.x, shared[1] = both.y;
        } else if constexpr (TYPE == Q3_K || TYPE == Q6_K) {
            const u8 *from = block + (TYPE == Q6_K ? 128 + at % 256 / 128 * 32 : 0) + 4 * place;
            u32 halves[4];
            load_halves<2>(halves, from);
            load_halves<2>(halves + 2, from + 16);
            shared[0] = joined(halves), shared[1] = joined(halves + 2);
        }
    }

    __device__ __forceinline__ void fetch(const u8 *block, int at, int unit, int place) {
        const u8 *from = block + Step<TYPE>::byte_of_unit(at, unit);
        if constexpr (TYPE == Q4_0 || TYPE == Q5_0) {
            load_halves<2>(low, from + (TYPE == Q4_0 ? 2 : 6) + 4 * place);
            load_halves<high_words>(high, from + 2);
        } else if constexpr (TYPE == Q4_1 || TYPE == Q5_1) {
            low[0] = word_at(from + (TYPE == Q4_1 ? 4 : 8) + 4 * place);
            if constexpr (TYPE == Q5_1) {
                high[0] = word_at(from + 4);
            }
        } else if constexpr (TYPE == Q8_0) {
            load_halves<4>(low, from + 2 + 8 * place);
        } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
            uint2 both = *reinterpret_cast<const uint2 *>(from + (TYPE == Q4_K ? 16 : 48) + 8 * place);
            low[0] = both.x, low[1] = both.y;
        } else if constexpr (TYPE == Q2_K) {
            low[0] = word_at(from + 16 + 4 * place), low[1] = word_at(from + 32 + 4 * place);
        } else {
            from += (TYPE == Q3_K ? 32 : 0) + 4 * place;
            load_halves<2>(low, from);
            load_halves<2>(low + 2, from + 16);
        }
    }

    // The bytes that have four of them, and their high bits as `codes_of` takes them.
    __device__ __forceinline__ u32 low_of(int piece) const {
        const u32 *from = low + (paired ? 0 : words * piece);
        return from_halves ? joined(from) : *from;
    }

    __device__ __forceinline__ u32 high_of(int piece, int place) const {
        if constexpr (TYPE == Q5_0) {
            return high[piece] >> 4 * place;
        } else if constexpr (TYPE == Q5_1) {
            return high[0] >> (16 * piece + 4 * place);
        } else {
            return shared[piece];
        }
    }
};

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
// a × b + c of two BF16 numbers in a word each.
__device__ __forceinline__ u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
#else
static inline u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int half = 0; half < 2; half++) {
        auto number = [&](u32 word) { return float_of_bf16(static_cast<u16>(word >> 16 * half)); };
        result |= static_cast<u32>(bf16_of_float(fmaf(number(a), number(b), number(c)))) << 16 * half;
    }
    return result;
}
#endif

// Four codes as BF16: less what is subtracted from them, or plus 128 where elements have a minimum.
template <Format TYPE> __device__ __forceinline__ void halves_of_codes(u32 low, u32 high, int in_block, u32 &first, u32 &second) {
    // A byte b below 128 behind 0x43 is the number 128 + b.
    constexpr u32 above = 0x43434343;
    constexpr u32 one = 0x3f803f80, minus_one = 0xbf80bf80;
    if constexpr (TYPE == Q8_0) {
        // 128 + the lower seven bits, less 128 or 256.
        u32 bits = low & 0x7f7f7f7f, sign = low & 0x80808080;
        first = multiply_add_pairs(__byte_perm(sign, above, 0x4140), minus_one, __byte_perm(bits, above, 0x4140));
        second = multiply_add_pairs(__byte_perm(sign, above, 0x4342), minus_one, __byte_perm(bits, above, 0x4342));
    } else {
        u32 codes = codes_of<TYPE>(low, high, in_block);
        first = __byte_perm(codes, above, 0x4140), second = __byte_perm(codes, above, 0x4342);
        if constexpr (!has_minimum(TYPE)) {
            constexpr u32 zero = 0xc300 | zero_of(TYPE), zeros = zero | zero << 16;
            first = multiply_add_pairs(first, one, zeros), second = multiply_add_pairs(second, one, zeros);
        }
    }
}

// What a block computes at a time, and how a stage lies in shared memory: rows of weights, and then tokens.
template <Format TYPE, int TOKENS> struct CodesTile {
    static constexpr int warps = 4, threads = 32 * warps;
    static constexpr int tokens = TOKENS, outputs = ROWS * warps, columns = 256;
    static constexpr int cluster = 1, least_stages = 1;
    // Where a unit's members all at once would take more registers than there are.
    static constexpr bool rolled = TOKENS == 32 ? TYPE == Q2_K || (TYPE == Q4_K && IS_LATER) : TOKENS == 16 && TYPE == Q5_K;
    static constexpr bool takes_turns = false;
    static __device__ __forceinline__ void wait() { __syncthreads(); }

    // Bytes of a stage in a row of weights, and the pieces of sixteen that they may lie in.
    static constexpr int bytes = columns / block_elements(TYPE) * block_bytes(TYPE);
    static constexpr int pieces = (bytes + (bytes % 16 ? 14 : 0) + 15) / 16;
    // Rows that are read at once lie in different banks.
    static constexpr int row_stride = 16 * pieces + (pieces % 8 == 0 ? 16 : 0);
    static constexpr int token_stride = 2 * columns + (Step<TYPE>::wide ? 64 : 32);
    static constexpr int stage_bytes = outputs * row_stride + tokens * token_stride;
    // So many that two blocks fit on a multiprocessor.
    static constexpr int stages = stage_bytes > 32 * 1024 ? 2 : 3;
    // Columns whose scales are decoded at a time, and room for them, each warp's own.
    static constexpr int decoded = Step<TYPE>::columns < 128 ? Step<TYPE>::columns : 128;
    static constexpr int scales_bytes = decoded / Step<TYPE>::group * ROWS * 4 * Scales<TYPE>::floats;

    // Where a sum lies in shared memory in the end. With two matrices the upper half of the columns are the second's.
    static __device__ __forceinline__ int sum_at(int row, int column) { return row * (outputs + 4) + column; }
    static_assert(4 * tokens * (outputs + 4) <= stages * stage_bytes, "the sums fit into the stages");
};

template <Format TYPE, int TOKENS> struct CodesBlock {
    typedef CodesTile<TYPE, TOKENS> Tile;
    typedef ::Step<TYPE> Step;
    static constexpr int token_tiles = TOKENS / 8;

    const Product &product;
    u8 *shared;
    // Of deferred norms.
    float *factors;
    int warp, lane, group, place;
    // Those of the tile.
    Rows rows;
    int first_row, first_out;
    // Rows of weights that this thread brings pieces of, and how many outputs there are from each on: see `find_rows`.
    const u8 *weights[3];
    int left[3];
    // -128 as BF16, an operand of tensor cores. Were they constants, the compiler would copy them for each product.
    u32 minus_128[4];
    float totals[TILES][token_tiles][4];

    __device__ __forceinline__ u8 *stage_at(int stage) const { return shared + stage % Tile::stages * Tile::stage_bytes; }
    __device__ __forceinline__ float *scales() const {
        return reinterpret_cast<float *>(shared + Tile::stages * Tile::stage_bytes + warp * Tile::scales_bytes);
    }

    // Where in its first piece a stage begins.
    static __device__ __forceinline__ int first_byte(int stage) { return stage * Tile::bytes % 16; }

    // Finds the rows of the tile of which this thread brings pieces. Eight neighbouring threads bring eight pieces of a row, of
    // every sixteenth row; what is over each thread brings of a row of its own.
    __device__ __forceinline__ void find_rows() {
        size_t bytes = row_bytes<TYPE>(product.cols), matrix = product.offsets ? blockIdx.z * (product.outs * bytes) : 0;
        int row = threadIdx.x / 8, own = threadIdx.x % ROWS;
        const u8 *other = product.second ? product.second : product.weights;
        int above = product.second ? 0 : ROWS / 2, warps = threadIdx.x / ROWS * outs_of_warp();
        left[0] = product.outs - first_out - row, left[1] = left[0] - above, left[2] = product.outs - first_out - warps;
        left[2] -= own < ROWS / 2 ? own : own - ROWS / 2 + above;
        weights[0] = product.weights + matrix + (product.outs - left[0]) * bytes;
        weights[1] = other + matrix + (product.outs - left[1]) * bytes;
        weights[2] = (own < ROWS / 2 ? product.weights : other) + matrix + (product.outs - left[2]) * bytes;
    }

    // Of each matrix.
    __device__ __forceinline__ int outs_of_warp() const { return product.second ? ROWS / 2 : ROWS; }

    // Starts to bring the weights of a stage. Zeros take the place of what isn't there, scales too.
    __device__ __forceinline__ void copy_weights(int stage) const {
        constexpr int whole = Tile::pieces / 8, over = Tile::pieces % 8;
        size_t bytes = row_bytes<TYPE>(product.cols), begin = static_cast<size_t>(stage) * Tile::bytes / 16 * 16;
        int here = static_cast<int>(bytes - begin), outs = outs_of_warp();
        size_t apart = outs * bytes;
        auto copy = [&](u8 *to, const u8 *from, int piece, bool exists) {
            exists = exists && 16 * piece < here;
            copy_async(to + 16 * piece, exists ? from + begin + 16 * piece : product.weights, exists);
        };
        u8 *to = stage_at(stage);
#pragma unroll
        for (int i = 0; i < whole * Tile::warps * 2; i++) {
            int half = i % 2, of_warp = i / 2 % Tile::warps, piece = i / 2 / Tile::warps * 8 + threadIdx.x % 8;
            copy(to + (threadIdx.x / 8 + of_warp * ROWS + half * (ROWS / 2)) * Tile::row_stride, weights[half] + of_warp * apart,
                 piece, of_warp * outs < left[half]);
        }
#pragma unroll
        for (int i = 0; i < over; i++) {
            copy(to + threadIdx.x * Tile::row_stride, weights[2], 8 * whole + i, left[2] > 0);
        }
    }

    __device__ __forceinline__ void copy_tokens(int stage) const {
        constexpr int pieces = Tile::columns / 8;
        u8 *to = stage_at(stage) + Tile::outputs * Tile::row_stride;
#pragma unroll
        for (int i = 0; i < TOKENS * pieces / Tile::threads; i++) {
            int index = threadIdx.x + i * Tile::threads, token = index / pieces, piece = index % pieces;
            int row = first_row + token, column = stage * Tile::columns + 8 * piece;
            bool exists = row < rows.end && column < product.cols;
            const u16 *from = product.halves;
            if (exists) {
                from += place_of(product, row) * product.halves_stride + column;
            }
            copy_async(to + token * Tile::token_stride + 16 * piece, from, exists);
        }
    }

    // The x of 32 columns from column `column` of a stage on: two products' words.
    __device__ __forceinline__ void load_x(const u8 *tokens, int tile, int column, u32 (&words)[4]) const {
        const u8 *token = tokens + (8 * tile + group) * Tile::token_stride + 2 * column;
        if constexpr (Step::wide) {
            uint4 all = *reinterpret_cast<const uint4 *>(token + 16 * place);
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        } else {
            uint2 low = *reinterpret_cast<const uint2 *>(token + 8 * place);
            uint2 high = *reinterpret_cast<const uint2 *>(token + 32 + 8 * place);
            words[0] = low.x, words[1] = low.y, words[2] = high.x, words[3] = high.y;
        }
    }

    // Multiplies 32 columns, from column `column` of a step on, which begins at column `begin` of the stage.
    __device__ __forceinline__ void multiply(const u8 *tokens, const Codes<TYPE> (&codes)[ROWS / 8], int begin, int unit,
                                             int member) {
        constexpr int groups = 32 / Step::group;
        int column = Step::column_of(unit, member);
        u32 words[token_tiles][4];
        // What 128 + code is too much: sums of x, times -128, the same in all rows.
        float surplus[token_tiles][groups][4] = {};
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
            load_x(tokens, token_tile, begin + column, words[token_tile]);
            if constexpr (has_minimum(TYPE)) {
#pragma unroll
                for (int piece = 0; piece < 2; piece++) {
                    const u32 *b = words[token_tile] + 2 * piece;
                    multiply_add<HALF_BF16>(surplus[token_tile][piece % groups], minus_128, b[0], b[1]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 a[2][4];
            float factors[groups][2], least[groups][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Codes<TYPE> &row = codes[2 * tile + half];
#pragma unroll
                for (int piece = 0; piece < 2; piece++) {
                    int in_block = (column + (Step::wide ? 0 : 16 * piece)) % block_elements(TYPE);
                    halves_of_codes<TYPE>(row.low_of(piece), row.high_of(piece, place), in_block, a[piece][half],
                                          a[piece][2 + half]);
                }
#pragma unroll
                for (int index = 0; index < groups; index++) {
                    const float *from = scales() + (group + 8 * (2 * tile + half)) * Scales<TYPE>::floats;
                    from += (column % Tile::decoded / Step::group + index) * ROWS * Scales<TYPE>::floats;
                    if constexpr (has_minimum(TYPE)) {
                        float2 both = *reinterpret_cast<const float2 *>(from);
                        factors[index][half] = both.x, least[index][half] = both.y;
                    } else {
                        factors[index][half] = *from;
                    }
                }
            }
#pragma unroll
            for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
                float sums[groups][4];
#pragma unroll
                for (int i = 0; i < 4 * groups; i++) {
                    sums[i / 4][i % 4] = surplus[token_tile][i / 4][i % 4];
                }
#pragma unroll
                for (int piece = 0; piece < 2; piece++) {
                    const u32 *b = words[token_tile] + 2 * piece;
                    multiply_add<HALF_BF16>(sums[piece % groups], a[piece], b[0], b[1]);
                }
#pragma unroll
                for (int i = 0; i < 4 * groups; i++) {
                    int index = i / 4, half = i % 4 / 2;
                    float &total = totals[tile][token_tile][i % 4];
                    total = fmaf(factors[index][half], sums[index][i % 4], total);
                    if constexpr (has_minimum(TYPE)) {
                        total = fmaf(least[index][half], surplus[token_tile][index][i % 2], total);
                    }
                }
            }
        }
    }

    // Multiplies a stage that is there.
    __device__ __forceinline__ void multiply_stage(int stage) {
        const u8 *of_warp = stage_at(stage) + warp * ROWS * Tile::row_stride + first_byte(stage);
        const u8 *tokens = stage_at(stage) + Tile::outputs * Tile::row_stride;
#pragma unroll 1
        for (int begin = 0; begin < Tile::columns; begin += Step::columns) {
            const u8 *step = of_warp + begin / block_elements(TYPE) * block_bytes(TYPE);
            auto row_at = [&](int row) { return step + row * Tile::row_stride; };
            Codes<TYPE> codes[ROWS / 8];
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                codes[i].fetch_shared(row_at(8 * i + group), begin, place);
            }
            Scales<TYPE> row_scales;
            row_scales.fetch(row_at(8 * place + group), begin);
#pragma unroll
            for (int decoded = 0; decoded < Step::columns; decoded += Tile::decoded) {
                constexpr int groups = Tile::decoded / Step::group;
                row_scales.template decode<groups>(scales() + (8 * place + group) * Scales<TYPE>::floats, decoded / Step::group);
                __syncwarp();
                constexpr int units = Step::units * Tile::decoded / Step::columns;
#pragma unroll 1
                for (int unit = decoded / Tile::decoded * units; unit < (decoded / Tile::decoded + 1) * units; unit++) {
#pragma unroll
                    for (int i = 0; i < ROWS / 8; i++) {
                        codes[i].fetch(row_at(8 * i + group), begin, unit, place);
                    }
#pragma unroll(Tile::rolled ? 1 : Step::members)
                    for (int member = 0; member < Step::members; member++) {
                        multiply(tokens, codes, begin, unit, member);
                    }
                }
                __syncwarp();
            }
        }
    }

    // Sums the stages from `first` on, `count` of them. Weights are asked for before the launches before this are waited for, if
    // they weren't yet.
    __device__ __forceinline__ void multiply_stages(int first, int count, bool waits) {
#pragma unroll
        for (int i = 0; i < TILES * token_tiles * 4; i++) {
            totals[i / 4 / token_tiles][i / 4 % token_tiles][i % 4] = 0.0f;
        }
        int end = first + count;
        for (int stage = first; stage < min(first + Tile::stages - 1, end); stage++) {
            copy_weights(stage);
        }
        if (waits) {
            ask_for_norm(product, first_out, Tile::outputs);
            wait_for_launches_before();
        }
        for (int stage = first; stage < first + Tile::stages - 1; stage++) {
            if (stage < end) {
                copy_tokens(stage);
            }
            commit_copies();
        }
        if (waits && TOKENS <= DEFERRED_ROWS) {
            find_deferred(product, first_row, rows.end, Tile::warps, factors);
        }
#pragma unroll 1
        for (int stage = first; stage < end; stage++) {
            wait_for_copies<Tile::stages - 2>();
            __syncthreads();
            int next = stage + Tile::stages - 1;
            if (next < end) {
                copy_weights(next);
                copy_tokens(next);
            }
            commit_copies();
            multiply_stage(stage);
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    // Takes in the results of the tile.
    __device__ __forceinline__ void store() const {
        float *sums = reinterpret_cast<float *>(shared);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int column = product.second ? (warp + tile * Tile::warps) * 16 : warp * ROWS + 16 * tile;
#pragma unroll
            for (int i = 0; i < 4 * token_tiles; i++) {
                int token = i / 4 * 8 + 2 * place + i % 2;
                sums[Tile::sum_at(token, column + group + i % 4 / 2 * 8)] = totals[tile][i / 4][i % 4];
            }
        }
        __syncthreads();
        store_tile<Tile>(product, rows, first_row, first_out, sums, factors);
        __syncthreads();
    }
};

// Without experts, blocks in x share all tiles out; with them, blocks in x are tiles of outputs, in y of rows, in z experts.
template <Format TYPE, int TOKENS> __device__ __forceinline__ void multiply_codes(const Product &product) {
    typedef CodesTile<TYPE, TOKENS> Tile;
    DYNAMIC_SHARED(u8, shared);
    // So that the compiler sees that a warp's lanes do the same.
    int warp = __shfl_sync(ALL_LANES, warp_of_thread(), 0), lane = lane_of_thread();
    __shared__ float factors[DEFERRED_ROWS];
    CodesBlock<TYPE, TOKENS> block = {product, shared, factors, warp, lane, lane / 4, lane % 4, {}, 0, 0, {}, {}, {}, {}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        block.minus_128[i] = __shfl_sync(ALL_LANES, product.cols < lane - 32 ? 0 : 0xc300c300, i);
    }
    Work<Tile> work(product);
    bool has_experts = product.offsets;
    int count = has_experts ? work.stages : work.count();
    if (has_experts || count == 0) {
        wait_for_launches_before();
    }
    block.rows = rows_of(product);
    if (has_experts) {
        block.first_row = block.rows.begin + blockIdx.y * TOKENS, block.first_out = blockIdx.x * Work<Tile>::outputs_of(product);
        if (block.first_row >= block.rows.end) {
            return;
        }
    }
    for (int at = 0; at < count;) {
        StageOfTile place = {0, 0};
        if (!has_experts) {
            place = work.locate(at);
            block.first_row = work.first_row(place.tile), block.first_out = work.first_out(product, place.tile, 0);
        }
        int here = min(work.stages - place.stage, count - at);
        block.find_rows();
        // Weights come while the launch before this ends.
        block.multiply_stages(place.stage, here, at == 0 && !has_experts);
        at += here;
        if (here == work.stages || work.gather(product, place.tile, 0, block.totals)) {
            block.store();
        }
    }
}
