"""The Transformer Engine backend: te.Linear, te.LayerNorm and te.RMSNorm around the model's own Parameters.

    names.py             the library, resolved and compared with what we count on
    scaling.py           our recipe as one of its recipes
    linear.py            te.Linear with its own autocast in each call, and scales from the FP8 state
    products.py          override_linear_precision, which it dropped
    quantized_weight.py  a weight that travelled in quantized form (O3), as te.Linear's own
    norms.py             its norms

Importing this package does not import Transformer Engine.
"""
