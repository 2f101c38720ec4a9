# SPDX-License-Identifier: BSD-2-Clause
"""The ratios to danted as a bar chart in SVG.

The axis is logarithmic and the bars begin at 1, so that twice as fast and half as fast are
equally long.  Whiskers reach from the least to the greatest ratio of all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from report import BASE, Results, Spread, compared, ratio_spread, show
from work import Row

WIDTH, LABEL_WIDTH, MARGIN = 960, 330, 24
BAR_HEIGHT, BAR_GAP, ROW_GAP = 12, 2, 12
TOP = 64
NUMBER_WIDTH = 48  # room for the numbers beside the bars
COLORS = {"sockd": "#1f6f8b", "microsocks": "#b0b7bd", "danted-batch": "#d9a441"}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
STYLE = "font-family: sans-serif; font-size: 12px; fill: #222"

Bars = list[tuple[str, Spread]]


def find_bars(results: Results) -> list[tuple[Row, Bars]]:
    """Return the rows that have a ratio, each with its bars."""
    found = []
    for row in results.rows:
        ratios = [(name, ratio_spread(results, name, BASE, row.key)) for name in compared(results)]
        bars = [(name, ratio) for name, ratio in ratios if ratio and ratio.least > 0]
        if bars and row.has_ratio:
            found.append((row, bars))
    return found


class Axis:
    """A logarithmic axis wide enough for all the bars."""

    def __init__(self, rows: list[tuple[Row, Bars]]) -> None:
        spreads = [ratio for _, bars in rows for _, ratio in bars]
        ratios = [end for ratio in spreads for end in (ratio.least, ratio.most)]
        self.low = max((tick for tick in TICKS if tick <= min(ratios)), default=min(ratios))
        self.high = min((tick for tick in TICKS if tick >= max(ratios)), default=max(ratios))
        self.low, self.high = min(self.low, 0.5), max(self.high, 2.0)

    def x(self, ratio: float) -> float:
        """Return where a ratio lies."""
        left, right = LABEL_WIDTH + NUMBER_WIDTH, WIDTH - MARGIN - NUMBER_WIDTH
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return left + share * (right - left)

    def ticks(self) -> list[float]:
        return [tick for tick in TICKS if self.low <= tick <= self.high]


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def draw_bar(axis: Axis, y: float, name: str, ratio: Spread) -> Iterator[str]:
    """Yield one bar from 1 to the median, with its whisker and its number."""
    start, end = sorted((axis.x(1), axis.x(ratio.median)))
    color, middle = COLORS.get(name, "#777777"), y + BAR_HEIGHT / 2
    yield (
        f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 1):.1f}" '
        f'height="{BAR_HEIGHT}" fill="{color}"/>'
    )
    least, most = axis.x(ratio.least), axis.x(ratio.most)
    yield line(least, middle, most, middle, "#222")
    yield from (line(x, middle - 3, x, middle + 3, "#222") for x in (least, most))
    if ratio.median >= 1:
        yield text(max(most, end) + 5, y + BAR_HEIGHT - 2, show(ratio.median))
    else:
        yield text(min(least, start) - 5, y + BAR_HEIGHT - 2, show(ratio.median), "end")


def draw_row(axis: Axis, y: float, row: Row, bars: Bars) -> Iterator[str]:
    """Yield a row's title and its bars."""
    title = row.title + (" (less is better)" if row.less_is_better else "")
    height = len(bars) * (BAR_HEIGHT + BAR_GAP)
    yield text(LABEL_WIDTH - 8, y + height / 2 + 3, title, "end")
    for index, (name, ratio) in enumerate(bars):
        yield from draw_bar(axis, y + index * (BAR_HEIGHT + BAR_GAP), name, ratio)


def draw_frame(axis: Axis, height: float, names: list[str]) -> Iterator[str]:
    """Yield the legend and the axis."""
    yield text(MARGIN, 22, f"Ratio to {BASE}, same machine and round (whiskers: least to most)")
    for index, name in enumerate(names):
        x = LABEL_WIDTH + NUMBER_WIDTH + index * 140
        yield f'<rect x="{x}" y="32" width="12" height="12" fill="{COLORS.get(name, "#777777")}"/>'
        yield text(x + 18, 42, name)
    for tick in axis.ticks():
        color = "#222" if tick == 1 else "#dddddd"
        yield line(axis.x(tick), TOP - 6, axis.x(tick), height - MARGIN, color)
        yield text(axis.x(tick), height - 8, f"{tick:g}", "middle")


def make_chart(results: Results) -> str:
    """Return the chart, "" when there is no ratio to draw."""
    rows = find_bars(results)
    if not rows:
        return ""
    axis = Axis(rows)
    tops = [float(TOP)]
    for _, bars in rows:
        tops.append(tops[-1] + len(bars) * (BAR_HEIGHT + BAR_GAP) + ROW_GAP)
    height = tops[-1] + MARGIN
    parts = list(draw_frame(axis, height, compared(results)))
    for top, (row, bars) in zip(tops, rows, strict=False):
        parts += draw_row(axis, top, row, bars)
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    background = f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    body = "\n".join((background, *parts))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">\n{body}\n</svg>\n'
