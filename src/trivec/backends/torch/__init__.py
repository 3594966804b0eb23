"""The encoder on torch: CUDA devices, and CPUs so that the same code can be tested anywhere.

`device` says what to run on and needs no torch; `backend` is the seam and does. It knows one model
and its devices' memory; not who asks, what waits, or the time.
"""
