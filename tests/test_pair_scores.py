"""Recalls of images and captions."""

import pytest
import torch

from madtp_hf.tasks.pair_scores import CaptionedImages

from .conftest import make_processor


@pytest.mark.parametrize("counts", [(3, 1, 2, 4, 1, 1, 5), (1, 1)])
def test_chance_is_the_mean_of_random_scores(counts):
    pytest.importorskip("evaluate")
    rows = [{"image": None, "captions": [f"red {place}"] * count} for place, count in enumerate(counts)]
    queries, draws = CaptionedImages(rows, make_processor()), 60
    drawn = []
    for _ in range(draws):
        scores = torch.rand(len(queries), len(queries.texts))
        drawn.append(queries.recalls(scores, scores.T))
    chance = queries.by_chance()
    assert list(chance) == list(drawn[0])
    for name, value in chance.items():
        assert value == pytest.approx(sum(found[name] for found in drawn) / draws, abs=0.08)
