"""The picture for the README: pause and stall by dirty rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from benchlib.measure import BACKGROUND, FILE, FLOOR, PAUSED, PRECOPY, Run
from benchlib.report import median

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Colours that colour-blind readers can tell apart (Okabe and Ito); markers besides.
STYLES = {
    BACKGROUND: ("#0072b2", "o", "-", 2.2),
    FLOOR: ("#56b4e9", "v", ":", 1.4),
    FILE: ("#e69f00", "D", "--", 1.4),
    PRECOPY: ("#d55e00", "s", "-", 1.6),
    PAUSED: ("#999999", "^", "-", 1.6),
}
NAMES = {
    BACKGROUND: "snaporch background",
    FLOOR: "bare QMP (floor)",
    FILE: "bare QEMU to file:",
    PRECOPY: "snaporch precopy",
    PAUSED: "snaporch paused",
}
INK, FAINT = "#333333", "#dddddd"


def _label(value: float, _: int) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"  # noqa: PLR2004


def draw(runs: Sequence[Run], path: Path, subtitle: str) -> None:
    """Draw the runs of one size of RAM to a PNG."""
    rates = sorted({run.dirty for run in runs})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True, layout="constrained")
    for axis, name, title in zip(
        axes,
        ("pause", "stall"),
        ("Pause: the guest does not run", "Stall: the longest the guest waits"),
        strict=True,
    ):
        for contender, (colour, marker, line, width) in STYLES.items():
            groups = [
                [getattr(r, name) * 1e3 for r in runs if (r.contender, r.dirty) == (contender, d)] for d in rates
            ]
            known = [(at, group) for at, group in enumerate(groups) if group]
            if not known:
                continue
            places, values = [at for at, _ in known], [group for _, group in known]
            axis.plot(
                places,
                [median(group) for group in values],
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=width,
                markersize=5.5,
                label=NAMES[contender],
            )
            axis.vlines(
                places, [min(g) for g in values], [max(g) for g in values], color=colour, alpha=0.35, linewidth=3
            )
        axis.set_title(title, fontsize=10.5, color=INK, loc="left")
        axis.set_yscale("log")
        axis.set_xticks(range(len(rates)), [str(rate) for rate in rates])
        axis.set_xlim(-0.25, len(rates) - 0.75)
        axis.set_xlabel("memory dirtied by the guest, MB/s", fontsize=9, color=INK)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(_label))
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9, length=0)
        axis.tick_params(which="minor", length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(FAINT)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(subtitle, fontsize=9, color="#666666", x=0.01, ha="left")
    figure.savefig(path, dpi=200)
    plt.close(figure)
