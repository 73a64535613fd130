// Products of a few rows with quantized weights on tensor cores: bound by how fast weights come.
//
// Codes are whole numbers that BF16 holds exactly, so weights are multiplied without their scales: those are applied to the
// sums over a group of columns that shares one. Where elements have a minimum, that goes by the sum of the group's x, and so
// codes are multiplied as 128 + code, which takes less to make: the sum of x has what is too much as well.
//
// A warp computes 32 rows of weights, the left operand, for TOKENS tokens; the warps of a block share the columns of the
// same rows out, a step at a time, and their sums are added up in order. Codes go from memory to registers, and the next
// step's begin to come as soon as this one's are used. x and scales pass through shared memory, each warp's own; a lane
// decodes the scales of one row for all. Of a product's sixteen columns a lane takes four neighbouring ones: which is which
// in a product is free where both operands agree, and so x needs no other order than it has.
#pragma once

#include "formats.cuh"
#include "product.cuh"

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
    static constexpr int groups = Step<TYPE>::columns / Step<TYPE>::group;
    static constexpr int count = Step<TYPE>::in_blocks            ? Step<TYPE>::units
                                 : TYPE == Q3_K                   ? 7
                                 : TYPE == Q4_K || TYPE == Q5_K ? 4
                                                                  : 5;
    // For each row of a group a scale, and a minimum over -128.
    static constexpr int floats = has_minimum(TYPE) ? 2 : 1;
    static constexpr int bytes = groups * ROWS * 4 * floats;

    u32 words[count];

    __device__ __forceinline__ void fetch(const u8 *block, int at, int cols) {
        if constexpr (Step<TYPE>::in_blocks) {
#pragma unroll
            for (int i = 0; i < count; i++) {
                if (at + 32 * i < cols) {
                    const u8 *from = block + i * block_bytes(TYPE);
                    words[i] = has_minimum(TYPE) ? word_at(from) : half_at(from);
                }
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

    // Leaves them in `to`, which is this row's place in the first group.
    __device__ __forceinline__ void decode(float *to) const {
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
            for (int i = 0; i < groups; i++) {
                float number = small_half(scales[i / 4], i % 4);
                float product = zero == 0.0f ? scale * number : fmaf(scale, number, scale * -zero);
                store(to, i, product, minimum * small_half(minima[i / 4], i % 4));
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
    // High bits that all units share.
    static constexpr int shared_words = TYPE == Q3_K || TYPE == Q6_K ? 4 : TYPE == Q5_K ? 2 : 0;

    u32 low[Step<TYPE>::units][low_words], high[Step<TYPE>::units][high_words + 1], next[shared_words + 1], shared[2];

    __device__ __forceinline__ void fetch_shared(const u8 *block, int at, int place) {
        if constexpr (TYPE == Q5_K) {
            uint2 both = *reinterpret_cast<const uint2 *>(block + 16 + 8 * place);
            next[0] = both.x, next[1] = both.y;
        } else if constexpr (shared_words > 0) {
            const u8 *from = block + (TYPE == Q6_K ? 128 + at % 256 / 128 * 32 : 0) + 4 * place;
            load_halves<2>(next, from);
            load_halves<2>(next + 2, from + 16);
        }
    }

    __device__ __forceinline__ void take_shared() {
        if constexpr (TYPE == Q5_K) {
            shared[0] = next[0], shared[1] = next[1];
        } else if constexpr (shared_words > 0) {
            shared[0] = joined(next), shared[1] = joined(next + 2);
        }
    }

    __device__ __forceinline__ void fetch(const u8 *block, int at, int unit, int place) {
        const u8 *from = block + Step<TYPE>::byte_of_unit(at, unit);
        u32 *to = low[unit];
        if constexpr (TYPE == Q4_0 || TYPE == Q5_0) {
            load_halves<2>(to, from + (TYPE == Q4_0 ? 2 : 6) + 4 * place);
            load_halves<high_words>(high[unit], from + 2);
        } else if constexpr (TYPE == Q4_1 || TYPE == Q5_1) {
            to[0] = word_at(from + (TYPE == Q4_1 ? 4 : 8) + 4 * place);
            if constexpr (TYPE == Q5_1) {
                high[unit][0] = word_at(from + 4);
            }
        } else if constexpr (TYPE == Q8_0) {
            load_halves<4>(to, from + 2 + 8 * place);
        } else if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
            uint2 both = *reinterpret_cast<const uint2 *>(from + (TYPE == Q4_K ? 16 : 48) + 8 * place);
            to[0] = both.x, to[1] = both.y;
        } else if constexpr (TYPE == Q2_K) {
            to[0] = word_at(from + 16 + 4 * place), to[1] = word_at(from + 32 + 4 * place);
        } else {
            from += (TYPE == Q3_K ? 32 : 0) + 4 * place;
            load_halves<2>(to, from);
            load_halves<2>(to + 2, from + 16);
        }
    }

    // The bytes that have four of them, and their high bits as `codes_of` takes them.
    __device__ __forceinline__ u32 low_of(int unit, int piece) const {
        const u32 *from = low[unit] + (paired ? 0 : words * piece);
        return from_halves ? joined(from) : *from;
    }

    __device__ __forceinline__ u32 high_of(int unit, int piece, int place) const {
        if constexpr (TYPE == Q5_0) {
            return high[unit][piece] >> 4 * place;
        } else if constexpr (TYPE == Q5_1) {
            return high[unit][0] >> (16 * piece + 4 * place);
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

template <Format TYPE, int TOKENS> struct CodesWarp {
    typedef ::Step<TYPE> Step;
    static constexpr int token_tiles = TOKENS / 8;
    // x comes in chunks of so many columns, two of which are in shared memory. Rows of it are apart so that those which are
    // read at once lie in different banks.
    static constexpr int chunk = Step::columns < 128 ? Step::columns : 128;
    static constexpr int chunks = Step::columns / chunk;
    // Otherwise the compiler runs further ahead than there are registers for.
    static constexpr bool rolled = TYPE == Q5_K || (TYPE == Q4_K && (TOKENS > 8 || IS_LATER));
    static constexpr int token_bytes = 2 * chunk + (Step::wide ? 64 : 32);
    static constexpr int chunk_bytes = TOKENS * token_bytes;
    // And what else is there: scales, and where the tokens lie.
    static constexpr int scales_byte = 2 * chunk_bytes, tokens_byte = scales_byte + Scales<TYPE>::bytes;
    static constexpr int warp_bytes = tokens_byte + 8 * TOKENS;
    // Where sums are left: rows of a token are side by side.
    static constexpr int sum_stride = ROWS + 4;
    static_assert(4 * TOKENS * sum_stride <= 2 * chunk_bytes, "sums have room where x was");

    const Product &product;
    u8 *shared;
    int lane, group, place;
    // Where the step that is fetched next begins, in the first row of each tile of which this lane has codes; and how far behind
    // that is the second.
    const u8 *weights[TILES];
    int second[TILES];
    Codes<TYPE> codes[ROWS / 8];
    Scales<TYPE> scales;
    int tokens;
    // -128 as BF16, an operand of tensor cores. Were they constants, the compiler would copy them for each product.
    u32 minus_128[4];
    float totals[TILES][token_tiles][4];

    __device__ __forceinline__ const u8 *row_at(int row, int first_out, size_t matrix, size_t bytes) const {
        int out = min(first_out + (product.second ? row % 16 : row), product.outs - 1);
        return (product.second && row >= 16 ? product.second : product.weights) + matrix + out * bytes;
    }

    __device__ __forceinline__ void find_weights(int first_out, size_t matrix, size_t bytes) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            weights[tile] = row_at(16 * tile + group, first_out, matrix, bytes);
            second[tile] = static_cast<int>(row_at(16 * tile + 8 + group, first_out, matrix, bytes) - weights[tile]);
        }
    }

    // The same of a row that this lane has codes of.
    __device__ __forceinline__ const u8 *step_of(int row) const { return weights[row / 2] + (row % 2 ? second[row / 2] : 0); }

    // Goes from one step to another.
    __device__ __forceinline__ void move(int from, int to) {
        long long bytes = to / block_elements(TYPE) - from / block_elements(TYPE);
        bytes *= block_bytes(TYPE);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            weights[tile] += bytes;
        }
    }

    __device__ __forceinline__ const u16 **token_at(int token) const {
        return reinterpret_cast<const u16 **>(shared + tokens_byte) + token;
    }

    // Finds the tokens from row `first` on; in place of those that aren't there, one that is.
    __device__ __forceinline__ void find_tokens(int first, int end) {
        tokens = end - first;
        for (int token = lane; token < TOKENS; token += 32) {
            *token_at(token) = product.halves + place_of(product, min(first + token, end - 1)) * product.halves_stride;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void fetch_scales(int at) {
        if (at < product.cols) {
            // Of the row that is `place` of those whose codes this lane has. Chosen by masks: with branches the compiler puts
            // all of them into memory.
            u64 in_last = -static_cast<u64>(place / 2), below = -static_cast<u64>(place % 2);
            u64 first = reinterpret_cast<u64>(weights[0]) & ~in_last, last = reinterpret_cast<u64>(weights[1]) & in_last;
            u64 offset = ((second[0] & ~in_last) | (second[1] & in_last)) & below;
            scales.fetch(reinterpret_cast<const u8 *>((first | last) + offset), at, product.cols);
        }
    }

    __device__ __forceinline__ void fetch_shared(int at) {
        if (at < product.cols) {
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                codes[i].fetch_shared(step_of(i), at, place);
            }
        }
    }

    // Leaves what isn't there as it was: it is multiplied with zeros.
    __device__ __forceinline__ void fetch_unit(int at, int unit) {
        if (at + (Step::in_blocks ? 32 * unit : 0) < product.cols) {
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                codes[i].fetch(step_of(i), at, unit, place);
            }
        }
    }

    // Starts to bring the chunk of x at column `at` to place `to`.
    __device__ __forceinline__ void copy_x(int at, int to) {
        if (at < product.cols) {
            u8 *chunk_at = shared + to * chunk_bytes + group * token_bytes + 16 * place;
#pragma unroll
            for (int tile = 0; tile < token_tiles; tile++) {
                const u16 *from = *token_at(8 * tile + group) + at + 8 * place;
#pragma unroll
                for (int i = 0; i < chunk / 32; i++) {
                    bool exists = 8 * tile + group < tokens && (!Step::in_blocks || at + 32 * i < product.cols);
                    copy_async(chunk_at + tile * 8 * token_bytes + 64 * i, from + (Step::in_blocks && !exists ? 0 : 32 * i), exists);
                }
            }
        }
        commit_copies();
    }

    // The x of 32 columns from column `column` of a chunk on: two products' words.
    __device__ __forceinline__ void load_x(const u8 *chunk_at, int tile, int column, u32 (&words)[4]) const {
        const u8 *token = chunk_at + (8 * tile + group) * token_bytes + 2 * column;
        if constexpr (Step::wide) {
            uint4 all = *reinterpret_cast<const uint4 *>(token + 16 * place);
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        } else {
            uint2 low = *reinterpret_cast<const uint2 *>(token + 8 * place);
            uint2 high = *reinterpret_cast<const uint2 *>(token + 32 + 8 * place);
            words[0] = low.x, words[1] = low.y, words[2] = high.x, words[3] = high.y;
        }
    }

    // The place of a row of the first group.
    __device__ __forceinline__ float *scales_at(int row) const {
        return reinterpret_cast<float *>(shared + scales_byte) + row * Scales<TYPE>::floats;
    }

    // Multiplies 32 columns.
    __device__ __forceinline__ void multiply(const u8 *chunk_at, int unit, int member) {
        constexpr int groups = 32 / Step::group;
        int column = Step::column_of(unit, member);
        u32 words[token_tiles][4];
        // What 128 + code is too much: sums of x, times -128, the same in all rows.
        float surplus[token_tiles][groups][4] = {};
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
            load_x(chunk_at, token_tile, column % chunk, words[token_tile]);
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
                    halves_of_codes<TYPE>(row.low_of(unit, piece), row.high_of(unit, piece, place), in_block, a[piece][half],
                                          a[piece][2 + half]);
                }
#pragma unroll
                for (int index = 0; index < groups; index++) {
                    const float *from = scales_at(group) + 8 * (2 * tile + half) * Scales<TYPE>::floats;
                    from += (column / Step::group + index) * ROWS * Scales<TYPE>::floats;
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

    // Multiplies the steps from column `at` on that are `stride` apart, the first of which has been fetched.
    __device__ __forceinline__ void multiply_steps(int at, int stride) {
#pragma unroll
        for (int i = 0; i < TILES * token_tiles * 4; i++) {
            totals[i / 4 / token_tiles][i / 4 % token_tiles][i % 4] = 0.0f;
        }
        auto column_of_chunk = [&](int index) { return at + index / chunks * stride + index % chunks * chunk; };
        copy_x(column_of_chunk(0), 0);
        copy_x(column_of_chunk(1), 1);
        int turn = 0;
#pragma unroll 1
        for (; at < product.cols; at += stride) {
            int next = at + stride;
            move(at, next);
            scales.decode(scales_at(8 * place + group));
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                codes[i].take_shared();
            }
#pragma unroll
            for (int index = 0; index < chunks; index++) {
                if (index == chunks - 1) {
                    fetch_scales(next);
                    fetch_shared(next);
                }
                wait_for_copies<1>();
                __syncwarp();
                const u8 *chunk_at = shared + turn * chunk_bytes;
                constexpr int units = Step::units / chunks;
#pragma unroll
                for (int unit = index * units; unit < (index + 1) * units; unit++) {
#pragma unroll(rolled ? 1 : Step::members)
                    for (int member = 0; member < Step::members; member++) {
                        multiply(chunk_at, unit, member);
                    }
                    fetch_unit(next, unit);
                }
                __syncwarp();
                copy_x(column_of_chunk(index + 2), turn);
                turn ^= 1;
            }
        }
        wait_for_copies<0>();
        __syncwarp();
    }

    // Leaves the sums where x was.
    __device__ __forceinline__ void leave_sums() {
        float *sums = reinterpret_cast<float *>(shared);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 4 * token_tiles; i++) {
                int token = i / 4 * 8 + 2 * place + i % 2, row = 16 * tile + group + i % 4 / 2 * 8;
                sums[token * sum_stride + row] = totals[tile][i / 4][i % 4];
            }
        }
    }
};

// Adds up what all warps have left.
template <class WARP>
__device__ __forceinline__ void store_sums(const Product &product, const u8 *shared, int first, int count, int first_out,
                                           int outs) {
    for (int i = threadIdx.x; i < count * outs; i += blockDim.x) {
        int token = i / outs, out = first_out + i % outs;
        if (out < product.outs) {
            float sums[2] = {};
            for (int other = 0; other < static_cast<int>(blockDim.x) / 32; other++) {
                const float *found = reinterpret_cast<const float *>(shared + other * WARP::warp_bytes);
                found += token * WARP::sum_stride + i % outs;
                sums[0] += found[0];
                sums[1] += product.second ? found[ROWS / 2] : 0.0f;
            }
            store_result(product, first + token, out, result_of(product, first + token, out, sums[0], sums[1]));
        }
    }
}

// Blocks in x are outputs, 32 or with two matrices 16; in y tiles of TOKENS rows; in z experts. A block has any number of
// warps, and shared memory for each.
template <Format TYPE, int TOKENS> __device__ __forceinline__ void multiply_codes(const Product &product) {
    typedef CodesWarp<TYPE, TOKENS> Warp;
    DYNAMIC_SHARED(u8, shared);
    // So that the compiler sees that a warp's lanes do the same.
    int warp = __shfl_sync(ALL_LANES, warp_of_thread(), 0);
    int warps = blockDim.x / 32, lane = lane_of_thread();
    if (product.offsets) {
        wait_for_launches_before();
    }
    Rows rows = rows_of(product);
    int first = rows.begin + blockIdx.y * TOKENS;
    if (first >= rows.end) {
        return;
    }
    size_t bytes = row_bytes<TYPE>(product.cols);
    size_t matrix = product.offsets ? blockIdx.z * static_cast<size_t>(product.outs) * bytes : 0;
    int outs = product.second ? ROWS / 2 : ROWS, first_out = blockIdx.x * outs;
    int begin = warp * Warp::Step::columns, stride = warps * Warp::Step::columns;
    Warp mine = {product, shared + warp * Warp::warp_bytes, lane, lane / 4, lane % 4, {}, {}, {}, {}, 0, {}, {}};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        mine.minus_128[i] = __shfl_sync(ALL_LANES, product.cols < lane - 32 ? 0 : 0xc300c300, i);
    }
    mine.find_weights(first_out, matrix, bytes);
    mine.move(0, begin);
    // Weights come while the launch before this ends.
    mine.fetch_scales(begin);
    mine.fetch_shared(begin);
#pragma unroll
    for (int unit = 0; unit < Warp::Step::units; unit++) {
        mine.fetch_unit(begin, unit);
    }
    if (!product.offsets) {
        wait_for_launches_before();
    }
    // What is needed afterwards takes no registers till then.
    __shared__ int kept[4];
    if (threadIdx.x == 0) {
        kept[0] = first, kept[1] = min(TOKENS, rows.end - first), kept[2] = first_out, kept[3] = outs;
    }
    mine.find_tokens(first, rows.end);
    mine.multiply_steps(begin, stride);
    mine.leave_sums();
    __syncthreads();
    store_sums<Warp>(product, shared, kept[0], kept[1], kept[2], kept[3]);
}
