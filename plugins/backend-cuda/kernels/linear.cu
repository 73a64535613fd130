// Linear layers and experts, for one weight format.
//
// A block's warps take neighbouring outputs of the same tokens. Launches with a single token have a kernel of their
// own, the others take four or eight tokens at a time.

#include "linear.cuh"

#define DEFINE_LINEAR(NAME, TOKENS)                                                                                    \
    KERNEL_OF(128, NAME, Product product) { linear<FORMAT, TOKENS>(product); }

DEFINE_LINEAR(JOIN(linear_one, FORMAT), 1)
DEFINE_LINEAR(JOIN(linear_few, FORMAT), 4)
DEFINE_LINEAR(JOIN(linear_many, FORMAT), 8)

#undef DEFINE_LINEAR
