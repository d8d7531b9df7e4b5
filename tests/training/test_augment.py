"""Augmentations: their draws come from the generator that they are given, and from nothing else."""

import numpy as np
import pytest
import torch

from dpkernels.training.augment import RandTurnd, augmented, build_augmentation

TURN = {"_target_": "dpkernels.training.augment.RandTurnd", "keys": "image"}


def test_turning_reaches_every_symmetry_of_the_square():
    turn, image = RandTurnd("image"), torch.arange(9.0).reshape(1, 3, 3)
    turn.set_random_state(seed=0)
    seen = {tuple(turn({"image": image})["image"].flatten().tolist()) for _ in range(100)}
    assert len(seen) == 8


def test_tensors_that_belong_together_turn_alike():
    turn, image = RandTurnd(["image", "label"]), torch.arange(9.0).reshape(1, 3, 3)
    turn.set_random_state(seed=0)
    for _ in range(20):
        turned = turn({"image": image, "label": image + 1, "name": "scan"})
        assert torch.equal(turned["image"] + 1, turned["label"])
        assert turned["name"] == "scan"


def test_no_blocks_are_no_augmentation_and_a_faulty_one_is_named():
    assert build_augmentation([]) is None
    with pytest.raises(ValueError, match=r"data.augmentations\[1\]: .*RandTurns"):
        build_augmentation([TURN, {"_target_": "dpkernels.training.augment.RandTurns"}])


def test_the_generator_decides_what_is_drawn():
    augment = build_augmentation([TURN, {"_target_": "RandFlipd", "keys": "image", "prob": 0.5}])
    sample = {"image": torch.arange(9.0).reshape(1, 3, 3), "label": torch.zeros(1, 3, 3)}

    def draws(seed: int) -> list[torch.Tensor]:
        rng = np.random.default_rng(seed)
        return [augmented(augment, sample, rng)["image"] for _ in range(12)]

    torch.manual_seed(0)
    first, again, other = draws(1), draws(1), draws(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert not all(torch.equal(first[0], image) for image in first)
    assert all(type(image) is torch.Tensor for image in first), "no MetaTensor reaches a network"
