"""When a drifting Brownian motion first reaches a level: the inverse Gaussian law, in closed form.

For a distance d to the level, drift m > 0 towards it and sigma per sqrt(step), the time of first passage is
inverse Gaussian with mean d / m and shape d^2 / sigma^2 (Schroedinger 1915; Folks and Chhikara 1978). Written
here with `math.erfc` alone: scipy would cost every `diagnostics list` a fifth of a second at import.
"""

import math

HALVINGS = 60
"""Of the bracket of ln t: from 1e12 down to a relative error far below 1e-9."""
FAR = 25.0
"""exp(x^2) erfc(x) is taken from its asymptotic series from here on; erfc underflows at 27."""


def first_passage_cdf(time: float, distance: float, drift: float, sigma: float) -> float:
    """Probability that the level has been reached by `time`.

    Args:
        time: steps from now, > 0.
        distance: to the level, > 0.
        drift: towards the level per step; below 0 the level may never be reached.
        sigma: standard deviation of the increments per sqrt(step), > 0.
    """
    assert time > 0
    assert distance > 0
    assert sigma > 0
    spread = sigma * math.sqrt(time)
    short = (distance - drift * time) / spread
    # The reflected term exp(2 m d / sigma^2) Phi(-long) overflows before it is multiplied; with
    # long^2 = short^2 + 4 m d / sigma^2 it is exp(-short^2 / 2) times a scaled erfc, which never does.
    long = (distance + drift * time) / spread
    direct = 0.5 * math.erfc(short / math.sqrt(2))
    if long >= 0:
        return direct + 0.5 * math.exp(-short * short / 2) * _scaled_erfc(long / math.sqrt(2))
    return direct + math.exp(2 * drift * distance / sigma**2) * 0.5 * math.erfc(long / math.sqrt(2))


def hit_probability(distance: float, drift: float, sigma: float) -> float:
    """Probability that the level is ever reached: 1 with a drift towards it, else exp(-2 |m| d / sigma^2)."""
    return 1.0 if drift >= 0 else math.exp(2 * drift * distance / sigma**2)


def first_passage_quantile(level: float, distance: float, drift: float, sigma: float) -> float:
    """Steps within which the level is reached with probability `level`; inf where that is never so likely.

    Args:
        level: probability in (0, 1).
        distance: to the level, > 0.
        drift: towards the level per step.
        sigma: standard deviation of the increments per sqrt(step), > 0.
    """
    if drift <= 0 and hit_probability(distance, drift, sigma) <= level:
        return math.inf
    # The scales of the law, from diffusion alone and from drift alone: the answer lies around them.
    scale = distance / drift if drift > 0 else (distance / sigma) ** 2
    low, high = math.log(scale) - 1.0, math.log(scale) + 1.0
    while first_passage_cdf(math.exp(low), distance, drift, sigma) > level:
        low -= high - low
    while first_passage_cdf(math.exp(high), distance, drift, sigma) < level:
        high += high - low
        if high > math.log(1e300):
            return math.inf
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if first_passage_cdf(math.exp(middle), distance, drift, sigma) < level:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _scaled_erfc(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0."""
    if x < FAR:
        return math.exp(x * x) * math.erfc(x)
    inverse = 1 / (2 * x * x)
    return (1 - inverse * (1 - 3 * inverse)) / (x * math.sqrt(math.pi))
