"""Server process: sockets, signals, the embedded granian, draining and exit codes.

It is handed apps and models by `build`, and knows nothing of how they work.
"""
