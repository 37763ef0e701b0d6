// The casts of one path. Compiled with -DPATH_TABLE=path_avx512 -DADAM_RANGE=adam_avx512 and that path's flags, and so on.
#include "path.h"

#include "tiles.h"

namespace {

// Calls body<D, F>(job, first, last) for the run-time dtype and format of the job.
#define FOR_DTYPE_AND_FORMAT(NAME, JOB, BODY)                                                   \
    void NAME(const void* data, int64_t first, int64_t last) {                                  \
        const JOB& job = *static_cast<const JOB*>(data);                                        \
        switch (job.dtype * 2 + job.fmt) {                                                      \
            case FP32 * 2 + E4M3: return BODY<Fp32, E4m3>(job, first, last);                    \
            case FP32 * 2 + E5M2: return BODY<Fp32, E5m2>(job, first, last);                    \
            case BF16 * 2 + E4M3: return BODY<Bf16, E4m3>(job, first, last);                    \
            case BF16 * 2 + E5M2: return BODY<Bf16, E5m2>(job, first, last);                    \
            case FP16 * 2 + E4M3: return BODY<Fp16, E4m3>(job, first, last);                    \
            case FP16 * 2 + E5M2: return BODY<Fp16, E5m2>(job, first, last);                    \
        }                                                                                       \
    }

FOR_DTYPE_AND_FORMAT(quantize, QuantizeJob, quantize_range)
FOR_DTYPE_AND_FORMAT(dequantize, DequantizeJob, dequantize_range)
FOR_DTYPE_AND_FORMAT(flat_encode, FlatEncodeJob, flat_encode_range)
FOR_DTYPE_AND_FORMAT(flat_sum, FlatSumJob, flat_sum_range)
FOR_DTYPE_AND_FORMAT(tile_quantize, TileJob, tile_quantize_range)
FOR_DTYPE_AND_FORMAT(tile_dequantize, TileJob, tile_dequantize_range)

}  // namespace

#define TEXT(x) #x
#define NAME_OF(x) TEXT(x)
extern const Path PATH_TABLE = {NAME_OF(PATH), {quantize, dequantize, flat_encode, flat_sum, tile_quantize, tile_dequantize}};
