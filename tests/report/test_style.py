"""The style of figures: colours, ticks and names."""

import math
from itertools import combinations

import numpy as np
import pytest

from consensus import POTENTIALS
from consensus.report.style import (
    COLOURS,
    STYLES,
    axis_label,
    fit_axis,
    house_style,
    new_figure,
    power,
    printable,
    series_style,
    styles,
)
from consensus.report.table1 import METHODS

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
DEUTERANOPIA = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]
PROTANOPIA = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(colour, seen_by=None):
    """CIE L*a*b* under D65 of a colour such as #0072B2, as a dichromat sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    if seen_by is not None:
        linear = np.clip(np.array(seen_by) @ linear, 0.0, 1.0)
    xyz = np.array(TO_XYZ) @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_lab_of_known_colours():
    # the L*a*b* of sRGB red, as published
    np.testing.assert_allclose(lab("#FF0000"), [53.24, 80.09, 67.20], atol=0.02)
    np.testing.assert_allclose(lab("#FFFFFF", DEUTERANOPIA), [100, 0, 0], atol=0.1)


@pytest.mark.parametrize("seen_by", [None, DEUTERANOPIA, PROTANOPIA])
def test_colours_are_told_apart_by_a_dichromat(seen_by):
    """A distance of 2.3 is just noticed; red and green of matplotlib's cycle are near that."""
    apart = min(
        float(np.linalg.norm(lab(a, seen_by) - lab(b, seen_by)))
        for a, b in combinations(COLOURS, 2)
    )
    assert apart > 15.0
    white = min(float(np.linalg.norm(lab(c, seen_by) - lab("#FFFFFF"))) for c in COLOURS)
    assert white > 25.0


def test_every_potential_and_method_has_its_own_colour_and_dash():
    assert STYLES.keys() == {*POTENTIALS, *METHODS.values()}
    pairs = [(style["color"], style["linestyle"]) for style in STYLES.values()]
    assert len(set(pairs)) == len(pairs)


def test_a_name_has_the_same_style_in_every_figure():
    assert styles(["tan", "mine"])["mine"] == styles(["quad", "mine", "tan"])["mine"]
    assert styles(["tan"])["tan"] == STYLES["tan"]
    found = styles([*STYLES, *"abcdefgh"])
    assert len({(s["color"], s["linestyle"]) for s in found.values()}) == len(found)
    assert len(styles(map(str, range(100)))) == 100, "more than there are styles"
    assert len({(series_style(i)["color"], series_style(i)["linestyle"]) for i in range(28)}) == 28


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (60.0, "60"),
        (0.002, "0.002"),
        (5e4, "50000"),
        (1e5, "$10^{5}$"),
        (2e-4, r"$2\cdot10^{-4}$"),
        (1e21, "$10^{21}$"),
    ],
)
def test_numbers_at_a_logarithmic_axis(value, text):
    assert power(value) == text


def axis_for(values, **options):
    with house_style():
        figure, axes = new_figure(1, 1)
        axis = axes[0][0]
        axis.plot(range(len(values)), values)
        fit_axis(axis, values, **options)
        figure.draw_without_rendering()
    return axis


def test_the_ticks_of_a_logarithmic_axis_are_numbers():
    axis = axis_for([60.0, 700.0], log=True)
    low, high = axis.get_ylim()
    shown = {
        label.get_text(): place
        for place, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        if low <= place <= high
    }
    assert shown == {"100": 100.0, "200": 200.0, "500": 500.0}
    assert not axis.yaxis.get_minorticklocs().tolist()


def test_the_scale_and_the_ends_of_an_axis():
    assert axis_for([100.0, 300.0], log=True).get_yscale() == "linear", "too narrow for decades"
    assert axis_for([0.0, 300.0], log=True).get_yscale() == "linear"
    assert axis_for([1.0, 300.0], log=False).get_ylim()[0] == 0.0
    assert axis_for([-1.0, 300.0], log=False).get_ylim()[0] < -1.0
    assert axis_for([0.0, 0.0], log=False).get_ylim() == (0.0, 1.0)
    assert axis_for([math.nan], log=True).get_yscale() == "linear"
    with house_style():
        _, axes = new_figure(1, 1)
        axes[0][0].plot([0, 1, 2], [1.0, 100.0, 1e21])
        fit_axis(axes[0][0], [1.0, 100.0], log=True, clip=True)
    # a twentieth of the two decades on both sides
    np.testing.assert_allclose(axes[0][0].get_ylim(), [10**-0.1, 10**2.1])


def test_labels_have_units():
    assert axis_label("test_error") == "test error (%)"
    assert axis_label("objective") == "objective (sum)"
    assert axis_label("validation_loss") == "validation loss (sum)"
    assert axis_label("test_mae") == "test mae (mean)"
    assert axis_label("wall_s") == "wall time (s)"


def test_printable_escapes_what_no_font_draws():
    assert printable("a\tb\x00é") == "a\\tb\\x00é"
