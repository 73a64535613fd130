// Kernels with a fault each, which the emulator must find; the first argument chooses one.

#include "../cuemu.h"

#include <cstdio>

static unsigned total;

static void barrier_in_a_branch() {
    if (threadIdx.x < 16) {
        __syncthreads();
    }
}

static void barriers_that_wait_for_a_shuffle() {
    if (threadIdx.x % 2) {
        __syncthreads();
    } else {
        __shfl_xor_sync(~0u, 1, 1);
    }
}

static void mask_with_lanes_that_left() {
    if (threadIdx.x < 16) {
        __shfl_xor_sync(~0u, 1, 1);
    }
}

static void shuffle_from_outside_the_mask() {
    if (threadIdx.x < 16) {
        __shfl_sync(0xffffu, 1, 20);
    }
}

static void unwritten_shared_memory() {
    float *shared = reinterpret_cast<float *>(cuemu::dynamic_shared);
    if (shared[threadIdx.x] != shared[threadIdx.x] && threadIdx.x == 0) {
        fprintf(stderr, "unwritten shared memory is NaN\n");
    }
}

static void nothing_wrong() {
    float *shared = reinterpret_cast<float *>(cuemu::dynamic_shared);
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    float sum = shared[blockDim.x - 1 - threadIdx.x];
    for (unsigned bits = 16; bits; bits >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, bits);
    }
    if (threadIdx.x % 32 == 0) {
        total += static_cast<unsigned>(sum);
    }
}

int main(int, char **arguments) {
    void (*const kernels[])() = {barrier_in_a_branch,           barriers_that_wait_for_a_shuffle,
                                 mask_with_lanes_that_left,     shuffle_from_outside_the_mask,
                                 unwritten_shared_memory,       nothing_wrong};
    cuemu::Launch launch{{3, 1, 1}, {64, 1, 1}, 64 * sizeof(float)};
    cuemu::run(launch, kernels[arguments[1][0] - '0']);
    fprintf(stderr, "total %u\n", total);
}
