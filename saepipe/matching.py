"""The best one-to-one matching of two sets, such as an SAE's latents with the features they should have found."""

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int


def match(
    similarity: Float[np.ndarray, "row column"],
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Pair rows with columns, each used once at most, so that the sum of the pairs' similarities is the largest.

    Every row is paired, or every column where there are fewer of them. 512 rows and 2048 columns take 5 ms.

    Args:
        similarity: How well each row goes with each column; finite.

    Returns:
        The row and the column of each pair, by rising row.

    Source: the Hungarian method with shortest augmenting paths (Jonker and Volgenant 1987); scipy, which has it too, is
    no dependency of saepipe.
    """
    assert np.isfinite(similarity).all(), "similarities are finite"
    if similarity.shape[0] > similarity.shape[1]:
        columns, rows = match(similarity.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    cost = -similarity.astype(np.float64)
    n_rows, n_columns = cost.shape
    row_of = np.full(n_columns, -1)
    row_price, column_price = cost.min(1, initial=np.inf), np.zeros(n_columns)
    waiting = []
    for row, column in enumerate(cost.argmin(1) if n_rows else ()):  # most rows have a best column to themselves
        if row_of[column] < 0:
            row_of[column] = row
        else:
            waiting.append(row)
    for row in waiting:
        _augment(cost, row, row_of, row_price, column_price)
    columns = np.flatnonzero(row_of >= 0)
    order = np.argsort(row_of[columns])
    return row_of[columns][order], columns[order]


def _augment(
    cost: npt.NDArray[np.float64],
    row: int,
    row_of: npt.NDArray[np.int64],
    row_price: npt.NDArray[np.float64],
    column_price: npt.NDArray[np.float64],
) -> None:
    """Pair one more row: rows before it move over to other columns along the path that costs least.

    Dijkstra's search over columns; the prices keep `cost - row_price - column_price` at 0 for pairs, and never below.
    """
    distance = np.full(len(row_of), np.inf)
    came_from = np.full(len(row_of), -1)
    done = np.zeros(len(row_of), dtype=bool)
    column, reached = -1, 0.0
    while True:
        here = row if column < 0 else row_of[column]
        through = reached + cost[here] - row_price[here] - column_price
        shorter = ~done & (through < distance)
        distance[shorter], came_from[shorter] = through[shorter], column
        column = int(np.where(done, np.inf, distance).argmin())
        done[column], reached = True, distance[column]
        if row_of[column] < 0:
            break
    row_price[row] += reached
    visited = np.flatnonzero(done & (row_of >= 0))
    row_price[row_of[visited]] += reached - distance[visited]
    column_price[visited] -= reached - distance[visited]
    while column >= 0:
        before = came_from[column]
        row_of[column] = row if before < 0 else row_of[before]
        column = before
