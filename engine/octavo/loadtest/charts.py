"""Line charts as inline SVG: no script, no font and no file from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 560
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 44
SERIES: Final = 8
"""Colours that the page's style has: classes s0 to s7."""
_LOG_SPAN = 20.0
"""Largest by smallest value from which on the y axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named line."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    begin: float
    """Pixel of `low`."""
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.begin + part * (self.end - self.begin), 1)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 2000 else (1,)
            values = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = _step(self.high - self.low)
            values = [step * count for count in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]


def line_chart(
    title: str, x_title: str, y_title: str, series: Sequence[Series], *, markers: bool, limit: float | None = None
) -> str:
    """An <svg> with a line per series that has points; `limit`: a dashed line at this y. "" where there is nothing."""
    shown = [line for line in series if line.points]
    if not shown:
        return ""
    x_axis, y_axis = _axes(shown, limit)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
        *_grid(x_axis, y_axis),
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_title)}</text>',
        f'<text class="axis" transform="translate(12 {HEIGHT / 2}) rotate(-90)">{escape(y_title)}</text>',
    ]
    if limit is not None:
        y = y_axis(limit)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
    for number, line in enumerate(shown):
        parts += _line(line, number % SERIES, x_axis, y_axis, markers)
    return "\n".join([*parts, "</svg>"]) + legend([line.name for line in shown])


def legend(names: Sequence[str]) -> str:
    """The names beside their colours."""
    items = [f'<li><i class="s{number % SERIES}"></i>{escape(name)}</li>' for number, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _axes(series: Sequence[Series], limit: float | None) -> tuple[Axis, Axis]:
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + ([limit] if limit is not None else [])
    positive = [y for y in ys if y > 0]
    log = len(positive) == len(ys) and max(ys) / min(ys) > _LOG_SPAN
    x_axis = Axis(0.0, max(xs) or 1.0, _LEFT, WIDTH - _RIGHT, False)
    return x_axis, Axis(min(ys) if log else 0.0, max(ys) or 1.0, HEIGHT - _BOTTOM, _TOP, log)


def _step(span: float) -> float:
    """A round distance that divides `span` into about five."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= rough), 10 * power)


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_axis.ticks():
        parts.append(
            f'<text class="tick" x="{x_axis(value)}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        )
    return parts


def _line(line: Series, colour: int, x_axis: Axis, y_axis: Axis, markers: bool) -> list[str]:
    path = " ".join(f"{x_axis(x)},{y_axis(y)}" for x, y in line.points)
    parts = [f'<polyline class="s{colour}" points="{path}"><title>{escape(line.name)}</title></polyline>']
    if markers:
        parts += [
            f'<circle class="s{colour}" cx="{x_axis(x)}" cy="{y_axis(y)}" r="4">'
            f"<title>{escape(line.name)}: {y:.4g} at {x:.4g}</title></circle>"
            for x, y in line.points
        ]
    return parts
