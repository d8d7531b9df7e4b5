"""What the rows of the other benches say, in lines for a terminal, the README and the notes."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import regret as regrets
from bench import table
from bench.results import RESULTS
from bench.table import number

#: what the planner may cost at most
_REGRET_WANTED = 0.10
#: shapes named in a line
_WORST = 3


def headlines(folder: Path = RESULTS) -> list[str]:
    """What a user of the package asks first: whole runs, the planner, the noise."""
    found = [
        dice(folder / "time-to-dice.csv"),
        regret(folder / "regret.csv"),
        noise(folder / "noise.csv"),
    ]
    return [lines[0] for lines in found if lines]


def all_lines(folder: Path = RESULTS) -> list[str]:
    """One or a few lines for each bench that has rows."""
    sources = {
        "time-to-dice.csv": dice,
        "regret.csv": regret,
        "ops_cpu.csv": gradients,
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
    for title, prefix in (("the planner's choice", ""), ('plan="measured"', "measured_")):
        regrets = {r["shape"]: float(r[f"{prefix}regret"]) for r in rows}
        mean = statistics.geometric_mean(1.0 + value for value in regrets.values()) - 1.0
        above = sorted(
            (row for row in rows if regrets[row["shape"]] > _REGRET_WANTED),
            key=lambda row: -regrets[row["shape"]],
        )
        listed = "; ".join(
            f"{r['shape']} {regrets[r['shape']]:.0%} ({r[f'{prefix}chosen']}; best {r['best']})"
            for r in above
        )
        lines.append(
            f"Regret, {title} over the best measured candidate: {mean:.1%} in the "
            f"geometric mean of {len(rows)} shapes, at most {max(regrets.values()):.0%}, above "
            f"{_REGRET_WANTED:.0%} at {len(above)}{': ' if above else ''}{listed}. {_where(rows)}"
        )
    return lines


def strategies(path: Path = regrets.PATH) -> list[str]:
    """Where each strategy takes over: the best measured one and the chosen one, by shape."""
    rows = table.read(path)
    if not rows:
        return []
    head = (
        "Where each strategy takes over, one parameter's norms, clip and sum on one thread: the "
        "strategy that is fastest as measured, in brackets the time of the next one over its own "
        f"(a strategy {regrets.FAR_SLOWER:.0f} times as slow is not timed). In bold: shapes where "
        f"the planner takes another one. {_where(rows)}"
    )
    grids: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        family, *rest = row["shape"].split()
        line, column = " ".join(rest), "fastest"
        if family == "linear":
            line, column = " ".join(rest[:-1]), rest[-1]
        grids.setdefault(family, {}).setdefault(line, {})[column] = _taken(row)
    return [head, *(_grid(family, grid) for family, grid in grids.items())]


def _grid(family: str, grid: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for line in grid.values() for column in line))
    lines = [f"| {family} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, line in grid.items():
        lines.append(f"| {name} | {' | '.join(line.get(c, '–') for c in columns)} |")
    return "\n".join(lines)


def _taken(row: dict[str, str]) -> str:
    """Of a row of regret: the fastest strategy, the next one, and what the planner took instead."""
    times: dict[str, float] = {}
    for candidate in row["candidates"].split("; "):
        name, _, taken = candidate.rpartition(", ")[0], "", candidate.split()[-2]
        times[name] = min(times.get(name, float("inf")), float(taken))
    order = sorted(times, key=times.__getitem__)
    others = ", ".join(f"{name} {times[name] / times[order[0]]:.2f}" for name in order[1:])
    text = f"{order[0]} ({others})" if others else order[0]
    chosen = row["chosen"].partition(",")[0]
    return text if chosen == order[0] else f"**{text}, taken: {chosen}**"


def roofline(path: Path) -> list[str]:
    """How much of the roofline the ops reach, and which reach the least."""
    rows = table.read(path)
    if not rows:
        return []
    shares = sorted((float(row["share"]), f"{row['op']} {row['shape']}") for row in rows)
    least = ", ".join(f"{name} {share:.0%}" for share, name in shares[:_WORST])
    return [
        f"Ops against the roofline of one core ({float(rows[0]['peak_gflops']):.0f} GFLOP/s, "
        f"{float(rows[0]['peak_gbytes_per_s']):.0f} GB/s, measured in the same run): "
        f"{statistics.median(share for share, _ in shares):.0%} in the median of {len(rows)} "
        f"shapes; least: {least}. {_where(rows)}"
    ]


def roofline_table(path: Path = RESULTS / "roofline.csv") -> list[str]:
    """Every op and shape of the roofline bench."""
    rows = table.read(path)
    if not rows:
        return []
    lines = ["| op | shape | bound by | ms | share of the roofline |", "|---|---|---|---:|---:|"]
    for row in rows:
        cells = (row["op"], row["shape"], row["bound"], row["ms"], f"{float(row['share']):.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return ["\n".join(lines)]


def gradients(path: Path) -> list[str]:
    """Per-sample gradients by our ops over the library's one gradient of the batch."""
    rows = table.read(path)
    if not rows:
        return []
    found = sorted(((float(row["ours"]), row["shape"]) for row in rows), reverse=True)
    most = ", ".join(f"{shape} {ratio:.2f}" for ratio, shape in found[:_WORST])
    return [
        f"Per-sample gradients of a layer over the library's gradient of the batch: "
        f"{statistics.geometric_mean(ratio for ratio, _ in found):.2f} times its time in the "
        f"geometric mean of {len(rows)} shapes; most: {most}. {_where(rows)}"
    ]


def noise(path: Path) -> list[str]:
    """Throughput and the largest deviations from the normal law."""
    rows = {row["quantity"]: row for row in table.read(path)}
    rates = {name: float(row["value"]) for name, row in rows.items() if "per second" in name}
    tested = [row for row in rows.values() if number(row["deviation"]) is not None]
    lines = []
    if rates:
        shown = ", ".join(f"{name.partition(',')[0]} {rate:.0f}" for name, rate in rates.items())
        where = _where(list(rows.values()))
        lines.append(f"Noise on one thread, million normals per second: {shown}. {where}")
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
    return f"({table.provenance(rows)})"
