"""From a model's name to verified arrays: catalogue, hub or folder, file formats, hashes.

It knows files, formats, hashes and the names of weights; not layers, devices or who calls.
Nothing is opened before its hash is known; every weight is used once or is on the ignore list.
"""
