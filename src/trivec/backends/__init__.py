"""The devices: each folder turns a packed batch into vectors on one kind of device.

A backend knows its device, its memory and its one model; not who asks, what waits, or the time.
It is called from one thread a slot, returns float32 on the host, and keeps the order given.
"""
