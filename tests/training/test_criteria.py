"""A loss that mixes rows is refused, and the likely argument is named."""

import pytest
import torch
from torch import nn

from dpkernels.training.criteria import check_decomposable


class Loss(nn.Module):
    """Any function of logits [rows, classes] and label [rows] as a loss."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, logits, label):
        return self.function(logits, label)


def check(criterion: nn.Module, **block: object) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 2, 0])
    target = f"torch.nn.{type(criterion).__name__}"
    check_decomposable(criterion, logits, label, {"_target_": target, **block}, hint="A hint.")


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        Loss(lambda logits, label: (logits.square().sum(1) * (1 + label)).mean()),
    ],
)
def test_means_over_rows_pass(criterion):
    check(criterion)


@pytest.mark.parametrize(
    ("criterion", "block", "advice"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), {"reduction": "sum"}, 'reduction="mean"'),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 4])), {"weight": [1, 2, 4]}, "class weights"),
        (nn.CrossEntropyLoss(ignore_index=0), {"ignore_index": 0}, "ignore_index normalises"),
        (
            Loss(lambda logits, _: (logits - logits.mean(0)).square().mean()),
            {"batch": False, "weight": None, "reduction": "mean"},
            "Use a loss that averages over rows",
        ),
    ],
)
def test_losses_that_are_no_mean_are_refused_with_advice(criterion, block, advice):
    with pytest.raises(ValueError, match=rf"is not a mean over rows: on 4 rows.*{advice}"):
        check(criterion, **block)


def test_a_gradient_that_mixes_rows_is_seen_where_the_value_does_not_show_it():
    """The value is the mean of the rows'; the gradient of one row reaches the other rows."""

    def leaking(logits, _):
        rows = logits.square().sum(1)
        others = logits.sum(1).roll(1)
        return (rows + (others - others.detach())).mean() if len(rows) > 1 else rows.mean()

    with pytest.raises(ValueError, match="is not a mean over rows"):
        check(Loss(leaking))


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="is not a mean over rows"):
        check(Loss(lambda logits, _: (logits * float("nan")).mean()))


def test_a_loss_by_row_and_one_that_fails_are_named():
    with pytest.raises(ValueError, match=r"expected a scalar .*got shape \(4,\).*reduction"):
        check(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"loss: BCELoss fails on logits \(4, 3\).* A hint."):
        check(nn.BCELoss())
