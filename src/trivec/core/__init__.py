"""The nouns, the seams, the errors and the events.

Only the standard library and numpy; no input or output; importing it starts nothing.
"""
