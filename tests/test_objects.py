"""Object tables: packed masks against the label image they came from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsitk.objects import ObjectTable

labels_nd = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7),
    elements=st.integers(0, 4),
)


def same(a: ObjectTable, b: ObjectTable) -> bool:
    """Tell whether two tables hold the same bytes, dtypes included."""
    left, right = a.to_arrays(), b.to_arrays()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in left
    )


def table_of(labels: np.ndarray, origin: tuple[int, ...] | None = None) -> ObjectTable:
    present = np.unique(labels[labels > 0])
    return ObjectTable.from_labels(
        labels,
        origin=origin,
        class_id=present % 2,
        probability=present / 10,
        columns={"label": present},
        tile=3,
    )


@given(labels_nd, st.integers(-5, 5))
def test_from_labels_equals_a_full_mask_for_each_label(labels: np.ndarray, shift: int) -> None:
    origin = tuple(shift + k for k in range(labels.ndim))
    table = table_of(labels, origin)
    present = [n for n in range(1, 5) if (labels == n).any()]
    assert len(table) == len(present)
    assert table.columns["label"].tolist() == present
    assert table.class_id.tolist() == [n % 2 for n in present]
    for row, number in enumerate(present):
        where = np.argwhere(labels == number) + origin
        box = table.region(row)
        assert box.start == tuple(where.min(axis=0))
        assert box.stop == tuple(where.max(axis=0) + 1)
        assert np.array_equal(np.argwhere(table.mask(row)) + box.start, where)
        assert table.size[row] == len(where)
        assert table.anchor[row] == pytest.approx(where.mean(axis=0) + 0.5)


@given(labels_nd, st.integers(-900, 900))
def test_an_anchor_does_not_depend_on_the_window_it_is_seen_in(labels: np.ndarray, shift: int) -> None:
    padded = np.pad(labels, 3)
    here = ObjectTable.from_labels(labels, origin=(shift,) * labels.ndim)
    there = ObjectTable.from_labels(padded, origin=(shift - 3,) * labels.ndim)
    assert same(here, there)


@given(labels_nd, st.data())
@settings(max_examples=50)
def test_take_picks_rows_and_their_masks(labels: np.ndarray, data: st.DataObject) -> None:
    table = table_of(labels)
    rows = data.draw(st.lists(st.integers(0, max(0, len(table) - 1)), max_size=6 if len(table) else 0))
    taken = table.take(np.array(rows, np.int64))
    assert taken.columns["label"].tolist() == [table.columns["label"][r] for r in rows]
    for row, source in enumerate(rows):
        assert np.array_equal(taken.mask(row), table.mask(source))
    chosen = np.array([r % 2 == 0 for r in range(len(table))], bool)
    assert same(table.take(chosen), table.take(np.flatnonzero(chosen)))


@given(st.lists(labels_nd.filter(lambda a: a.ndim == 2), min_size=1, max_size=4))
@settings(max_examples=50)
def test_concat_is_one_after_the_other(images: list[np.ndarray]) -> None:
    tables = [table_of(labels) for labels in images]
    joined = ObjectTable.concat(tables)
    assert len(joined) == sum(map(len, tables))
    begin = 0
    for table in tables:
        assert same(joined.take(np.arange(begin, begin + len(table))), table)
        begin += len(table)


@given(labels_nd)
def test_arrays_and_back(labels: np.ndarray) -> None:
    table = table_of(labels)
    assert same(ObjectTable.from_arrays(table.to_arrays()), table)


def test_an_empty_table_joins_with_any() -> None:
    table = table_of(np.array([[0, 1], [2, 2]]))
    joined = ObjectTable.concat([ObjectTable.empty(2, ("label",)), table])
    assert same(joined, table)


def test_with_columns_keeps_what_was_there() -> None:
    table = table_of(np.array([[0, 1], [2, 2]]))
    more = table.with_columns(area=np.array([1, 3], np.float32))
    assert set(more.columns) == {"label", "area"}
    assert more.columns["area"].tolist() == [1, 3]
