"""Checkpoints: from a model's name to verified arrays.

This package knows files, formats, hashes and the names of weights; not layers, devices or its
callers. Nothing is opened before its hash is known; every weight is used once or is on the
family's list of unused ones.
"""

from trivec.checkpoints.checkpoint import (
    Checkpoint,
    find_folder,
    find_own,
    open_checkpoint,
    open_own,
)

__all__ = ["Checkpoint", "find_folder", "find_own", "open_checkpoint", "open_own"]
