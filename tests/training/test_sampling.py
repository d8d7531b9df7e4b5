"""Poisson sampling: chances, entropy, shares of processes; views as rows."""

import itertools

import numpy as np
import torch

from dpkernels.training.processes import TrainingProcesses
from dpkernels.training.sampling import PoissonSampler, flatten_views, patient_batches
from tests.training.toy import ToyViews


def test_every_patient_is_drawn_at_the_sample_rate_and_alone():
    """The count of each patient, and of each pair, within five deviations of its expectation."""
    rate, draws, patients = 0.25, 4000, 8
    batches = itertools.islice(PoissonSampler(patients, rate), draws)
    taken = np.zeros((draws, patients))
    for row, batch in zip(taken, batches, strict=True):
        row[batch] = 1
    pairs = taken.T @ taken
    for observed, chance in (
        (np.diag(pairs), rate),
        (pairs[np.triu_indices(patients, 1)], rate**2),
    ):
        spread = np.sqrt(draws * chance * (1 - chance))
        assert np.abs(observed - draws * chance).max() < 5 * spread


def batches(count: int, *arguments: object) -> list[list[int]]:
    return list(itertools.islice(PoissonSampler(*arguments), count))


def test_at_sample_rate_1_everybody_is_drawn():
    assert batches(50, 5, 1.0) == [list(range(5))] * 50


def test_a_seed_repeats_the_batches_and_no_global_seed_does():
    assert batches(20, 30, 0.5, 3) == batches(20, 30, 0.5, 3)
    assert batches(20, 30, 0.5, 3) != batches(20, 30, 0.5, 4)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(batches(20, 30, 0.5))
    assert found[0] != found[1], "equal by chance once in 2^600"


def test_processes_share_the_patients_and_none_is_drawn_twice():
    shares = [batches(30, 11, 0.5, 7, TrainingProcesses(rank, 3)) for rank in range(3)]
    together = [sorted(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == batches(30, 11, 0.5, 7)
    for rank, share in enumerate(shares):
        assert {index % 3 for index in itertools.chain(*share)} == {rank}


def test_a_row_is_a_view_and_views_of_a_patient_are_adjacent():
    batch = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    rows = flatten_views(batch)
    assert rows.shape == (6, 4)
    assert all(torch.equal(rows[patient * 3 + view], batch[patient, view])
               for patient in range(2) for view in range(3))  # fmt: skip


def test_batches_hold_whole_patients_also_when_nobody_is_drawn():
    dataset = ToyViews([f"p{i}" for i in range(4)], views=2)
    loader = patient_batches(dataset, 0.3, insecure_seed=0)
    assert loader.sample_rate == 0.3
    sizes = set()
    for image, label in itertools.islice(loader, 40):
        assert image.shape[1:] == (2, 3)
        assert label.shape == image.shape[:2]
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        sizes.add(len(image))
    assert {0, 1, 2} <= sizes
