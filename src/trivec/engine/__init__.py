"""One model's line, the choice of what runs together, and the threads that run it.

It knows lines, budgets, deadlines and waiters; no HTTP, keys, money, torch or OpenVINO. Tokens in
line never exceed the bound, and every admitted request gets exactly one answer.
"""

from trivec.engine.engine import Engine
from trivec.engine.heartbeat import Heartbeat
from trivec.engine.worker import Workers

__all__ = ["Engine", "Heartbeat", "Workers"]
