import pytest
import torch

from dpkernels.segmentation.loss import build_loss

_OVERLAP = {"softmax": True, "to_onehot_y": True}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DiceLoss", {}),
        ("DiceCELoss", {}),
        ("DiceFocalLoss", {}),
        ("DiceFocalLoss", {"weight": [1.0, 2.0, 3.0]}),
        ("GeneralizedDiceLoss", {}),
        ("TverskyLoss", {}),
    ],
)
def test_losses_that_are_means_over_rows_pass(name, arguments):
    build_loss({"_target_": f"monai.losses.{name}", **_OVERLAP, **arguments}, classes=3)


@pytest.mark.parametrize(
    ("name", "arguments", "culprit"),
    [
        ("DiceLoss", {"batch": True}, "batch=True"),
        ("TverskyLoss", {"batch": True}, "batch=True"),
        ("DiceCELoss", {"weight": "$torch.tensor([1.0, 2.0, 3.0])"}, "class weights"),
        ("DiceLoss", {"reduction": "sum"}, 'reduction="mean"'),
        ("DiceLoss", {"reduction": "none"}, 'reduction="mean"'),
    ],
)
def test_losses_that_mix_rows_are_refused_and_the_argument_is_named(name, arguments, culprit):
    block = {"_target_": f"monai.losses.{name}", **_OVERLAP, **arguments}
    with pytest.raises(ValueError, match=culprit):
        build_loss(block, classes=3)


def test_a_loss_that_wants_other_targets_is_refused():
    with pytest.raises(ValueError, match="need softmax=True and to_onehot_y=True"):
        build_loss({"_target_": "monai.losses.DiceLoss"}, classes=3)


def test_a_target_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"loss: .*monai.losses.DieceLoss"):
        build_loss({"_target_": "monai.losses.DieceLoss"}, classes=3)
    with pytest.raises(ValueError, match=r"loss: cannot build .*DiceLoss"):
        build_loss({"_target_": "monai.losses.DiceLoss", "bacth": True}, classes=3)


@pytest.mark.parametrize("stacked", [True, False])
def test_deep_supervision_heads_are_weighted_one_half_one_quarter(stacked):
    loss = build_loss({"_target_": "monai.losses.DiceCELoss", **_OVERLAP}, classes=2)
    torch.manual_seed(0)
    label = torch.randint(0, 2, (2, 1, 8, 8, 8))
    sizes = (8, 8, 8) if stacked else (8, 4, 2)
    heads = [torch.randn(2, 2, n, n, n) for n in sizes]
    parts = [
        loss(head, label[..., :: 8 // n, :: 8 // n, :: 8 // n])
        if stacked
        else loss(
            head, torch.nn.functional.interpolate(label.float(), (n,) * 3, mode="nearest-exact")
        )
        for head, n in zip(heads, sizes, strict=True)
    ]
    expected = (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75
    found = loss(torch.stack(heads, 1) if stacked else heads, label)
    torch.testing.assert_close(found, expected)
