// The backend's kernels, compiled for the emulator: each file once for every format that it is written for.

#include "cuemu.h"

#include "../kernels/elementwise.cu"
#include "../kernels/norm.cu"
#include "../kernels/pack.cu"
#include "../kernels/rope.cu"
#include "../kernels/route.cu"
#include "../kernels/sample.cu"
#include "../kernels/slot.cu"

#define ELEMENT F32
#include "../kernels/attention.cu"
#undef ELEMENT
#define ELEMENT F16
#include "../kernels/attention.cu"
#include "../kernels/decode.cu"
#include "../kernels/prefill.cu"
#undef ELEMENT
#define ELEMENT BF16
#include "../kernels/attention.cu"
#include "../kernels/decode.cu"
#include "../kernels/prefill.cu"
#undef ELEMENT
#define ELEMENT F8_E4M3
#include "../kernels/attention.cu"
#include "../kernels/decode.cu"
#include "../kernels/prefill.cu"
#undef ELEMENT
#include "../kernels/combine.cu"

#define FORMAT F32
#include "../kernels/embed.cu"
#include "../kernels/linear.cu"
#undef FORMAT
#define FORMAT F16
#include "formats.inc"
#define FORMAT BF16
#include "formats.inc"
#define FORMAT Q4_0
#include "quantized.inc"
#define FORMAT Q4_1
#include "quantized.inc"
#define FORMAT Q5_0
#include "quantized.inc"
#define FORMAT Q5_1
#include "quantized.inc"
#define FORMAT Q8_0
#include "quantized.inc"
#define FORMAT Q2_K
#include "quantized.inc"
#define FORMAT Q3_K
#include "quantized.inc"
#define FORMAT Q4_K
#include "quantized.inc"
#define FORMAT Q5_K
#include "quantized.inc"
#define FORMAT Q6_K
#include "quantized.inc"
