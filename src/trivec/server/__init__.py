"""The life of the process: listen, load, serve, drain, leave; and a parent that starts it again.

Knows sockets, signals and exit codes. It is handed apps and engines by `assemble` and must not
know how any of them works.
"""
