"""HTTP surface: routes, schemas, encodings, one error table, middleware.

Knows status codes, headers and OpenAI's words; must not know engines, devices or SQL: it is given
an `Embedder` a model, an `Accounts`, `Batches`, and two callables for health and metrics.
"""

from trivec.api.app import build_app
from trivec.api.batches import answer_line
from trivec.api.context import AppState
from trivec.api.memory import ByteBudget, budget_bytes

__all__ = ["AppState", "ByteBudget", "answer_line", "budget_bytes", "build_app"]
