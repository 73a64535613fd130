// Opens sampler slots, and fills in tokens that the step before has sampled.

#include "slot.cuh"

// What a slot has seen is a word for each token of the vocabulary: twice the times that it is in the output,
// plus one if it is in the prompt. Kept only where a penalty reads it.
KERNEL(slot_open, const OpenedSlot *opened, const u32 *pairs, Slot *slots, u32 *seen, int vocab) {
    wait_for_launches_before();
    const OpenedSlot *open = opened + blockIdx.x;
    if (threadIdx.x == 0) {
        slots[open->number] = open->slot;
    }
    if (!open->slot.has_penalties) {
        return;
    }
    u32 *mine = seen + static_cast<size_t>(open->number) * vocab;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        mine[token] = 0;
    }
    __syncthreads();
    const u32 *history = pairs + 2 * static_cast<size_t>(open->first_pair);
    for (int pair = threadIdx.x; pair < static_cast<int>(open->pairs); pair += blockDim.x) {
        mine[history[2 * pair]] = history[2 * pair + 1];
    }
}

// A row whose token couldn't be sampled is given up by the engine; until then any token will do. Entries that name no
// want fill the list up.
KERNEL(carry, const u32 *carries, int count, const u32 *sampled, u32 *tokens) {
    wait_for_launches_before();
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < count && carries[2 * index + 1] != ~0u) {
        u32 token = sampled[carries[2 * index + 1]];
        tokens[carries[2 * index]] = token == NO_TOKEN ? 0 : token;
    }
}
