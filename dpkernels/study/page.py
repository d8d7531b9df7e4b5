"""The report of a study as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dpkernels.accounting.accountants import accountant_named
from dpkernels.study.campaign import Adversary
from dpkernels.study.results import UNLIKELY

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22303c; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #c7d0d8; text-align: right; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
img { max-width: 100%; } li { margin-bottom: .5rem; }
"""


def facts(cells: Sequence[Mapping[str, Any]], accountant: str, seeds: int) -> list[str]:
    """How the study was made, in sentences.

    Args:
        cells: as the runner stores them.
        accountant: what a budget means.
        seeds: runs for each budget.
    """
    plan, norms = cells[0]["plan"], [norm for cell in cells for norm in cell["data_norms"]]
    unit = plan["unit"]
    meaning = accountant_named(accountant).meaning
    if accountant != "tight":
        meaning += "; the table also gives what the same noise guarantees under a tight accountant"
    minutes = {
        part: sum(cell["seconds"][part] for cell in cells) / 60 for part in cells[0]["seconds"]
    }
    machine = cells[0]["environment"]
    packages = machine["packages"]
    views = plan["views_per_patient"]
    several = f" A step averages {views} views of a {unit}; the attacks are given one: easier."
    return [
        f"A budget epsilon is that of {meaning} (delta {plan['delta']:g}).",
        f"{plan['patients']} training {unit}s, {plan['steps']} steps, sample rate "
        f"{plan['sample_rate']:.4g}, that is {plan['sample_rate'] * plan['patients']:g} {unit}s a "
        f"step on average; clipping bound C = {plan['max_grad_norm']:g}. A {unit} joins "
        f"{plan['sample_rate'] * plan['steps']:.3g} updates on average.",
        f"{seeds} run{'s' if seeds > 1 else ''} for each budget, with other initialisations and "
        f"splits; utility is {cells[0]['metric']} ({next(iter(cells[0]['summary']))}) of held-out "
        f"{unit}s, its spread the standard deviation over the runs.",
        f"Attacked: {len(cells[0]['data_norms'])} training {unit}s of each run, of "
        f"{cells[0]['dimension']} values each, with Euclidean norms from {min(norms):.3g} to "
        f"{max(norms):.3g}. Every attack reads the gradient that the engine really releases, with "
        "the run's own clipping bound and noise. NCC is the correlation of record and "
        "reconstruction (0: nothing in common, 1: the same up to brightness and contrast), SSIM "
        "the likeness of their structures (1: the same), both the median over the attacked "
        "records; chance is what as many candidates of pure noise reach."
        + (several if views > 1 else ""),
        "Bounds, which no attack can pass: worst case and relaxed are the largest probability of "
        f"picking the right one among {plan['patients']} candidates from the whole run, for an "
        "attacker who knows the gradient of every candidate, or only how large it is. NCC bounds "
        "are correlations that a reconstruction without prior knowledge exceeds with probability "
        f"{UNLIKELY:.0%} at most, for a record whose whole norm is signal; the best of many "
        "candidates may.",
        f"The steps of all runs took {minutes['training']:.1f} minutes and the attacks "
        f"{minutes['attacks']:.1f}, on {machine['gpu'] or machine['device']} with "
        f"{machine['threads']} threads; dpkernels {packages['dpkernels']}, "
        f"torch {packages['torch']}, {machine['started'][:10]}.",
    ]


def render(
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    sentences: Sequence[str],
    made: Sequence[str],
    adversaries: Mapping[str, Adversary],
    images: Mapping[str, Path],
) -> str:
    """The page.

    Args:
        head, body: of the table.
        sentences: the conclusion.
        made: how the study was made.
        adversaries: who attacked.
        images: title to PNG file; they are embedded.
    """
    columns = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in line)}</tr>\n" for line in body
    )
    figures = "".join(
        f"<h2>{escape(title)}</h2>\n<img alt='{escape(title)}' src='data:image/png;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'>\n"
        for title, path in images.items()
    )
    who = "".join(
        f"<li><b>{escape(a.title)}</b>: {escape(a.reading)}</li>\n" for a in adversaries.values()
    )
    return (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
        "<title>Privacy, utility and reconstruction risk</title>"
        f"<style>{_STYLE}</style>\n<h1>Privacy, utility and reconstruction risk</h1>\n"
        f"<h2>What these data bear</h2>\n<ul>\n{_items(sentences)}</ul>\n"
        f"<h2>Table</h2>\n<table><thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody></table>\n"
        f"{figures}<h2>Who attacks</h2>\n<ul>\n{who}</ul>\n"
        f"<h2>How it was made</h2>\n<ul>\n{_items(made)}</ul>\n</html>\n"
    )


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
