"""Tiles, cosines and few bits in NumPy, in float64 and one number after another."""

import math

import numpy as np


def cosine_matrix(n):
    """The orthonormal DCT-II from its definition, with zeros where a cosine is zero."""
    matrix = np.zeros((n, n))
    for f in range(n):
        norm = math.sqrt((1 if f == 0 else 2) / n)
        for i in range(n):
            cosine = math.cos(math.pi * (i + 0.5) * f / n)
            matrix[f, i] = norm * cosine if abs(cosine) > 1e-12 else 0
    return matrix


def as_matrix(x, width, fill=0.0):
    """As which a tensor is cut: a vector in rows of ``width``."""
    if x.ndim >= 2:
        return np.asarray(x, float).reshape(-1, x.shape[-1])
    rows = math.ceil(x.size / width)
    return np.append(x.ravel(), np.full(rows * width - x.size, fill)).reshape(rows, width)


def places(shape, sides):
    """Where each tile of a matrix is."""
    for top in range(0, shape[0], sides[0]):
        for left in range(0, shape[1], sides[1]):
            yield slice(top, top + sides[0]), slice(left, left + sides[1])


def largest(x, k):
    """All but the k entries of largest magnitude set to zero; NaN is padding, and 0."""
    flat = x.ravel()
    order = np.argsort(-np.where(np.isnan(flat), -1, np.abs(flat)), kind="stable")[:k]
    kept = np.zeros_like(flat)
    kept[order] = np.nan_to_num(flat[order])
    return kept.reshape(x.shape)


def frequencies(x, is_vector, inverse=False):
    """The cosine transform of a tile, of a vector's that of its rows."""
    left, right = (cosine_matrix(n) for n in x.shape)
    left = np.eye(len(left)) if is_vector else left
    return left.T @ x @ right if inverse else left @ x @ right.T


def tiles_of(x, sides, density, dct):
    """What is kept of every tile, as numbers of entries or of frequencies; and their places."""
    fill = 0.0 if dct else np.nan
    matrix = as_matrix(x, sides[1], fill)
    k = max(1, math.floor(density * math.prod(sides)))
    for place in places(matrix.shape, sides):
        tile = np.full(sides, fill)
        piece = matrix[place]
        tile[: piece.shape[0], : piece.shape[1]] = piece
        yield place, largest(frequencies(tile, x.ndim < 2) if dct else tile, k)


def from_tiles(tiles, x, sides, dct):
    """The tensor, like ``x``, of what :func:`tiles_of` gives."""
    matrix = as_matrix(np.zeros_like(x, float), sides[1])
    for place, tile in tiles:
        whole = frequencies(tile, x.ndim < 2, inverse=True) if dct else tile
        there = matrix[place]
        matrix[place] = whole[: there.shape[0], : there.shape[1]]
    return matrix.ravel()[: x.size].reshape(x.shape)


def few_bits(x, levels):
    """A sign and one of some magnitudes for each number of a vector; as they are where that would
    be longer."""
    width = levels.bit_length()
    if math.ceil(len(x) * width / 8) + 4 * levels >= 4 * len(x):
        return x
    magnitudes = np.abs(np.asarray(x, np.float64))
    if levels == 1:
        return np.where(x < 0, -1, 1) * magnitudes.mean()
    low, high = max(magnitudes.min(), 1e-4 * magnitudes.max()), magnitudes.max()
    centres = high * (low / high) ** np.linspace(1, 0, levels)
    level = np.zeros(len(x), int)
    for _ in range(4):
        middles = (centres[1:] + centres[:-1]) / 2
        level = (magnitudes[:, None] > middles).sum(1)
        found = [magnitudes[level == i] for i in range(levels)]
        centres = np.asarray(
            [f.mean() if f.size else c for f, c in zip(found, centres, strict=True)]
        )
    return np.where(x < 0, -1, 1) * centres[level]


def in_few_bits(x, levels):
    """A tensor whose numbers other than zero are written so."""
    result, there = np.zeros_like(x), x != 0
    result[there] = few_bits(x[there], levels)
    return result


def senders_mean(each):
    """Of each coordinate, over those that have something there."""
    each = np.stack(each)
    return each.sum(0) / np.maximum((each != 0).sum(0), 1)
