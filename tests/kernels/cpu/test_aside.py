"""Two threads' calls side by side: each with the threads it was told, and with the same bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from opsin.kernels.cpu import Library
from opsin.kernels.cpu.matrix import PackedMatrix


@pytest.fixture
def four(best: Library) -> Iterator[Library]:
    """The library with four threads."""
    best.configure("auto", 4)
    yield best
    assert best.threads == 4


class Other:
    """A thread that does what it is told, one thing after another."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def run(self, work: Callable[[], object]) -> object:
        thread = threading.Thread(target=lambda: self.seen.append(work()))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        return self.seen[-1]


def test_a_team_aside_takes_its_threads_from_the_others(four: Library) -> None:
    def aside() -> list[object]:
        told = [four.set_aside(3), four.threads, Other().run(lambda: four.threads)]
        return [*told, four.set_aside(0), four.threads]

    assert Other().run(aside) == [True, 3, 1, True, 4]
    assert four.threads == 4


def test_one_thread_has_a_team_and_others_keep_at_least_one(four: Library) -> None:
    refused = Other()

    def aside() -> object:
        assert not four.set_aside(4)
        assert four.threads == 4
        assert four.set_aside(2)
        assert not four.set_aside(1)
        assert refused.run(lambda: four.set_aside(1)) is False
        assert refused.run(lambda: four.set_aside(0)) is True  # it has none to give back
        threads = four.threads
        four.set_aside(0)
        return threads

    assert Other().run(aside) == 2


def test_products_side_by_side_have_the_bits_of_each_alone(four: Library) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(320, 256), torch.randn(70, 256)
    tower = PackedMatrix.dense(four, weight, "q8", group=0)
    layer = PackedMatrix.dense(four, weight.flip(0), "q4", group=64)
    alone = tower.multiply(x), layer.multiply(x)
    over = threading.Event()

    def towers() -> bool:
        same = True
        for i in range(60):
            assert four.set_aside(1 + i % 3)
            same &= all(torch.equal(tower.multiply(x), alone[0]) for _ in range(3))
            four.set_aside(0)  # amid a product of the others, as like as not
        over.set()
        return same

    other = Other()
    thread = threading.Thread(target=other.run, args=(towers,))
    thread.start()
    products = 0
    while not over.is_set() or not products:
        assert torch.equal(layer.multiply(x), alone[1])
        products += 1
    thread.join(60)
    assert other.seen == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_process_has_all_threads_again(four: Library) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64), torch.randn(20, 64)
    matrix = PackedMatrix.dense(four, weight, "q8", group=0)
    alone, ready, go = matrix.multiply(x), threading.Event(), threading.Event()

    def aside() -> None:
        four.set_aside(2)
        ready.set()
        go.wait(60)
        four.set_aside(0)

    thread = threading.Thread(target=aside)
    thread.start()
    assert ready.wait(60)
    child = os.fork()
    if not child:
        same = torch.equal(matrix.multiply(x), alone)
        os._exit(0 if same and four.threads == 4 and four.set_aside(3) else 1)
    go.set()
    thread.join(60)
    assert os.waitpid(child, 0)[1] == 0
