// What Python and C++ say to each other: one struct of pointers and sizes for each operation (a job), and one
// function that runs it over a range of its units (blocks of 128 elements, rows, or tiles).
//
// The same structs are spelled in jobs.py as ctypes.Structure; `ds_fp8_job_bytes` lets the two be compared at load.
// All fields are 8 bytes wide, or come in pairs of 4, so that no compiler pads them differently.
#pragma once

#include <stdint.h>

constexpr int BLOCK = 128;

enum Dtype : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };
enum Fp8 : int32_t { E4M3 = 0, E5M2 = 1 };

// Per tensor: quantized = sat(x * scale), amax of x on the way. Unit: block of 128.
struct QuantizeJob {
    const void* x;
    uint8_t* quantized;      // null: amax only
    const float* scale;  // null: 1
    uint32_t* amax;      // bits of |x|'s maximum, NaN on top; null: not wanted
    int64_t numel;
    int32_t dtype, fmt;
};

// out = quantized * scale_inv, rounded to dtype. Unit: block of 128.
struct DequantizeJob {
    const uint8_t* quantized;
    const float* scale_inv;  // one for all, or one per block (flat)
    void* out;
    int64_t numel;
    int32_t dtype, fmt;
    int32_t per_block, streaming;
};

// Flat partition: quantized values and one scale_inv per block of 128. Unit: block.
struct FlatEncodeJob {
    const void* x;
    uint8_t* quantized;
    float* scale_inv;
    int64_t numel;
    int32_t dtype, fmt;
    int32_t stochastic;
    uint32_t key;    // mix(seed ^ mix(step ^ mix(stream))), see rounding.h
    uint32_t first;  // number of the first element, for the random bits
    int32_t best_of_two;  // the better of two scales for each block; not with `stochastic`
};

// out = factor * (own + sum over contributions, in order); and/or the same encoded again. Unit: block.
struct FlatSumJob {
    const void* own;         // [numel], not encoded; null: none
    const uint8_t* quantized;    // [contributions, numel], rows `quantized_stride` apart
    const float* scale_inv;  // [contributions, blocks], rows `scale_stride` apart
    void* out;               // null: not wanted
    uint8_t* quantized_out;      // null: not wanted
    float* out_scale_inv;
    int64_t quantized_stride, scale_stride;
    int64_t numel, contributions;
    int32_t dtype, fmt;
    float factor;
    int32_t out_fmt;
    int32_t own_dtype, best_of_two;
};

// GEMM operands: tiles of `tile_rows` x 128 elements share a scale; 1 row for activations, 128 for weights.
// Unit: one row of tiles.
struct TileJob {
    void* x;  // read by quantize, written by dequantize
    uint8_t* quantized;
    float* scale_inv;  // [ceil(rows / tile_rows), ceil(columns / 128)]
    int64_t rows, columns;
    int64_t tile_rows;
    int32_t dtype, fmt;
    int32_t power_of_two, unused;
};

enum StateFormat : int32_t { STATE_FP32, STATE_BF16, STATE_FP16, STATE_E4M3, STATE_EXPANDED, STATE_INT8 };
enum MasterFormat : int32_t { MASTER_OWN, MASTER_FP32, MASTER_SPLIT32, MASTER_SPLIT24, MASTER_FP16 };

struct State {
    void* data;
    float* scale_inv;    // one per block; fp16, e4m3, expanded, int8
    uint8_t* expansion;  // one per block; expanded
    int32_t format;
    uint32_t key;  // of its random bits
};

// Square roots of `count` floats as torch makes them: MKL's vmsSqrt, with the mode that torch gives it.
typedef void (*TorchSqrt)(int count, const float* x, float* roots, int64_t mode);

// One step of Adam on a flat partition. Unit: block.
struct AdamJob {
    void* param;
    const void* grad;
    const float* grad_scale;  // one number
    State exp_avg, exp_avg_sq, master;  // master: expansion unused
    const float* expansion_table;  // [256, 128]
    TorchSqrt torch_sqrt;          // null: the correctly rounded root
    int64_t torch_sqrt_mode;
    int64_t numel;
    int32_t param_dtype, grad_dtype;
    int32_t stochastic;
    float decay, l2, beta2, one_minus_beta1, one_minus_beta2, bias_correction2_sqrt, eps, step_size;
    float inverse_correction2_sqrt;  // 1 / bias_correction2_sqrt, which multiplies unless `divides`
    int32_t divides, unused;
};
