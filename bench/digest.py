"""What the rows of the other benches say, in lines for a terminal, the README and the notes."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import results, table
from bench.table import number

_REGRET_SHOWN = 0.10


def all_lines(folder: Path = results.RESULTS) -> list[str]:
    """One or a few lines for each bench that has rows."""
    sources = {
        "time-to-dice.csv": dice,
        "regret.csv": regret,
        "roofline.csv": roofline,
        "noise.csv": noise,
        "accounting.csv": accounting,
    }
    return [line for name, lines in sources.items() for line in lines(folder / name)]


def dice(path: Path) -> list[str]:
    """Seconds until the phantom's liver is segmented, ours against Opacus."""
    rows = table.read(path)
    by_rival: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_rival.setdefault(row["rival"], []).append(row)
    if not rows:
        return []
    first, parts = rows[0], []
    for rival, own in by_rival.items():
        reached = [row for row in own if row["reached"] == "True"]
        times = [float(row["processor_seconds"]) for row in reached]
        wall = [float(row["seconds"]) for row in reached]
        steps = [int(row["steps"]) for row in reached]
        each = statistics.median(float(row["processor_ms_per_step"]) for row in own)
        name = "dpkernels" if rival == "ours" else f"{rival} ({own[0]['mode']})"
        found = "never got there"
        if reached:
            found = (
                f"{statistics.median(wall):.1f} s, processor {statistics.median(times):.1f} s "
                f"({min(times):.1f} to {max(times):.1f}), {statistics.median(steps):.0f} steps of "
                f"{each:.0f} ms"
            )
        parts.append(f"{name} {found} ({len(reached)} of {len(own)} runs)")
    return [
        f"Whole training runs on the phantom ({first['side']}³, {first['patients']} patients) to a "
        f"Dice of {first['target_dice']} at epsilon {first['epsilon']}, medians: "
        + "; ".join(parts)
        + f". {_where(rows)}"
    ]


def regret(path: Path) -> list[str]:
    """What the planner's choices cost against the best measured candidates."""
    rows = table.read(path)
    if not rows:
        return []
    lines = []
    for title, prefix in (("The planner's choice", ""), ('plan="measured"', "measured_")):
        regrets = {r["shape"]: float(r[f"{prefix}regret"]) for r in rows}
        mean = statistics.geometric_mean(1.0 + value for value in regrets.values()) - 1.0
        above = sorted(
            (row for row in rows if regrets[row["shape"]] > _REGRET_SHOWN),
            key=lambda row: -regrets[row["shape"]],
        )
        listed = "; ".join(
            f"{r['shape']} {regrets[r['shape']]:.0%} ({r[f'{prefix}chosen']} for {r['best']})"
            for r in above
        )
        lines.append(
            f"{title} takes {mean:.1%} more time than the best measured candidate (geometric mean "
            f"of {len(rows)} shapes), at most {max(regrets.values()):.0%}."
            + (f" Above 10 %: {listed}." if listed else "")
            + f" {_where(rows)}"
        )
    return lines


def roofline(path: Path) -> list[str]:
    """Share of the roofline by op."""
    rows = table.read(path)
    if not rows:
        return []
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row["op"], []).append(float(row["share"]))
    parts = [
        f"{op} {' / '.join(f'{100 * share:.0f}' for share in own)} %" for op, own in shares.items()
    ]
    return [
        f"Kernels against the roofline of one core ({float(rows[0]['peak_gflops']):.0f} GFLOP/s, "
        f"{float(rows[0]['peak_gbytes_per_s']):.0f} GB/s, measured in the same run): "
        + ", ".join(parts)
        + f". {_where(rows)}"
    ]


def noise(path: Path) -> list[str]:
    """Throughput and the largest deviations from the normal law."""
    rows = {row["quantity"]: row for row in table.read(path)}
    rates = {name: float(row["value"]) for name, row in rows.items() if "per second" in name}
    tested = [row for row in rows.values() if number(row["deviation"]) is not None]
    lines = []
    if rates:
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        lines.append(f"Noise on one thread: {shown}. {_where(list(rows.values()))}")
    errors = [row for row in tested if "distance" not in row["quantity"]]
    distances = [row for row in tested if "distance" in row["quantity"]]
    if errors and distances:
        worst = max(errors, key=lambda row: abs(float(row["deviation"])))
        lines.append(
            f"{int(distances[0]['draws']):,} normals: {len(errors)} moments and tails up to "
            f"9 standard deviations differ from the exact law by at most "
            f"{abs(float(worst['deviation'])):.1f} standard errors ({worst['quantity']}); "
            f"Kolmogorov-Smirnov {float(distances[0]['deviation']):.2f} (1 % point 1.63)."
        )
    return lines


def accounting(path: Path) -> list[str]:
    """By accountant: over the budget it was calibrated for, and time."""
    rows = table.read(path)
    parts = []
    for name in dict.fromkeys(row["accountant"] for row in rows):
        own = [row for row in rows if row["accountant"] == name]
        answered = [row for row in own if number(row["over_nominal"]) is not None]
        if not answered:
            continue
        over = [float(row["over_nominal"]) for row in answered]
        seconds = [float(row["seconds"]) for row in answered]
        parts.append(
            f"{name} {len(answered)} of {len(own)} answered, epsilon {min(over):.4g} to "
            f"{max(over):.4g} of nominal, at most {max(seconds):.2g} s"
        )
    if not parts:
        return []
    return [f"Accountants, epsilon 0.01 to 1e15: {'; '.join(parts)}. {_where(rows)}"]


def _where(rows: list[dict[str, str]]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows if row.get("commit")}))
    dates = sorted({row["date"] for row in rows if row.get("date")})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
    return f"({span}, commit {commits})"
