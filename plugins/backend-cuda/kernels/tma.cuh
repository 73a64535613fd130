// Hopper's tensor memory accelerator: one thread has a box of a matrix copied to shared memory, of one block or of several
// of a cluster, and a barrier there counts the bytes. See "tensor copy", "mbarrier" and "cluster" of the PTX instruction
// set; compiled for sm_90a alone.
#pragma once

#include "tensor.cuh"

// A matrix and the box that is copied at a time, as the driver encodes them.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 rank_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits until all threads of the cluster are here. Orders nothing that they wrote but barriers that were shown.
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers of a thread where one warpgroup copies and two multiply: what those that copy don't need, the others have.
constexpr int COPYING_REGISTERS = 40, MULTIPLYING_REGISTERS = 232;

// Has the threads of a warpgroup take this many registers, fewer or more than before.
template <int COUNT> __device__ __forceinline__ void take_fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// A barrier whose phase ends when `arrivals` have come, and as many bytes as were announced.
struct Barrier {
    u64 state;

    __device__ __forceinline__ void init(u32 arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
    }

    // Shows barriers that were just made to the accelerator and to the cluster.
    static __device__ __forceinline__ void show() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

    // Arrives, and announces bytes.
    __device__ __forceinline__ void expect(u32 bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                     : "memory");
    }

    // Arrives at the barrier that lies here in block `rank` of the cluster: with what was read done, not with anything
    // written. To release writes to the cluster would take a fence of the whole device, a microsecond long.
    __device__ __forceinline__ void arrive_at(u32 rank) {
        asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&state)),
                     "r"(rank)
                     : "memory");
    }

    // Waits until a phase has ended; the first is 0, then they alternate. The one before the first has ended.
    __device__ __forceinline__ void wait(u32 phase) {
        u32 done;
        do {
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done)
                         : "r"(shared_address(&state)), "r"(phase)
                         : "memory");
        } while (!done);
    }
};

// Has the box at `row` and `column` copied to this block; what is outside of the matrix becomes 0.
__device__ __forceinline__ void copy_box(void *to, const TensorMap &map, int row, int column, Barrier &barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(to)),
                 "l"(reinterpret_cast<u64>(&map)), "r"(column), "r"(row), "r"(shared_address(&barrier.state))
                 : "memory");
}

// The same to the blocks of the cluster that `ranks` has bits for: to the same place, with the same barrier, in each.
__device__ __forceinline__ void copy_box_to(u16 ranks, void *to, const TensorMap &map, int row, int column,
                                            Barrier &barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
                 "l"(reinterpret_cast<u64>(&map)), "r"(column), "r"(row), "r"(shared_address(&barrier.state)), "h"(ranks)
                 : "memory");
}
