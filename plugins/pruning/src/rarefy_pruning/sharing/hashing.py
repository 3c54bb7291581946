"""A hash that gives the same buckets and signs on every platform."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_CHUNK = 1 << 20


def splitmix64(seed: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the outputs `start` to `start + count` of the generator SplitMix64 (Steele et al. 2014).

    Output n is a bijective mix of `seed + (n + 1) * golden` modulo 2^64, so each can be had without the ones before.
    Unsigned arithmetic of numpy wraps around by definition, which signed and floating arithmetic do not.
    """
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def signed_buckets(weights: int, buckets: int, seed: int) -> npt.NDArray[np.int32]:
    """Return for weight n its bucket h(n), below `buckets`, plus `buckets` where its sign xi(n) is -1; `(weights,)`.

    The upper 32 bits of the hash choose the bucket (scaled, so no bucket is preferred by more than one part in
    2^32 / buckets) and the lowest bit the sign; the two are independent as the bits of a good mix are.
    """
    found = np.empty(weights, dtype=np.int32)
    for start in range(0, weights, _CHUNK):
        hashed = splitmix64(seed, start, min(_CHUNK, weights - start))
        bucket = ((hashed >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
        negative = (hashed & np.uint64(1)) * np.uint64(buckets)
        found[start : start + len(hashed)] = bucket + negative
    return found
