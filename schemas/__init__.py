"""JSON Schemas as files: ours (`ds_fp8.schema.json`) and DeepSpeed's own configuration (`deepspeed.schema.json`).

They travel in the wheel as the package `ds_fp8.schemas`; in a checkout they lie at the top level. `ds_fp8.config`
validates against them, and an editor that is given `"$schema"` completes and checks while one types.
`generate_deepspeed.py` rewrites the second file from an installed DeepSpeed.
"""
