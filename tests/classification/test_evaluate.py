import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import (
    binary_matthews_corrcoef,
    multiclass_matthews_corrcoef,
)

from dpkernels.classification.evaluate import (
    confusion_matrix,
    matthews_correlation,
    predict_rows,
    summarise,
)


def test_matthews_correlation_is_the_correlation_of_two_binary_variables():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.3, 1 - truth, truth)
    found = matthews_correlation(confusion_matrix(truth, predicted, 2))
    assert found == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    theirs = binary_matthews_corrcoef(torch.tensor(predicted), torch.tensor(truth))
    assert found == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("classes", [3, 7])
def test_matthews_correlation_of_many_classes(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 300)
    predicted = np.where(rng.random(300) < 0.5, rng.integers(0, classes, 300), truth)
    theirs = multiclass_matthews_corrcoef(
        torch.tensor(predicted), torch.tensor(truth), num_classes=classes
    )
    found = matthews_correlation(confusion_matrix(truth, predicted, classes))
    assert found == pytest.approx(float(theirs), abs=1e-6)


def test_a_constant_guess_is_worth_nothing_and_a_perfect_one_everything():
    assert matthews_correlation(confusion_matrix([0, 0, 0, 1], [0, 0, 0, 0], 2)) == 0.0
    assert matthews_correlation(confusion_matrix([0, 1, 2], [0, 1, 2], 3)) == pytest.approx(1.0)
    assert matthews_correlation(confusion_matrix([0, 1], [1, 0], 2)) == pytest.approx(-1.0)


def test_summary_counts_absent_classes_as_absent():
    summary = summarise(confusion_matrix([0, 0, 1], [0, 1, 1], 3), ["a", "b", "c"])
    assert summary["all"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["all"]["balanced_accuracy"] == pytest.approx(0.75)
    assert summary["a"] == {"recall": 0.5, "images": 2}
    assert np.isnan(summary["c"]["recall"])


def test_prediction_is_in_evaluation_mode_in_order_and_restores_the_mode():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3))
    images = [torch.randn(1, 2, 2) for _ in range(130)]
    rows = list(predict_rows(network, images, torch.device("cpu")))
    expected = torch.softmax(network[2](torch.stack(images).flatten(1)), dim=1)
    torch.testing.assert_close(torch.tensor(rows), expected.detach())
    assert network.training
