"""Time and tightness of accountants: ours, Opacus' three, Google's dp-accounting.

    python bench/accounting_bench.py [--limit SECONDS] [--out bench/results/accounting.csv]

Each question runs in a fresh process with a time limit and reports the epsilon of a given noise
(our calibration to the nominal budget, so an exact accountant answers the budget less 0.05 %),
the seconds of the call without imports, and the peak memory of the process. A rerun replaces the
file: one row a question and accountant, with device, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RUNS = {"subsampled": (0.01, 5000), "volumes": (1 / 106, 53000)}
BUDGETS = (0.01, 1.0, 8.0, 100.0, 1e4, 1e6, 1e9, 1e15)
DELTA = 8e-7
ACCOUNTANTS = ("tight", "rdp", "prv", "gdp", "dp-accounting")
COLUMNS = (
    "run",
    "sample_rate",
    "steps",
    "delta",
    "nominal_epsilon",
    "noise_multiplier",
    "accountant",
    "epsilon",
    "over_nominal",
    "seconds",
    "peak_mib",
    "outcome",
    "device",
    "python",
    "numpy",
    "scipy",
    "opacus",
    "dp_accounting",
    "commit",
)
_ASK = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
name, sigma, rate, steps, delta = sys.argv[1], *map(float, sys.argv[2:])
steps = int(steps)
if name == "dp-accounting":
    from dp_accounting.pld import privacy_loss_distribution as pld
    from dpkernels.accounting import get_epsilon
    grid = 2e-5 * get_epsilon(
        noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta
    )
    def ask():
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=grid
        )
        return one.self_compose(steps).get_epsilon_for_delta(delta)
else:
    from dpkernels.accounting import get_epsilon
    if name != "tight":
        import dpkernels.accounting.opacus_adapter
    def ask():
        return get_epsilon(
            noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta, accountant=name
        )
start = time.perf_counter()
try:
    answer = {"epsilon": float(ask()), "outcome": "ok"}
except Exception as error:
    answer = {"epsilon": None, "outcome": type(error).__name__ + ": " + str(error)[:90]}
answer["seconds"] = time.perf_counter() - start
answer["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(answer))
"""


def ask(accountant: str, sigma: float, rate: float, steps: int, limit: float) -> dict[str, object]:
    """One question in a fresh process."""
    arguments = [accountant, repr(sigma), repr(rate), str(steps), repr(DELTA)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK, *arguments], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"epsilon": None, "outcome": f"no answer in {limit:g} s", "seconds": limit}
    if done.returncode != 0:
        return {"epsilon": None, "outcome": f"process died ({done.returncode})"}
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    """What a row has to name to be believed."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = {"numpy": "numpy", "scipy": "scipy", "opacus": "opacus"}
    versions = {column: version(name) for column, name in names.items()}
    return {
        "device": f"CPU {platform.machine()}, 1 thread",
        "python": platform.python_version(),
        **versions,
        "dp_accounting": version("dp-accounting"),
        "commit": commit,
    }


def main() -> None:
    """Asks every question and writes the rows."""
    from dpkernels.accounting import get_noise_multiplier

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per question")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accounting.csv"))
    options = parser.parse_args()
    common = environment()
    rows = []
    for run, (rate, steps) in RUNS.items():
        for nominal in BUDGETS:
            sigma = get_noise_multiplier(
                target_epsilon=nominal, target_delta=DELTA, sample_rate=rate, steps=steps
            )
            for accountant in ACCOUNTANTS:
                answer = ask(accountant, sigma, rate, steps, options.limit)
                epsilon = answer.get("epsilon")
                over = None if not epsilon else f"{float(str(epsilon)) / nominal:.6g}"
                row = {
                    **common,
                    **answer,
                    "run": run,
                    "sample_rate": f"{rate:.6g}",
                    "steps": steps,
                    "delta": DELTA,
                    "nominal_epsilon": nominal,
                    "accountant": accountant,
                    "noise_multiplier": f"{sigma:.8g}",
                    "over_nominal": over,
                }
                for name in ("seconds", "peak_mib"):
                    if row.get(name) is not None:
                        row[name] = f"{row[name]:.4g}"
                rows.append({column: row.get(column) for column in COLUMNS})
                print(
                    f"{run:<11}{nominal:<9g}{accountant:<14}{over or '-':<12}"
                    f"{row.get('seconds') or '-':<10}{answer['outcome']}",
                    flush=True,
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
