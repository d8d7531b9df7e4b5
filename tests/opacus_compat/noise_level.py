"""How far the noise of an honest engine may be from its level, in Opacus' ``test_noise_level``.

The test trains a model of zeros on gradients of zero: its n parameters end as n independent
Gaussians, whose squares add up to their variance times a chi-squared variable of n degrees. Opacus
allows 15 % whatever n is. It fixes the seed, so it knows that its draws pass; ours are keyed by the
operating system, and one honest draw in six of a model of 160 parameters is further away. With
:func:`bounds`, that model finds only a variance of half or twice the right one, while those of
12,000 parameters and more still find 8 %.
"""

from __future__ import annotations

import unittest

from scipy.stats import chi2

FALSE_ALARM = 1e-10
"""Chance that one honest draw is refused. A run of the suite judges 90 draws, 3 examples for each
of 15 test classes in two modes: less than one honest run in a hundred million fails, and less than
one in a million with 100 examples (``HYPOTHESIS_EXAMPLES``)."""


def bounds(parameters: int) -> tuple[float, float]:
    """Smallest and largest squared norm of the parameters that pass, in units of the expected."""
    law = chi2(parameters)
    return law.ppf(FALSE_ALARM / 2) / parameters, law.isf(FALSE_ALARM / 2) / parameters


def judge_by_chance(test: unittest.TestCase) -> None:
    """Put :func:`bounds` in the place of the tolerance in a ``BasePrivacyEngineTest``."""
    train = test._init_private_training
    parameters = 0

    def trained(*args, **kwargs):
        nonlocal parameters
        private = train(*args, **kwargs)
        parameters = sum(p.numel() for p in private[0].parameters() if p.requires_grad)
        return private

    def almost_equal(found, expected, delta):
        low, high = bounds(parameters)
        assert low * expected < found < high * expected

    test._init_private_training = trained
    test.assertAlmostEqual = almost_equal
