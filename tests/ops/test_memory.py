"""Memory that deployed models keep from call to call."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmquant.ops.deployed.memory import Pool, new

MIB = 2**20


def filled(value: int, *shape: int) -> Tensor:
    return new(*shape, dtype=torch.uint8).fill_(value)


def test_memory_comes_back_when_the_last_view_goes() -> None:
    pool = Pool()
    with pool.in_use():
        x = filled(7, 3, MIB)
        at, view = x.data_ptr(), x[1:].view(-1)
        del x
        other = filled(8, 3, MIB)
        assert other.data_ptr() != at
        assert view.eq(7).all()
        del view
        assert filled(9, 3, MIB).data_ptr() == at
        assert pool.held == 3 * MIB
    assert pool.held == 3 * MIB
    assert other.eq(8).all()
    del other
    assert pool.held == 6 * MIB
    with pool.in_use():
        pass
    assert pool.held == 0  # a call has not used it


def test_a_result_outlives_its_pool() -> None:
    pool = Pool()
    with pool.in_use():
        x = filled(3, 2 * MIB)
    del pool
    assert x.eq(3).all()


def test_what_is_small_and_what_is_outside_a_call() -> None:
    pool = Pool()
    with pool.in_use():
        small = new(10)
        assert new(0, 5).shape == (0, 5)
    large = new(MIB)
    del small, large
    assert pool.held == 0


def test_much_larger_blocks_are_left_alone() -> None:
    pool = Pool()
    with pool.in_use():
        new(10 * MIB, dtype=torch.uint8)
        new(4 * MIB, dtype=torch.uint8)
        assert pool.held == 14 * MIB
        new(6 * MIB, dtype=torch.uint8)
        assert pool.held == 14 * MIB


def test_calls_within_calls_and_errors() -> None:
    outer, inner = Pool(), Pool()
    with outer.in_use():
        with pytest.raises(ValueError, match="why"), inner.in_use():  # noqa: PT012
            filled(0, MIB)
            raise ValueError("why")
        filled(0, MIB)
    assert (outer.held, inner.held) == (MIB, MIB)
    new(MIB, dtype=torch.uint8)
    assert outer.held == MIB


def test_copies_start_empty() -> None:
    pool = Pool()
    with pool.in_use():
        filled(0, MIB)
    assert [copy.deepcopy(pool).held, pickle.loads(pickle.dumps(pool)).held, pool.held] == [0, 0, MIB]


DTYPES = st.sampled_from([torch.float32, torch.uint8, torch.int32, torch.float64])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(MIB // 2, 4 * MIB), DTYPES, st.integers(0, 8)), max_size=40))
def test_tensors_never_share_memory(wanted: list[tuple[int, torch.dtype, int]]) -> None:
    pool, alive = Pool(), []
    with pool.in_use():
        for number, (size, dtype, drop) in enumerate(wanted):
            x = new(size // dtype.itemsize, dtype=dtype).fill_(number)
            assert x.data_ptr() % 64 == 0
            alive.append((number, x))
            del x
            if drop < len(alive):
                del alive[drop]
            assert all(t[0] == n == t[-1] for n, t in alive)
    assert all(t.eq(n).all() for n, t in alive)


def test_threads() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(100):
            with pool.in_use():
                tensors = [filled(number, MIB + 4096 * i) for i in range(3)]
                wrong.extend(t for t in tensors if not t.eq(number).all())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
