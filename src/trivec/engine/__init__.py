"""Serving engine: a request queue a model, a scheduler, and the worker threads of one device.

It knows queues, batch budgets, deadlines and futures; no HTTP, keys, money, torch or OpenVINO.
Tokens in a queue never exceed the limit, and every admitted request gets exactly one reply.
"""

from trivec.engine.engine import Engine
from trivec.engine.worker import Workers

__all__ = ["Engine", "Workers"]
