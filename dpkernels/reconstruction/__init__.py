"""Reconstruction risk: bounds that need no torch, and a report a physician can read."""

from dpkernels.reconstruction.bounds import (
    likelihood_ratio_bound,
    profile_bound,
    pure_dp_bound,
    rdp_bound,
    rero_bound,
)
from dpkernels.reconstruction.from_scratch import (
    mse_probability,
    mse_quantile,
    ncc_bound,
    ncc_quantile,
    psnr_probability,
    psnr_quantile,
)
from dpkernels.reconstruction.monte_carlo import simulate_rero
from dpkernels.reconstruction.report import RiskReport, risk_report

__all__ = [
    "RiskReport",
    "likelihood_ratio_bound",
    "mse_probability",
    "mse_quantile",
    "ncc_bound",
    "ncc_quantile",
    "profile_bound",
    "psnr_probability",
    "psnr_quantile",
    "pure_dp_bound",
    "rdp_bound",
    "rero_bound",
    "risk_report",
    "simulate_rero",
]
