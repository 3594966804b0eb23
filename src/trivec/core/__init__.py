"""Values, ports, errors and events, which every other package may import.

Only the standard library and numpy; no input or output; importing it starts nothing.
"""
