// From a row of logits to what a want asks for. The reference is `setu_core::sampling`: the same steps in the
// same order, and double precision where it has it. A block answers one want.

#include "search.cuh"
#include "slot.cuh"

// As src/step.rs writes it down.
struct Want {
    u32 token, flags, slot, top, target;
    // Position of the token to be sampled.
    u32 position;
    // First word of its mask.
    u32 mask;
    u32 reserved;
};

constexpr u32 WANT_SAMPLE = 1, WANT_LOGPROB = 2, WANT_SCORE = 4, WANT_MASKED = 16;

// A number in [0, 1) that depends on seed and position alone: Philox4x32-10.
__device__ __forceinline__ double uniform(u64 seed, u64 position) {
    u32 counter[4] = {static_cast<u32>(position), static_cast<u32>(position >> 32), 0, 0};
    u32 key[2] = {static_cast<u32>(seed), static_cast<u32>(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        u64 low = static_cast<u64>(counter[0]) * 0xD2511F53u;
        u64 high = static_cast<u64>(counter[2]) * 0xCD9E8D57u;
        u32 next[4] = {static_cast<u32>(high >> 32) ^ counter[1] ^ key[0], static_cast<u32>(high),
                       static_cast<u32>(low >> 32) ^ counter[3] ^ key[1], static_cast<u32>(low)};
        for (int i = 0; i < 4; i++) {
            counter[i] = next[i];
        }
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    u64 bits = (static_cast<u64>(counter[0]) << 32 | counter[1]) >> 11;
    return static_cast<double>(bits) / 9007199254740992.0;
}

// Writes the logits as bias, penalties, suppression and mask change them to `out`.
__device__ __forceinline__ void process(const Slot &slot, const u32 *seen, const u32 *mask, const float *logits, int vocab,
                        float *out) {
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        out[token] = logits[token];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // One after the other, since a token may be named twice.
        const u32 *tokens = slot.lists + slot.suppressed;
        for (u32 i = 0; i < slot.biased; i++) {
            if (tokens[i] < static_cast<u32>(vocab)) {
                out[tokens[i]] += __uint_as_float(tokens[slot.biased + i]);
            }
        }
    }
    __syncthreads();
    if (slot.has_penalties) {
        for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
            u32 found = seen[token];
            if (found) {
                float logit = out[token];
                logit = logit > 0.0f ? logit / slot.repetition_penalty : logit * slot.repetition_penalty;
                if (found > 1) {
                    logit -= slot.presence_penalty + slot.frequency_penalty * static_cast<float>(found >> 1);
                }
                out[token] = logit;
            }
        }
        __syncthreads();
    }
    if (slot.generated < slot.min_tokens) {
        for (u32 i = threadIdx.x; i < slot.suppressed; i += blockDim.x) {
            if (slot.lists[i] < static_cast<u32>(vocab)) {
                out[slot.lists[i]] = -INFINITY_F;
            }
        }
        __syncthreads();
    }
    if (mask) {
        for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
            if (!(mask[token / 32] >> (token % 32) & 1)) {
                out[token] = -INFINITY_F;
            }
        }
        __syncthreads();
    }
}

// The highest logit's token, the lowest of several; none where a logit is NaN or none is over −∞.
__device__ __forceinline__ u32 argmax(const float *logits, int vocab, u64 *partial) {
    u64 best = 0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
        float logit = logits[token];
        if (logit != logit) {
            best = ~0ull;
        } else if (logit > -INFINITY_F) {
            // Zeros of either sign are equal.
            u64 entry = static_cast<u64>(ordered(logit + 0.0f)) << 32 | (NO_TOKEN - token);
            best = entry > best ? entry : best;
        }
    }
    best = block_max(best, partial, u64(0));
    return best == 0 || best == ~0ull ? NO_TOKEN : NO_TOKEN - static_cast<u32>(best);
}

// Samples from processed logits.
__device__ __forceinline__ u32 sample(const Slot &slot, const float *logits, int vocab, u64 position, double *partial,
                      u64 *partial_bits) {
    u32 best = argmax(logits, vocab, partial_bits);
    if (best == NO_TOKEN || slot.temperature == 0.0f || slot.top_k == 1) {
        return best;
    }
    float highest = logits[best];
    double inverse = 1.0 / static_cast<double>(slot.temperature);
    auto likelihood = [&](int token) { return exp(static_cast<double>(logits[token] - highest) * inverse); };
    double random = uniform(slot.seed, position);
    bool filtered = slot.top_k != 0 || slot.top_p < 1.0f || slot.min_p > 0.0f || slot.typical_p < 1.0f;
    if (!filtered) {
        // The order is that of tokens.
        double total = vocabulary_sum(vocab, partial, likelihood);
        auto rank = [](int) { return 0ull; };
        return find_cut(vocab, partial, 0, rank, likelihood, random * total, true).token;
    }

    // The order is that of logits, the highest first.
    auto rank = [&](int token) { return static_cast<u64>(~ordered(logits[token])); };
    Cut by_count = keep_all();
    if (slot.top_k != 0) {
        auto counts = [&](int token) { return logits[token] > -INFINITY_F ? 1.0 : 0.0; };
        by_count = find_cut(vocab, partial, 32, rank, counts, static_cast<double>(slot.top_k), false);
    }
    auto counted = [&](int token) { return by_count.keeps(rank(token), token) ? likelihood(token) : 0.0; };

    // Typical: the order is that of the distance between a token's surprise and the entropy.
    Cut by_surprise = keep_all();
    double total = 0.0, entropy = 0.0;
    auto surprise = [&](int token) { return -log(fmax(counted(token) / total, 2.2250738585072014e-308)); };
    auto distance = [&](int token) {
        return static_cast<u64>(__double_as_longlong(fabs(surprise(token) - entropy)));
    };
    if (slot.typical_p < 1.0f) {
        total = vocabulary_sum(vocab, partial, counted);
        entropy = vocabulary_sum(vocab, partial,
                                 [&](int token) { return counted(token) / total * surprise(token); });
        by_surprise = find_cut(vocab, partial, 64, distance, counted, static_cast<double>(slot.typical_p) * total, false);
    }
    auto typical = [&](int token) {
        double weight = counted(token);
        bool kept = weight > 0.0 && (slot.typical_p >= 1.0f || by_surprise.keeps(distance(token), token));
        return kept ? weight : 0.0;
    };

    Cut by_share = keep_all();
    if (slot.top_p < 1.0f) {
        double kept = vocabulary_sum(vocab, partial, typical);
        by_share = find_cut(vocab, partial, 32, rank, typical, static_cast<double>(slot.top_p) * kept, false);
    }
    auto shared = [&](int token) { return by_share.keeps(rank(token), token) ? typical(token) : 0.0; };

    double least = 0.0;
    if (slot.min_p > 0.0f) {
        double likeliest = 0.0;
        for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
            likeliest = fmax(likeliest, shared(token));
        }
        least = static_cast<double>(slot.min_p) * block_max(likeliest, partial, 0.0);
    }
    auto kept = [&](int token) {
        double weight = shared(token);
        return weight >= least ? weight : 0.0;
    };
    double target = random * vocabulary_sum(vocab, partial, kept);
    return find_cut(vocab, partial, 32, rank, kept, target, true).token;
}

KERNEL_OF(512, answer, const Want *wants, Slot *slots, u32 *seen, const u32 *masks, const float *logits, int stride,
          int vocab, float *scratch, u32 *tokens, float *logprobs, u32 *top_tokens, float *top_logprobs,
          int top_stride) {
    __shared__ double partial[32];
    __shared__ u64 partial_bits[32];
    Want want = wants[blockIdx.x];
    const float *row = logits + static_cast<size_t>(blockIdx.x) * stride;
    u32 token = NO_TOKEN;
    if (want.flags & WANT_SAMPLE) {
        Slot slot = slots[want.slot];
        float *processed = scratch + static_cast<size_t>(blockIdx.x) * stride;
        u32 *history = seen + static_cast<size_t>(want.slot) * vocab;
        process(slot, history, want.flags & WANT_MASKED ? masks + want.mask : nullptr, row, vocab, processed);
        token = sample(slot, processed, vocab, want.position, partial, partial_bits);
        if (threadIdx.x == 0) {
            tokens[blockIdx.x] = token;
            if (token != NO_TOKEN) {
                slots[want.slot].generated = slot.generated + 1;
                if (slot.has_penalties) {
                    history[token] += 2;
                }
            }
        }
    }
    bool scores = want.flags & WANT_SCORE;
    bool reports = scores || ((want.flags & WANT_LOGPROB) && token != NO_TOKEN);
    if (!reports && want.top == 0) {
        return;
    }
    float highest = -INFINITY_F;
    for (int at = threadIdx.x; at < vocab; at += blockDim.x) {
        highest = fmaxf(highest, row[at]);
    }
    highest = static_cast<float>(block_max(static_cast<double>(highest), partial, -static_cast<double>(INFINITY_F)));
    double sum = vocabulary_sum(vocab, partial, [&](int at) { return exp(static_cast<double>(row[at] - highest)); });
    double total = static_cast<double>(highest) + log(sum);
    if (reports && threadIdx.x == 0) {
        logprobs[blockIdx.x] = static_cast<float>(static_cast<double>(row[scores ? want.target : token]) - total);
    }
    // The most likely tokens, each the best of those behind the one before.
    u64 before = ~0ull;
    for (u32 place = 0; place < want.top; place++) {
        u64 next = 0;
        for (int at = threadIdx.x; at < vocab; at += blockDim.x) {
            u64 entry = static_cast<u64>(ordered(row[at])) << 32 | (NO_TOKEN - at);
            if (entry < before && entry > next) {
                next = entry;
            }
        }
        before = block_max(next, partial_bits, u64(0));
        if (threadIdx.x == 0) {
            u32 best = NO_TOKEN - static_cast<u32>(before);
            size_t at = static_cast<size_t>(blockIdx.x) * top_stride + place;
            top_tokens[at] = before ? best : NO_TOKEN;
            top_logprobs[at] = before ? static_cast<float>(static_cast<double>(row[best]) - total) : -INFINITY_F;
        }
    }
}
