"""What a job costs, in bytes: `memory` that a rank keeps, `wire` that it sends. No torch; one place for each formula.

`plan.estimate` asks for every parameter of a model, `ds_fp8 estimate` for a number of parameters of one kind.
"""
