// Writing a token's keys and values into its cell, with K turned on the way, and Q where attention doesn't turn it.
#pragma once

#include "attention.cuh"
#include "rope.cuh"

// Blocks that shall fit on a multiprocessor: for GPUs after Hopper a thread is compiled to more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int WRITE_BLOCKS = 4;
#else
constexpr int WRITE_BLOCKS = 5;
#endif

// A token's rows, where they go, and how its first `2 × pairs` columns of each head of Q and K are turned.
struct Token {
    Pages pages;
    // Its page, and its place there.
    u8 *page;
    int place;
    const float *q, *k, *v;
    int q_heads;
    float *q_turned;
    const float *turns;
    int pairs, interleaved;

    // Columns that a thread can take at a time.
    __device__ __forceinline__ int columns_at_once() const {
        u64 starts = reinterpret_cast<u64>(q) | reinterpret_cast<u64>(k) | reinterpret_cast<u64>(v);
        bool aligned = ((starts | reinterpret_cast<u64>(q_turned)) & 15) == 0;
        return aligned && ((pages.k_dim | pages.v_dim | pairs) & 3) == 0 ? 4 : 1;
    }

    // The number of an element among the page's keys, and among its values.
    template <Format TYPE> __device__ __forceinline__ size_t key_at(int head, int dim) const {
        constexpr int piece = piece_elements(TYPE);
        size_t of_head = static_cast<size_t>(head) * (pages.k_padded / piece) + dim / piece;
        return (of_head * pages.page_tokens + place) * piece + dim % piece;
    }
    __device__ __forceinline__ size_t value_at(int head, int dim) const {
        return (static_cast<size_t>(head) * pages.page_tokens + place) * pages.v_dim + dim;
    }
};

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

// As floats. A thread takes the same columns of several heads, four if all lies in fours; the heads are shared out over
// the blocks in y: of Q, then of K and of V.
template <Format TYPE> __device__ __forceinline__ void write_floats(const Token &token) {
    const Pages &pages = token.pages;
    u8 *keys = token.page + pages.k_at, *values = token.page + pages.v_at;
    int columns = token.columns_at_once();
    int all = max(pages.k_padded, pages.v_dim) / columns, width = min(all, static_cast<int>(blockDim.x));
    int slots = blockDim.x / width, slot = threadIdx.x / width, stride = gridDim.y * slots;
    if (slot >= slots) {
        return;
    }
    for (int dim = threadIdx.x % width * columns; dim < all * columns; dim += width * columns) {
        int index = blockIdx.y * slots + slot;
        bool in_head = dim < pages.k_dim;
        if (columns == 4) {
            FourTurns four(dim, token.turns, token.pairs, token.interleaved);
            for (; index + stride < token.q_heads; index += 2 * stride) {
                int at = index * pages.k_dim, next = at + stride * pages.k_dim;
                if (in_head) {
                    // Both are asked for before either is written.
                    float4 first = four.turned(token.q + at, dim), second = four.turned(token.q + next, dim);
                    *reinterpret_cast<float4 *>(token.q_turned + at + dim) = first;
                    *reinterpret_cast<float4 *>(token.q_turned + next + dim) = second;
                }
            }
            for (; index < token.q_heads; index += stride) {
                int at = index * pages.k_dim;
                if (in_head) {
                    *reinterpret_cast<float4 *>(token.q_turned + at + dim) = four.turned(token.q + at, dim);
                }
            }
            for (index -= token.q_heads; index < pages.heads; index += stride) {
                float4 key = {0.0f, 0.0f, 0.0f, 0.0f};
                if (in_head) {
                    key = four.turned(token.k + index * pages.k_dim, dim);
                }
                if (dim < pages.k_padded) {
                    store_four<TYPE>(keys, token.key_at<TYPE>(index, dim), key);
                }
            }
            for (index -= pages.heads; index < pages.heads; index += stride) {
                if (dim < pages.v_dim) {
                    float4 value = *reinterpret_cast<const float4 *>(token.v + index * pages.v_dim + dim);
                    store_four<TYPE>(values, token.value_at(index, dim), value);
                }
            }
            continue;
        }
        auto turned_column = [&](const float *head) {
            return turned(head, dim, token.turns, token.pairs, token.interleaved);
        };
        for (; index < token.q_heads; index += stride) {
            int at = index * pages.k_dim;
            if (in_head) {
                token.q_turned[at + dim] = turned_column(token.q + at);
            }
        }
        for (index -= token.q_heads; index < pages.heads; index += stride) {
            float key = in_head ? turned_column(token.k + index * pages.k_dim) : 0.0f;
            if (dim < pages.k_padded) {
                store_element<TYPE>(keys, token.key_at<TYPE>(index, dim), key);
            }
        }
        for (index -= pages.heads; index < pages.heads; index += stride) {
            if (dim < pages.v_dim) {
                store_element<TYPE>(values, token.value_at(index, dim), token.v[index * pages.v_dim + dim]);
            }
        }
    }
}

// Columns `dim` on of a head, after its first `2 × pairs` were turned.
template <int COLUMNS>
__device__ __forceinline__ void turned_columns(const Token &token, const float *head, int dim, int pairs,
                                               float (&columns)[COLUMNS]) {
    if constexpr (COLUMNS == 4) {
        float4 four = FourTurns(dim, token.turns, pairs, token.interleaved).turned(head, dim);
        columns[0] = four.x, columns[1] = four.y, columns[2] = four.z, columns[3] = four.w;
    } else {
        columns[0] = turned(head, dim, token.turns, pairs, token.interleaved);
    }
}

// A head's key or value as e4m3 with its scale, by a whole warp: the scale depends on all of it.
template <int COLUMNS> __device__ __forceinline__ void write_scaled_head(const Token &token, int head, bool is_key) {
    const Pages &pages = token.pages;
    int first = lane_of_thread() * COLUMNS;
    constexpr int step = 32 * COLUMNS;
    float columns[COLUMNS];
    int dims = is_key ? pages.k_dim : pages.v_dim, padded = is_key ? pages.k_padded : dims;
    const float *from = (is_key ? token.k : token.v) + head * dims;
    int pairs = is_key ? token.pairs : 0;
    u32 largest = 0;
    for (int dim = first; dim < dims; dim += step) {
        turned_columns(token, from, dim, pairs, columns);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            largest = max(largest, __float_as_uint(columns[i]) & 0x7fffffff);
        }
    }
    u32 scale = scale_for(warp_max(largest));
    if (lane_of_thread() == 0) {
        token.page[pages.scales_of(head, token.place) + (is_key ? 0 : 1)] = static_cast<u8>(scale);
    }
    for (int dim = first; dim < padded; dim += step) {
        u32 codes = 0;
        if (dim < dims) {
            turned_columns(token, from, dim, pairs, columns);
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                codes |= code_of(columns[i], scale) << 8 * i;
            }
        }
        u64 at = is_key ? pages.k_at + token.key_at<F8_E4M3>(head, dim) : pages.v_at + token.value_at(head, dim);
        u8 *to = token.page + at;
        if constexpr (COLUMNS == 4) {
            *reinterpret_cast<u32 *>(to) = codes;
        } else {
            *to = static_cast<u8>(codes);
        }
    }
}

// As e4m3. A warp takes a head at a time.
template <int COLUMNS> __device__ __forceinline__ void write_scaled(const Token &token) {
    const Pages &pages = token.pages;
    int warps = blockDim.x / 32, first = lane_of_thread() * COLUMNS;
    constexpr int step = 32 * COLUMNS;
    for (int index = blockIdx.y * warps + warp_of_thread(); index < token.q_heads + 2 * pages.heads;
         index += gridDim.y * warps) {
        float columns[COLUMNS];
        if (index < token.q_heads) {
            for (int dim = first; dim < pages.k_dim; dim += step) {
                turned_columns(token, token.q + index * pages.k_dim, dim, token.pairs, columns);
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    token.q_turned[index * pages.k_dim + dim + i] = columns[i];
                }
            }
            continue;
        }
        bool is_key = index < token.q_heads + pages.heads;
        write_scaled_head<COLUMNS>(token, index - token.q_heads - (is_key ? 0 : pages.heads), is_key);
    }
}

// A head's key and value, by all threads of a block; all columns lie in fours.
template <Format TYPE> __device__ __forceinline__ void write_head(const Token &token, int head) {
    const Pages &pages = token.pages;
    if constexpr (TYPE == F8_E4M3) {
        for (int warp = warp_of_thread(); warp < 2; warp += blockDim.x / 32) {
            write_scaled_head<4>(token, head, warp == 0);
        }
    } else {
        for (int i = threadIdx.x * 4; i < pages.k_padded + pages.v_dim; i += blockDim.x * 4) {
            float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
            if (i >= pages.k_padded) {
                int dim = i - pages.k_padded;
                four = *reinterpret_cast<const float4 *>(token.v + head * pages.v_dim + dim);
                store_four<TYPE>(token.page + pages.v_at, token.value_at(head, dim), four);
                continue;
            }
            if (i < pages.k_dim) {
                FourTurns turns(i, token.turns, token.pairs, token.interleaved);
                four = turns.turned(token.k + head * pages.k_dim, i);
            }
            store_four<TYPE>(token.page + pages.k_at, token.key_at<TYPE>(head, i), four);
        }
    }
}

template <Format TYPE> __device__ __forceinline__ void write_cells(const Token &token) {
    if constexpr (TYPE != F8_E4M3) {
        write_floats<TYPE>(token);
    } else if (token.columns_at_once() == 4) {
        write_scaled<4>(token);
    } else {
        write_scaled<1>(token);
    }
}
