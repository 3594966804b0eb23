"""When a refused client should come back, spread so that not all come at once."""

RETRY_S_MIN = 5.0  # official clients retry twice: told 1 s, they give up after three
RETRY_S_MAX = 60.0  # and told more than a minute they do not wait at all
SPREAD = 0.5  # the last of those refused at one moment comes back this much later than the first


def spread_retry_s(wait_s: float, share: float) -> float:
    """*wait_s*, at least 5, and up to half as much more by *share* in [0, 1); at most 60."""
    return min(max(wait_s, RETRY_S_MIN), RETRY_S_MAX / (1 + SPREAD)) * (1 + SPREAD * share)
