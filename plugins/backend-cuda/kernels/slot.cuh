// The sampling state of a session, as src/sampler.rs writes it down.
#pragma once

#include "common.cuh"

struct Slot {
    u64 seed;
    // Suppressed tokens, then tokens with a bias, then their biases.
    const u32 *lists;
    float temperature, top_p, min_p, typical_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    u32 top_k, min_tokens, generated, has_penalties;
    u32 suppressed, biased;
    u32 reserved;
};

// A slot to open, with where its history lies among the pairs of token and `seen`.
struct OpenedSlot {
    Slot slot;
    u32 number, first_pair, pairs, reserved;
};
