"""The wire between API processes and the one engine process: an `Embedder` at a distance.

It knows frames, and the values of `core` that they carry; not who asks over HTTP, what batches are
made of, or which process starts which.
"""
