"""Backends: each folder turns packed batches into vectors on one kind of device.

A backend knows its device, its memory and its one model; no requests, queues or time. It is called
from one thread a slot, returns float32 on the host, and keeps the order given.
"""
