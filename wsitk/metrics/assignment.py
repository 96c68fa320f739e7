"""One-to-one matching over the few pairs that are possible, instead of a matrix of all against all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["best_pairs"]

Indices = npt.NDArray[np.intp]
Costs = npt.NDArray[np.float64]

DENSE_CELLS = 250_000
"""Up to this many cells a cluster is solved as a matrix (2 MB); beyond, as a sparse graph."""


def best_pairs(rows: Indices, columns: Indices, cost: Costs, alone: float) -> Indices:
    """Choose pairs so that none shares a row or a column and the total cost is least.

    Pair `k` joins `rows[k]` with `columns[k]` at `cost[k] <= alone`; no pair may be listed twice. A row and a
    column that stay unpaired together cost `alone`: the same optimum as the Hungarian method on a full matrix
    with `alone` in all other cells. Return the chosen pairs' indices in ascending order.

    Pairs fall into clusters that have no row or column in common, and each is solved by itself, so that time
    and memory follow the number of pairs; what lies elsewhere in the image never changes the result.
    """
    if rows.size == 0:
        return np.zeros(0, np.intp)
    cluster, row, column = _clusters(rows, columns)
    order = np.argsort(cluster, kind="stable")
    ends = np.flatnonzero(np.diff(cluster[order], append=-1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    chosen = [order[starts[ends - starts == 1]]]  # a pair with no rival needs no solver
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        pairs = order[start:end]
        chosen.append(pairs[_solve(row[pairs], column[pairs], cost[pairs], alone)])
    kept = np.sort(np.concatenate(chosen))
    return np.asarray(kept[cost[kept] < alone])


def _clusters(rows: Indices, columns: Indices) -> tuple[Indices, Indices, Indices]:
    """Each pair's cluster, and its row and column by their rank within the cluster."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    border = int(rows.max()) + 1
    nodes = border + int(columns.max()) + 1
    ends = (rows, columns + border)
    graph = coo_array((np.ones(rows.size, np.int8), ends), shape=(nodes, nodes))
    count, label = connected_components(graph, directed=False)
    row_rank, column_rank = _ranks(label[:border], count), _ranks(label[border:], count)
    return label[rows], row_rank[rows], column_rank[columns]


def _ranks(label: Indices, count: int) -> Indices:
    """The rank of each node among those with the same label."""
    size = np.bincount(label, minlength=count)
    order = np.argsort(label, kind="stable")
    rank = np.empty(label.size, np.intp)
    rank[order] = np.arange(label.size)
    return rank - (np.cumsum(size) - size)[label]


def _solve(row: Indices, column: Indices, cost: Costs, alone: float) -> Indices:
    """The chosen pairs of one cluster, whose rows and columns are numbered from 0 without gaps."""
    from scipy.optimize import linear_sum_assignment

    shape = (int(row.max()) + 1, int(column.max()) + 1)
    if shape[0] * shape[1] > DENSE_CELLS:
        taken = _sparse(row, column, cost, alone, shape)
    else:
        matrix = np.full(shape, alone)
        matrix[row, column] = cost
        taken = linear_sum_assignment(matrix)
    partner = np.full(shape[0], -1)
    partner[taken[0]] = taken[1]
    return np.flatnonzero(partner[row] == column)


def _sparse(
    row: Indices, column: Indices, cost: Costs, alone: float, shape: tuple[int, int]
) -> tuple[Indices, Indices]:
    """The same on a sparse graph: each row also has a column of its own, which stands for no partner."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    own = np.arange(shape[0])
    # Weights must not be 0; every row is matched once, so that adding the same to all changes no optimum.
    above = 1.0 - min(float(cost.min()), alone)
    weights = np.concatenate([cost, np.full(shape[0], alone)]) + above
    ends = (np.concatenate([row, own]), np.concatenate([column, own + shape[1]]))
    graph = coo_array((weights, ends), shape=(shape[0], shape[0] + shape[1])).tocsr()
    rows, columns = min_weight_full_bipartite_matching(graph)
    return rows, columns
