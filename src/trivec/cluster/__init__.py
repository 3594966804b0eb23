"""Ray: the service as a Ray Serve application, and bulk work on a Ray cluster.

The only package that knows Ray, which schedules, restarts and places; nothing here does.
"""
