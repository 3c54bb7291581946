"""The rates of the survey of Cheng et al. 2018 (arXiv 1710.09282), section VII."""

from __future__ import annotations


def compression_rate(a: float, a_star: float) -> float:
    """Return a / a*, for `a` parameters of the original and `a_star` of the compressed model."""
    return _ratio(a, a_star)


def index_space_saving(a: float, a_star: float, *, printed: bool = False) -> float:
    """Return (a - a*) / a, the share of the index space that is saved.

    The survey prints (a - a*) / a*, which is no share: ten times smaller gives 9 where 0.9 is saved. `printed=True`
    gives that figure.
    """
    return _ratio(a - a_star, a_star if printed else a)


def speed_up_rate(s: float, s_star: float) -> float:
    """Return s / s*, for the running time `s` of the original and `s_star` of the compressed model."""
    return _ratio(s, s_star)


def _ratio(numerator: float, denominator: float) -> float:
    if denominator <= 0:
        raise ValueError(f"a rate needs a positive denominator, not {denominator}")
    return numerator / denominator
