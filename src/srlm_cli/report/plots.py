"""The plots of a run as inline SVG; a plot without data is an empty text."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from srlm_cli.evaluate.health import USUAL_SCORES
from srlm_cli.records import Record
from srlm_cli.report.collect import Round, Run
from srlm_cli.report.learned import lines
from srlm_cli.report.svg import SERIES, colour, draw, name_lines
from srlm_cli.report.tables import by_places, played, score_shares
from srlm_cli.report.words import LENGTH, number, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 400
PANELS_A_ROW = 4
SMOOTH_FROM = 20  # steps; shorter curves are not smoothed
CURVES = {  # (command, logged field): title, axis label, reference level and its name
    ("sft", "loss"): ("SFT loss", "nats per target token", None, ""),
    ("dpo", "loss"): ("DPO loss", "nats per pair", None, ""),
    ("dpo", "margin"): ("DPO reward margin", "chosen minus rejected", 0.0, "0"),
    ("dpo", "accuracy"): ("DPO pairs with a margin above 0", "% of a batch", 50.0, "50%"),
    ("kto", "loss"): ("KTO loss", "mean of the rows", None, ""),
    ("kto", "margin"): ("KTO reward margin", "desirable minus undesirable", 0.0, "0"),
    ("kto", "kl"): ("KTO estimate of the KL divergence", "nats per reply", 0.0, "0"),
    ("sft", "grad_norm"): ("SFT gradient norm", "before clipping", None, ""),
    ("dpo", "grad_norm"): ("DPO gradient norm", "before clipping", None, ""),
    ("kto", "grad_norm"): ("KTO gradient norm", "before clipping", None, ""),
}


def judge_plot(run: Run) -> str:
    """Return the plot of the judge's agreement with people by round, and of “the longest reply wins”."""
    rounds = [found for found in run.rounds if found.reward.row("pairwise_accuracy")]
    if not rounds:
        return ""
    series = {"pairwise_accuracy": ("judge", "own", "o"), "longest_wins": ("longest wins", "other", "s")}
    rows = {metric: [found.reward.row(metric) for found in rounds] for metric in series}
    halves = [found.reward.row("pairwise_accuracy_ties_half") for found in rounds]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axhline(50, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
        ends = [(50.0, "chance", "muted")]
        for shift, (metric, (name, hue, marker)) in zip((-0.05, 0.05), series.items(), strict=True):
            if heights := dots(axes, rows[metric], hue, marker, shift, 100):
                ends.append((heights[-1], name, hue))
        if all(halves):
            heights = [100 * row["value"] for row in halves]
            places = [at - 0.05 for at in range(len(rounds))]
            axes.plot(places, heights, "o", color=colour("own"), markerfacecolor=colour("paper"), zorder=3)
            ends.append((heights[-1], "ties as halves", "own"))
        by_round(axes, [found.name for found in rounds])
        known = [row for some in rows.values() for row in some if row]
        lowest, highest = min(map(low_of, known)), max(map(high_of, known))
        axes.set_ylim(10 * (min(40, 100 * lowest) // 10), -10 * (-max(60, 100 * highest) // 10))
        axes.set_ylabel("% of pairs ordered as people did")
        name_lines(axes, ends)

    return draw("judge", (WIDTH, 230), "Agreement of the judge with people by round", paint)


def calibration_plot(run: Run) -> str:
    """Return the plot of what people thought of replies by the judge's score, one panel per round.

    If people gave scores, the dashed line is where their mean is the judge's.
    """
    bins = {found.name: [row for row in found.reward.parts.get("bin", []) if in_plot(row)] for found in run.rounds}
    bins = {name: rows for name, rows in bins.items() if rows}
    if not bins:
        return ""
    columns = min(len(bins), PANELS_A_ROW)
    lines = -(-len(bins) // columns)
    scale = 100 if by_places(run) else 1

    def paint(figure: Figure) -> None:
        panels = list(figure.subplots(lines, columns, sharex=scale == 1, sharey=True, squeeze=False).flat)
        for axes, (name, rows) in zip(panels, bins.items(), strict=False):
            axes.set_title(name)
            if scale == 100:
                axes.axhline(50, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
            else:
                axes.axline((rows[0]["score"],) * 2, slope=1, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
            dots(axes, rows, "own", "o", scale=scale, places=[row["score"] for row in rows])
        if scale == 100:
            panels[0].set_ylim(0, 100)
        for axes in panels[len(bins) :]:
            axes.set_axis_off()
        figure.supxlabel("mean score of the judge in a bin", fontsize=8.5, color=colour("muted"))
        label = "% of the other replies ranked lower" if scale == 100 else "mean score by people"
        figure.supylabel(label, fontsize=8.5, color=colour("muted"))

    width = max(260, 150 * columns)
    return draw("calibration", (width, 40 + 170 * lines), "People's judgement by the judge's score, by round", paint)


def in_plot(row: Record) -> bool:
    """Return whether a row of the calibration has a place in a plot."""
    return all(isinstance(row.get(name), int | float) for name in ("score", "value"))


def score_plot(run: Run) -> str:
    """Return the plot of the scores that each round's judge gave, one panel per round."""
    shares = {found.name: score_shares(found) for found in run.rounds}
    shares = {name: share for name, share in shares.items() if share}
    if not shares:
        return ""
    columns = min(len(shares), PANELS_A_ROW)
    rows = -(-len(shares) // columns)
    means = {found.name: found.health.value("mean_score") for found in run.rounds}
    scores = sorted({*USUAL_SCORES, *(score for share in shares.values() for score in share)})

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, (name, share) in zip(panels, shares.items(), strict=False):
            heights = [100 * share.get(score, 0.0) for score in scores]
            axes.bar(scores, heights, width=0.72, color=colour("own"))
            for score, height in zip(scores, heights, strict=True):
                label = f"{height:.0f}" if height >= 0.5 or not height else "<1"
                axes.annotate(label, (score, height), (0, 2), textcoords="offset points", ha="center", fontsize=8)
            axes.set_title(name if means[name] is None else f"{name}, mean {number(means[name])}")
            axes.set_xticks(scores)
            axes.grid(False)
            axes.set_yticks([])
            axes.set_ylim(0, 1.12 * max(100 * part for some in shares.values() for part in some.values()))
        for axes in list(panels)[: rows * columns - len(shares)]:
            axes.set_axis_off()
        figure.supxlabel("score; % of all judgements above each bar", fontsize=8.5, color=colour("muted"))

    width = max(220, 135 * columns)
    return draw("scores", (width, 40 + 150 * rows), "Shares of the scores by round", paint)


def match_plot(run: Run) -> str:
    """Return the plot of wins, ties and losses between models, with the lengths of replies."""
    games = [(name, metrics) for name, metrics in played(run) if metrics.row("win")]
    if not games:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for at, (_, metrics) in enumerate(games):
            left = 0.0
            for name, hue in (("win", "own"), ("tie", "neutral"), ("loss", "other")):
                width = 100 * (metrics.value(name) or 0.0)
                axes.barh(at, width, left=left, height=0.62, color=colour(hue))
                label = f"{name} {width:.0f}%" if width >= 17 else f"{width:.0f}%" if width >= 7 else ""
                axes.text(left + width / 2, at, label, ha="center", va="center", color=colour("paper"), fontsize=8.5)
                left += width
            lengths = [value(metrics.row(name), LENGTH) for name in ("length", "baseline_length")]
            beside(axes, at, " / ".join(lengths), "ink")
        beside(axes, -0.72, "characters", "muted")
        axes.set_yticks(range(len(games)), [name for name, _ in games], color=colour("ink"))
        axes.set_ylim(len(games) - 0.5, -0.95)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of prompts")
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)

    return draw("matches", (1.05 * WIDTH, 62 + 34 * len(games)), "Wins, ties and losses by round", paint)


def beside(axes: Axes, height: float, text: str, hue: str) -> None:
    """Write a text to the right of the axes at a height of the data."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(text, (1, height), (6, 0), va="center", color=colour(hue), **place)


def rules_plot(run: Run) -> str:
    """Return the share of rules kept on held-out prompts by round."""
    kept = {found.name: row for found in run.rounds if (row := found.rules.row("rules_kept"))}
    if not kept:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        dots(axes, list(kept.values()), "own", "o", scale=100)
        by_round(axes, list(kept))
        axes.set_ylim(0, 100)
        axes.set_ylabel("% of rules kept")

    return draw("rules", (0.9 * WIDTH, 200), "Rules kept on held-out prompts by round", paint)


def learned_plot(run: Run, control: Run | None) -> str:
    """Return the plot of what was learned: rules kept, those of the control, and the judge beside lengths, by round."""
    made = lines(run, control)
    if not made:
        return ""
    marks = dict(zip(made, zip(SERIES, "osD^v", strict=True), strict=False))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = []
        for at, (name, rows) in enumerate(made.items()):
            hue, marker = marks[name]
            ends.append((dots(axes, rows, hue, marker, 0.06 * (at - len(made) / 2), 100)[-1], name, hue))
        by_round(axes, [found.name for found in run.rounds])
        axes.set_ylim(0, 100)
        axes.set_ylabel("% on held-out prompts")
        name_lines(axes, ends)

    return draw("learned", (1.3 * WIDTH, 260), "What was learned, by round", paint)


def length_plot(run: Run) -> str:
    """Return the lengths of the replies to held-out prompts, with their intervals, by round."""
    replies = {found.name: row for found in run.rounds if (row := run.reply_length(found))}
    if not replies:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        dots(axes, list(replies.values()), "own", "o")
        by_round(axes, list(replies))
        axes.set_ylim(0, longest_text(run))
        axes.set_ylabel("characters, mean")
        axes.set_title("Replies to the held-out prompts")

    return draw("lengths", (0.9 * WIDTH, 200), "Lengths of replies to held-out prompts by round", paint)


def pair_plot(run: Run) -> str:
    """Return the lengths of chosen and rejected replies, and of all that they were taken from, by round."""
    rounds = [found for found in run.rounds if found.pairs]
    if not rounds:
        return ""
    heights = {side: [found.pairs[side] for found in rounds] for side in ("chosen", "rejected")}
    of_all = [found.health.value("length") for found in rounds]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = []
        for (side, some), hue, marker, shift in zip(
            heights.items(), ("own", "other"), "os", (-0.04, 0.04), strict=True
        ):
            axes.plot([at + shift for at in range(len(rounds))], some, marker=marker, color=colour(hue))
            ends.append((some[-1], side, hue))
        if None not in of_all:
            axes.plot(range(len(rounds)), of_all, "_", markersize=14, color=colour("ink"))
            ends.append((of_all[-1], "all responses", "ink"))
        by_round(axes, [found.name for found in rounds])
        axes.set_ylim(0, longest_text(run))
        axes.set_ylabel("characters, mean")
        axes.set_title("Its own preference pairs")
        name_lines(axes, ends)

    return draw("pairs", (0.9 * WIDTH, 200), "Lengths of chosen and rejected replies by round", paint)


def longest_text(run: Run) -> float:
    """Return the upper limit of the axes of both length plots."""
    tops = [high_of(row) for found in run.rounds if (row := run.reply_length(found))]
    tops += [found.pairs[side] for found in run.rounds if found.pairs for side in ("chosen", "rejected")]
    tops += [length for found in run.rounds if found.pairs and (length := found.health.value("length"))]
    return 1.1 * max(tops)


def curve_plots(run: Run) -> list[str]:
    """Return the plots of the training curves, by step."""
    trained = [found for found in run.rounds if found.training]
    hues = {found.name: SERIES[at % len(SERIES)] for at, found in enumerate(trained)}
    plots = []
    for (command, key), (title, label, level, name) in CURVES.items():
        curves = {found.name: curve(found, key) for found in trained if found.training.get("command") == command}
        curves = {model: points for model, points in curves.items() if points}
        if (command, key) == ("dpo", "loss"):
            level, name = level_at_start(trained), "at start"
        if curves:
            plots.append(curve_plot(f"{command}-{key}", title, label, curves, hues, level, name))
    return plots


def level_at_start(trained: list[Round]) -> float | None:
    """Return the loss of DPO before its first step: ln 2 for most losses; None if the models differ in it."""
    starts = [found.training.get("start", {}) for found in trained if found.training.get("command") == "dpo"]
    losses = {round(start["loss"], 3) for start in starts if "loss" in start}
    return losses.pop() if len(losses) == 1 else None


def curve(found: Round, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of a logged field, without values that are not finite numbers."""
    scale = 100 if key == "accuracy" else 1
    steps = [(row.get("step", at), row.get(key)) for at, row in enumerate(found.steps, 1)]
    return [(step, scale * y) for step, y in steps if isinstance(y, int | float) and isfinite(y)]


def curve_plot(
    name: str,
    title: str,
    label: str,
    curves: dict[str, list[tuple[float, float]]],
    hues: dict[str, str],
    level: float | None,
    read: str,
) -> str:
    """Return a plot with a line per model: thin as logged, thick the running mean over a tenth of the steps."""
    longest = max(points[-1][0] for points in curves.values())

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = []
        if level is not None:
            axes.axhline(level, color=colour("muted"), linewidth=1, linestyle=(0, (4, 3)))
            ends.append((level, read, "muted"))
        for model, points in curves.items():
            steps, values = zip(*points, strict=True)
            smooth = running_mean(values, len(values) // 10) if len(values) >= SMOOTH_FROM else values
            if smooth is not values:
                axes.plot(steps, values, color=colour(hues[model]), linewidth=0.7, alpha=0.45)
            axes.plot(steps, smooth, color=colour(hues[model]), marker="o" if len(values) < SMOOTH_FROM else "")
            if steps[-1] > 0.9 * longest:
                ends.append((smooth[-1], model, hues[model]))
            else:
                place = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
                axes.annotate(model, (steps[-1], smooth[-1]), (6, 0), color=colour(hues[model]), **place)
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if name.endswith("accuracy"):
            axes.set_ylim(0, 104)
        name_lines(axes, ends)

    return draw(name, (WIDTH * 0.9, 190), title, paint)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over `window` values, over fewer at the ends."""
    half = max(window, 1) // 2
    around = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [sum(some) / len(some) for some in around]


# --- pieces ----------------------------------------------------------------------------------


def dots(
    axes: Axes,
    rows: Sequence[Record | None],
    hue: str,
    marker: str,
    shift: float = 0.0,
    scale: float = 1.0,
    places: Sequence[float] | None = None,
) -> list[float]:
    """Draw a metric with its intervals, by round or at other `places`; return the values as drawn."""
    places = range(len(rows)) if places is None else places
    known = {at + shift: row for at, row in zip(places, rows, strict=True) if row}
    heights = [scale * row["value"] for row in known.values()]
    bounds = [(row["value"] - low_of(row), high_of(row) - row["value"]) for row in known.values()]
    reach = [[scale * max(0.0, bound[side]) for bound in bounds] for side in (0, 1)]
    axes.errorbar(list(known), heights, yerr=reach, fmt=f"{marker}-", color=colour(hue), elinewidth=1)
    return heights


def low_of(row: Record) -> float:
    """Return the lower end of a metric's interval, or its value without an interval."""
    return row["value"] if row.get("ci_low") is None else row["ci_low"]


def high_of(row: Record) -> float:
    """Return the upper end of a metric's interval, or its value without an interval."""
    return row["value"] if row.get("ci_high") is None else row["ci_high"]


def by_round(axes: Axes, names: Sequence[str]) -> None:
    """Label each position with the name of its round."""
    axes.set_xticks(range(len(names)), names, color=colour("ink"))
    axes.set_xlim(-0.4, len(names) - 0.6)
