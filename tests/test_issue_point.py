"""A layer is rehearsed early once early queries have proven as good as the true ones."""

from __future__ import annotations

import torch

from ebbtide.prefetch.issue_point import LOOK_TOKENS, IssuePoint


def step(point: IssuePoint, layer: int, cosine: float) -> None:
    """One token whose early query stands at that cosine to the true one."""
    true = torch.tensor([[[1.0, 0.0]]])
    point.guess(layer, torch.tensor([[[cosine, (1 - cosine**2) ** 0.5]]]))
    point.compare(layer, 7 * true)


def test_layers_begin_late_and_are_settled_one_by_one():
    point = IssuePoint()
    assert point.is_looking(1000) and not point.is_early(3)
    for token in range(LOOK_TOKENS):
        assert not point.is_early(3), token
        step(point, 3, 0.97)
        step(point, 1, 0.2)
    assert point.is_early(3) and not point.is_early(1)
    assert point.is_looking(256) and not point.is_looking(200)


def test_a_layer_that_changes_is_settled_anew():
    point = IssuePoint()
    for cosine, early in ((0.99, True), (0.5, False), (0.95, True)):
        for _ in range(LOOK_TOKENS):
            step(point, 2, cosine)
        assert point.is_early(2) is early


def test_a_query_without_a_guess_settles_nothing():
    point = IssuePoint()
    point.compare(2, torch.ones(1, 1, 2))
    assert not point.is_early(2)
