"""The torch backend: CUDA devices, and CPUs so that the same code can be tested anywhere.

`device` chooses what to run on and needs no torch; `backend` holds `TorchBackend` and does.
"""
