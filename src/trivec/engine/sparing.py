"""When the last free core is worth more to those who ask than to what they asked for. Pure.

On a CPU the slots are the cores, and the event loop has none of its own. Where a request costs the
device little more than it costs HTTP, another slot for a short row takes the loop's core, and cuts
what would have been one row in two (decision 0044).
"""

REQUEST_S_MAX = 0.006  # of device time; HTTP takes about a tenth of it
ROW_SHARE = 1 / 3  # of a full row; what waits is worth a core when it makes that much
SHORT_ROW_S_MAX = 0.02  # a slow model's rows are never short


def time_to_spare_s(
    *, request_count: int, waiting_s: float, row_s: float, ends_in_s: float
) -> float:
    """How long to leave what waits to a slot at work, in seconds; 0 when to take it now.

    *waiting_s* is what one slot would need for the *request_count* requests in line, *row_s* what a
    full row takes, and *ends_in_s* when the first of the slots at work should be through: negative
    when it should have been. It is waited for no longer than twice a short row.
    """
    short_row_s = min(ROW_SHARE * row_s, SHORT_ROW_S_MAX)
    is_short = waiting_s < min(short_row_s, request_count * REQUEST_S_MAX)
    if not is_short or ends_in_s >= short_row_s:
        return 0.0
    return max(0.0, ends_in_s + short_row_s)
