"""The only composition root: Settings in, the parts of a running service out."""
