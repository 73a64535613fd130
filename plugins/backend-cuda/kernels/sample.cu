// From a row of logits to what a want asks for. The reference is `setu_core::sampling`: the same steps in the
// same order. Likelihoods are whole numbers here, in units of the likeliest token's 2^-42: see search.cuh. A block answers
// one want.

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

// Whether anything but the temperature changes the logits of a slot.
__device__ __forceinline__ bool is_processed(const Slot &slot, const u32 *mask) {
    return slot.biased || slot.has_penalties || (slot.generated < slot.min_tokens && slot.suppressed) || mask;
}

// Writes the logits as bias, penalties, suppression and mask change them to `out`.
__device__ __forceinline__ void process(const Slot &slot, const u32 *seen, const u32 *mask, const float *logits, int vocab,
                        float *out) {
    each_token(logits, vocab, [&](int token, float logit) { out[token] = logit; });
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
    each_token(logits, vocab, [&](int token, float logit) {
        if (logit != logit) {
            best = ~0ull;
        } else if (logit > -INFINITY_F) {
            // Zeros of either sign are equal.
            u64 entry = static_cast<u64>(ordered(logit + 0.0f)) << 32 | (NO_TOKEN - token);
            best = entry > best ? entry : best;
        }
    });
    best = block_max(best, partial, u64(0));
    return best == 0 || best == ~0ull ? NO_TOKEN : NO_TOKEN - static_cast<u32>(best);
}

// The weight of the likeliest token. The sum of a vocabulary's is far below 2^64.
constexpr float HIGHEST_WEIGHT = 4398046511104.0f;
// Bins of a natural logarithm's unit that a search begins with.
constexpr float BINS_PER_NAT = 8.0f;

// The part of a sum of weights, in whole numbers from 1 to the sum.
__device__ __forceinline__ u64 part_of(double share, u64 sum, bool over) {
    double part = share * static_cast<double>(sum);
    u64 whole = over ? static_cast<u64>(part) + 1 : static_cast<u64>(ceil(part));
    return whole < 1 ? 1 : whole < sum ? whole : sum;
}

// A probability's surprise. Not inlined: it is long, and rarely needed.
__device__ NOT_INLINED double surprise_of(double share) { return -log(fmax(share, 2.2250738585072014e-308)); }

// Samples from processed logits.
__device__ __forceinline__ u32 sample(const Slot &slot, const float *logits, int vocab, u64 position, Search &search) {
    u32 best = argmax(logits, vocab, search.partial);
    if (best == NO_TOKEN || slot.temperature == 0.0f || slot.top_k == 1) {
        return best;
    }
    float highest = logits[best], inverse = fminf(1.0f / slot.temperature, 1e30f);
    auto likelihood = [&](int, float logit) {
        return static_cast<u64>(expf((logit - highest) * inverse) * HIGHEST_WEIGHT);
    };
    double random = uniform(slot.seed, position);
    bool filtered = slot.top_k != 0 || slot.top_p < 1.0f || slot.min_p > 0.0f || slot.typical_p < 1.0f;
    if (!filtered) {
        // The order is that of tokens.
        u64 total = weight_sum(logits, vocab, search, likelihood);
        return find_token(logits, vocab, search, part_of(random, total, true), likelihood);
    }

    // The order is that of logits, the highest first.
    auto key = [&](int, float logit) { return highest - logit; };
    float per_unit = BINS_PER_NAT * inverse;
    Cut by_count = keep_all();
    if (slot.top_k != 0) {
        auto counts = [&](int, float logit) { return logit > -INFINITY_F ? u64(1) : u64(0); };
        u64 all = weight_sum(logits, vocab, search, counts);
        by_count = find_cut(logits, vocab, search, slot.top_k < all ? slot.top_k : all, per_unit, key, counts);
    }
    auto counted = [&](int token, float logit) {
        return by_count.keeps(__float_as_uint(key(token, logit)), token) ? likelihood(token, logit) : 0;
    };

    // Typical: the order is that of the distance between a token's surprise and the entropy.
    Cut by_surprise = keep_all();
    double total = 0.0, entropy = 0.0;
    auto surprise = [&](u64 weight) { return surprise_of(static_cast<double>(weight) / total); };
    auto distance = [&](int token, float logit) {
        return static_cast<float>(fabs(surprise(counted(token, logit)) - entropy));
    };
    if (slot.typical_p < 1.0f) {
        u64 sum = weight_sum(logits, vocab, search, counted);
        total = static_cast<double>(sum);
        double terms = 0.0;
        each_token_in_turn(logits, vocab, [&](int token, float logit) {
            u64 weight = counted(token, logit);
            terms += static_cast<double>(weight) / total * surprise(weight);
        });
        entropy = block_sum(terms, reinterpret_cast<double *>(search.partial));
        u64 wanted = part_of(slot.typical_p, sum, false);
        by_surprise = find_cut(logits, vocab, search, wanted, BINS_PER_NAT, distance, counted);
    }
    auto typical = [&](int token, float logit) {
        u64 weight = counted(token, logit);
        bool kept = weight && (slot.typical_p >= 1.0f ||
                               by_surprise.keeps(__float_as_uint(distance(token, logit)), token));
        return kept ? weight : 0;
    };

    Cut by_share = keep_all();
    if (slot.top_p < 1.0f) {
        u64 wanted = part_of(slot.top_p, weight_sum(logits, vocab, search, typical), false);
        by_share = find_cut(logits, vocab, search, wanted, per_unit, key, typical);
    }
    auto shared = [&](int token, float logit) {
        return by_share.keeps(__float_as_uint(key(token, logit)), token) ? typical(token, logit) : 0;
    };

    u64 least = 0;
    if (slot.min_p > 0.0f) {
        u64 likeliest = 0;
        each_token_in_turn(logits, vocab, [&](int token, float logit) {
            u64 weight = shared(token, logit);
            likeliest = weight > likeliest ? weight : likeliest;
        });
        likeliest = block_max(likeliest, search.partial, u64(0));
        least = static_cast<u64>(ceil(static_cast<double>(slot.min_p) * static_cast<double>(likeliest)));
    }
    auto kept = [&](int token, float logit) {
        u64 weight = shared(token, logit);
        return weight >= least ? weight : 0;
    };
    u64 wanted = part_of(random, weight_sum(logits, vocab, search, kept), true);
    return find_cut(logits, vocab, search, wanted, per_unit, key, kept).token;
}

KERNEL_OF(512, answer, const Want *wants, Slot *slots, u32 *seen, const u32 *masks, const float *logits, int stride,
          int vocab, float *scratch, u32 *tokens, float *logprobs, u32 *top_tokens, float *top_logprobs,
          int top_stride) {
    wait_for_launches_before();
    __shared__ Search search;
    Want want = wants[blockIdx.x];
    const float *row = logits + static_cast<size_t>(blockIdx.x) * stride;
    u32 token = NO_TOKEN;
    if (want.flags & WANT_SAMPLE) {
        Slot slot = slots[want.slot];
        const float *processed = row;
        u32 *history = seen + static_cast<size_t>(want.slot) * vocab;
        const u32 *mask = want.flags & WANT_MASKED ? masks + want.mask : nullptr;
        if (is_processed(slot, mask)) {
            float *changed = scratch + static_cast<size_t>(blockIdx.x) * stride;
            process(slot, history, mask, row, vocab, changed);
            processed = changed;
        }
        token = sample(slot, processed, vocab, want.position, search);
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
    double *partial = reinterpret_cast<double *>(search.partial);
    float highest = -INFINITY_F;
    each_token(row, vocab, [&](int, float logit) { highest = fmaxf(highest, logit); });
    highest = static_cast<float>(block_max(static_cast<double>(highest), partial, -static_cast<double>(INFINITY_F)));
    double sum = 0.0;
    each_token(row, vocab, [&](int, float logit) { sum += static_cast<double>(expf(logit - highest)); });
    double total = static_cast<double>(highest) + log(block_sum(sum, partial));
    if (reports && threadIdx.x == 0) {
        logprobs[blockIdx.x] = static_cast<float>(static_cast<double>(row[scores ? want.target : token]) - total);
    }
    // The most likely tokens, each the best of those behind the one before.
    u64 before = ~0ull;
    for (u32 place = 0; place < want.top; place++) {
        u64 next = 0;
        each_token(row, vocab, [&](int at, float logit) {
            u64 entry = static_cast<u64>(ordered(logit)) << 32 | (NO_TOKEN - at);
            if (entry < before && entry > next) {
                next = entry;
            }
        });
        before = block_max(next, search.partial, u64(0));
        if (threadIdx.x == 0) {
            u32 best = NO_TOKEN - static_cast<u32>(before);
            size_t at = static_cast<size_t>(blockIdx.x) * top_stride + place;
            top_tokens[at] = before ? best : NO_TOKEN;
            top_logprobs[at] = before ? static_cast<float>(static_cast<double>(row[best]) - total) : -INFINITY_F;
        }
    }
}
