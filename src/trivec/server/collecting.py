"""How the garbage collector of a process is set once its models are loaded."""

import gc

YOUNG_OBJECTS_MAX = 10_000  # allocations between two looks for cycles, of which a request makes few


def spare_what_stays() -> None:
    """Tell the collector that what is loaded stays: it need not be walked again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 20, 20)
