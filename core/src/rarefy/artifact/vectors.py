"""Lossless coding of tensors in which vectors of consecutive elements repeat, as vector quantization leaves them.

The entries of each index of the first dimension are a row, and a row is cut into vectors. Neighbouring places of a row
form a block, and each block has its own dictionary of vectors, as product quantization leaves them; often there is one
block. A part is, as base-128 varints, the elements of a vector and the number of blocks; then for each block the number
of its distinct vectors and, each with its length, a section with these, one after the other, and a section with the
rank of each vector of the block among them, in one byte or two (see `symbols`).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rarefy.artifact.bits import Bits, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.symbols import read_section, section
from rarefy.errors import ArtifactError

LENGTHS = (2, 3, 4, 6, 8, 9, 16, 25, 32)
MOST_VECTORS = 65536
_SAMPLE = 4096
_MOST_DISTINCT = 0.75
"""Share of distinct vectors at which repetition is not worth looking for."""
_MOST_BLOCKS = 64
"""Most blocks that are tried, beside as many as there are places."""
_HOPELESS = 1.5
"""How far an estimate may exceed what the other ways take; vectors and ranks may be coded in fewer bytes."""
_BLOCK_BYTES = 8
"""What a block costs beside its vectors and ranks, roughly."""


def block_edges(places: int, blocks: int) -> list[int]:
    """Return where each of `blocks` nearly equal blocks of the places of a row begins, and where the last ends."""
    return [block * places // blocks for block in range(blocks + 1)]


def encode(bits: Bits, shape: tuple[int, ...], limit: int | None = None) -> bytes | None:
    """Return the coded elements, or None when they would not become smaller than `limit` bytes, or than they are."""
    most = bits.nbytes if limit is None else min(limit, bits.nbytes)
    width = bits.size // shape[0] if shape and shape[0] else 0
    lengths = [length for length in LENGTHS if width >= length and width % length == 0]
    parts = [part for length in lengths for part in _encoded(bits.reshape(-1, width // length, length), most)]
    smallest = min(parts, key=len, default=None)
    return smallest if smallest is not None and len(smallest) < most else None


def decode(part: bytes | bytearray, itemsize: int, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part as a flat array; raise `ArtifactError` when it is not sound."""
    length, at = read_varint(part, 0)
    blocks, at = read_varint(part, at)
    width = math.prod(shape[1:])
    places = width // length if math.prod(shape) and length in LENGTHS and width % length == 0 else 0
    if not 1 <= blocks <= places:
        raise ArtifactError(f"{blocks} blocks of vectors of {length} do not fit the shape {shape}")
    grid = np.empty((shape[0], places, length), stored(itemsize))
    for first, last in pairwise(block_edges(places, blocks)):
        at = _read_block(part, at, grid[:, first:last])
    if at != len(part):
        raise ArtifactError(f"{len(part) - at} bytes follow the last block")
    return grid.reshape(-1)


def _encoded(grid: Bits, most: int) -> list[bytes]:
    """Return the parts that `grid`, (rows, places, length), makes with one block and with the number that seems best.

    Whether vectors repeat is judged by all rows of the first places first, which lie in one block.
    """
    rows, places, length = grid.shape
    sample = grid[:: max(1, rows // _SAMPLE), : max(1, _SAMPLE // rows)].reshape(-1, length)
    if len(_distinct(sample)[0]) > _MOST_DISTINCT * len(sample):
        return []
    vectors, ranks = _distinct(grid.reshape(-1, length))
    if len(vectors) > _MOST_DISTINCT * len(ranks):
        return []
    blocks, cost = _best_blocks(ranks.reshape(rows, places), length * grid.itemsize)
    if cost > _HOPELESS * most:
        return []
    parts = [_part(grid, number) for number in sorted({1, blocks})]
    return [part for part in parts if part is not None]


def _best_blocks(ranks: NDArray[np.int64], size: int) -> tuple[int, float]:
    """Return the number of blocks whose dictionaries, of vectors of `size` bytes, and ranks take the least bytes."""
    rows, places = ranks.shape
    pairs = np.unique(ranks * places + np.arange(places))
    which, where = pairs // places, pairs % places

    def cost(blocks: int) -> float:
        widths = np.diff(block_edges(places, blocks))
        block = np.repeat(np.arange(blocks), widths)[where]
        # in the order of the pairs, those of one vector and one block follow each other
        new = np.append(True, (np.diff(which) != 0) | (np.diff(block) != 0))
        distinct = np.bincount(block[new])
        return float((distinct * size + widths * rows * np.log2(distinct) / 8).sum()) + _BLOCK_BYTES * blocks

    return min((cost(blocks), blocks) for blocks in {*range(1, min(places, _MOST_BLOCKS) + 1), places})[::-1]


def _part(grid: Bits, blocks: int) -> bytes | None:
    places, length = grid.shape[1:]
    part = varint(length) + varint(blocks)
    for first, last in pairwise(block_edges(places, blocks)):
        vectors, ranks = _distinct(grid[:, first:last].reshape(-1, length))
        if len(vectors) > MOST_VECTORS:
            return None
        part += varint(len(vectors)) + measured(section(vectors.reshape(-1)))
        part += measured(section(ranks.astype(stored(_rank_size(len(vectors)))), last - first))
    return part


def _read_block(part: bytes | bytearray, at: int, block: Bits) -> int:
    """Fill `block`, (rows, places, length), with the one that begins at `at`, and return where it ends."""
    rows, places, length = block.shape
    count, at = read_varint(part, at)
    if not 1 <= count <= min(MOST_VECTORS, rows * places):
        raise ArtifactError(f"{count} vectors do not fit the {rows * places} of a block")
    table, at = read_measured(part, at)
    vectors = read_section(table, block.itemsize, count * length).reshape(count, length)
    coded, at = read_measured(part, at)
    ranks = read_section(coded, _rank_size(count), rows * places, places)
    if int(ranks.max()) >= count:
        raise ArtifactError(f"a rank exceeds the {count} vectors")
    block[:] = vectors[ranks].reshape(block.shape)
    return at


def _distinct(rows: Bits) -> tuple[Bits, NDArray[np.int64]]:
    """Return the distinct rows, ascending by their bytes, and the rank of each row among them."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    found, ranks = np.unique(whole, return_inverse=True)
    return found.view(rows.dtype).reshape(-1, rows.shape[1]), ranks.reshape(-1)


def _rank_size(count: int) -> int:
    return 1 if count <= 256 else 2
