"""Models: each architecture described once, as a forward pass over a dozen coarse ops.

A family is one file; `registry` finds it by `model_type`, and each backend implements `ops.Ops`.
"""
