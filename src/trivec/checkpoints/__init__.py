"""Checkpoints: from a model's name to verified arrays.

Files, formats, hashes and the names of weights are known here; not layers, devices or callers.
Nothing is opened before its hash is known; every weight is used once, or is on the family's list
of unused ones.
"""

from trivec.checkpoints.checkpoint import Checkpoint, find_folder, open_checkpoint, open_own

__all__ = ["Checkpoint", "find_folder", "open_checkpoint", "open_own"]
