"""What is counted, logged and traced of what happened.

It knows names, labels and buckets; it does not know how anything works. Each event is counted once,
in one class; every label value comes from a closed set, so no client can grow a page or a bill.
"""

from trivec.telemetry.log import RequestLog, configure_log, finish_log, lines_dropped
from trivec.telemetry.metrics import Metrics
from trivec.telemetry.observers import Observers
from trivec.telemetry.pages import merged_pages
from trivec.telemetry.tracing import Tracing

__all__ = [
    "Metrics",
    "Observers",
    "RequestLog",
    "Tracing",
    "configure_log",
    "finish_log",
    "lines_dropped",
    "merged_pages",
]
