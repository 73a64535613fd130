// Tensor cores as the PTX instruction set describes them, element by element; and a product whose copies are waited
// for, or not.

#include "../cuemu.h"

#include "../../kernels/tensor.cuh"

#include <cstdio>
#include <cstdlib>

static u16 left[16][16], right[16][8], loaded[32][8];
static float sums[16][8];

// The instruction set's tables: element i of lane `lane`.
static int a_row(int lane, int i) { return lane / 4 + ((i & 2) ? 8 : 0); }
static int a_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
static int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
static int b_column(int lane) { return lane / 4; }
static int c_row(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
static int c_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

template <Half HALF> static void multiply() {
    int lane = threadIdx.x;
    u32 a[4], b[2];
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    for (int i = 0; i < 8; i += 2) {
        a[i / 2] = left[a_row(lane, i)][a_column(lane, i)] |
                   static_cast<u32>(left[a_row(lane, i + 1)][a_column(lane, i + 1)]) << 16;
    }
    for (int i = 0; i < 4; i += 2) {
        b[i / 2] = right[b_row(lane, i)][b_column(lane)] | static_cast<u32>(right[b_row(lane, i + 1)][b_column(lane)]) << 16;
    }
    multiply_add<HALF>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) {
        sums[c_row(lane, i)][c_column(lane, i)] = c[i];
    }
}

template <Half HALF> static void products() {
    for (int i = 0; i < 16 * 16; i++) {
        left[i / 16][i % 16] = half_of<HALF>(static_cast<float>(i * 7 % 23) - 11.0f);
    }
    for (int i = 0; i < 16 * 8; i++) {
        right[i / 8][i % 8] = half_of<HALF>(static_cast<float>(i * 5 % 19) * 0.25f);
    }
    cuemu::run({{1, 1, 1}, {32, 1, 1}, 0}, multiply<HALF>);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            float expected = 1.0f;
            for (int depth = 0; depth < 16; depth++) {
                expected += float_of_half<HALF>(left[row][depth]) * float_of_half<HALF>(right[depth][column]);
            }
            if (sums[row][column] != expected) {
                fprintf(stderr, "row %d column %d: %f, not %f\n", row, column, sums[row][column], expected);
                exit(1);
            }
        }
    }
}

// A lane's words of four matrices that lie one behind the other.
template <bool TRANSPOSED> static void load() {
    static u16 matrices[4][8][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        matrices[i / 64][i / 8 % 8][i % 8] = static_cast<u16>(i);
    }
    __syncthreads();
    u32 words[4];
    const void *row = matrices[lane / 8][lane % 8];
    TRANSPOSED ? load_transposed(words, row) : load_matrices(words, row);
    for (int i = 0; i < 8; i++) {
        loaded[lane][i] = static_cast<u16>(words[i / 2] >> i % 2 * 16);
    }
}

static void loads() {
    for (int transposed = 0; transposed < 2; transposed++) {
        cuemu::run({{1, 1, 1}, {32, 1, 1}, 0}, transposed ? load<true> : load<false>);
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 8; i++) {
                int row = lane / 4, column = lane % 4 * 2 + i % 2;
                int expected = i / 2 * 64 + (transposed ? column * 8 + row : row * 8 + column);
                if (loaded[lane][i] != expected) {
                    fprintf(stderr, "lane %d element %d: %d, not %d\n", lane, i, loaded[lane][i], expected);
                    exit(1);
                }
            }
        }
    }
}

alignas(16) static u32 source[32][4];
static u32 found[32][4];

// Two groups of copies, of which `PENDING` may be on their way when shared memory is read.
template <int PENDING> static void copies() {
    DYNAMIC_SHARED(u32, shared);
    int lane = threadIdx.x;
    for (int group = 0; group < 2; group++) {
        copy_async(shared + 4 * (32 * group + lane), source[lane], lane % 2 == 0);
        commit_copies();
    }
    wait_for_copies<PENDING>();
    __syncthreads();
    for (int i = 0; i < 4; i++) {
        found[lane][i] = shared[4 * (32 + 31 - lane) + i];
    }
}

static void waits() {
    for (int i = 0; i < 32 * 4; i++) {
        source[i / 4][i % 4] = static_cast<u32>(i + 1);
    }
    for (int pending = 0; pending < 2; pending++) {
        cuemu::run({{1, 1, 1}, {32, 1, 1}, 1024}, pending ? copies<1> : copies<0>);
        for (int lane = 0; lane < 32; lane++) {
            u32 written = (31 - lane) % 2 == 0 ? source[31 - lane][2] : 0;
            u32 expected = pending ? 0xffffffff : written;
            if (found[lane][2] != expected) {
                fprintf(stderr, "pending %d lane %d: %x, not %x\n", pending, lane, found[lane][2], expected);
                exit(1);
            }
        }
    }
}

int main() {
    products<HALF_BF16>();
    products<HALF_F16>();
    loads();
    waits();
    fprintf(stderr, "as described\n");
}
