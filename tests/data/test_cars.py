"""The drawn cars: a pure function of (seed, index), fair in their attributes, antialiased, all
different.
"""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from examples.cars.painting import Canvas, rgb
from examples.cars.source import BODIES, OPTIONS, RARE, Attributes, Cars, draw

SOME = [Attributes(body=body, light=light) for body in BODIES for light in OPTIONS["light"]]


def digest(images):
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def change(a, b):
    """Where two pictures differ: bool (h, w)."""
    return (a != b).any(axis=0)


@pytest.fixture(scope="module")
def table():
    cars = Cars(n=6000, seed=3)
    return [cars.attributes(i) for i in range(len(cars))]


# --- a pure function of (seed, index)
# ---------------------------------------------------------------------


def test_another_process_draws_the_same_bytes_in_another_order():
    indices = [5, 0, 17, 3, 9999]
    code = (
        "import hashlib; from examples.cars.source import Cars; cars = Cars(seed=7, size=33)\n"
        f"images = {{i: cars.decode(i).tobytes() for i in {sorted(indices, reverse=True)}}}\n"
        f"print(hashlib.sha256(b''.join(images[i] for i in {indices})).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    here = Cars(seed=7, size=33)
    assert there.strip() == digest(here.decode(i) for i in indices)
    assert there.strip() != digest(Cars(seed=8, size=33).decode(i) for i in indices)


def test_n_and_size_do_not_change_the_cars():
    small, large = Cars(n=20, size=16), Cars(n=2000, size=64)
    assert [small.attributes(i) for i in range(20)] == [large.attributes(i) for i in range(20)]


def test_numpy_integers_are_integers():
    cars = Cars(n=20, size=16)
    assert cars.attributes(np.int64(4)) == cars.attributes(4)
    assert cars.name(np.int64(4)) == "car-00000004"


def test_drawing_leaves_no_trace_on_the_shared_scene():
    plain, busy = (
        Attributes(body="hatchback", light="night"),
        Attributes(body="bus", light="night", direction="left"),
    )
    before = draw(plain, 32)
    draw(busy, 32)
    assert np.array_equal(draw(plain, 32), before)


def test_key_tells_all_data_sets_apart(monkeypatch):
    sets = [{}, {"n": 500}, {"size": 64}, {"seed": 1}]
    keys = [Cars(**kwargs).key for kwargs in sets]
    monkeypatch.setattr("examples.cars.source.DRAWING", -1)
    keys.append(Cars().key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("index", [-1, 20, 10**6])
def test_out_of_range(index):
    cars = Cars(n=20)
    for method in (cars.decode, cars.label, cars.name, cars.attributes):
        with pytest.raises(IndexError, match=r"0 to 19"):
            method(index)


@pytest.mark.parametrize(("options", "key"), [({"n": 0}, "n=0"), ({"size": 0}, "size=0")])
def test_options_out_of_range_name_their_key(options, key):
    with pytest.raises(ValueError, match=key):
        Cars(**options)


# --- attributes
# ------------------------------------------------------------------------------------------


def test_labels_are_the_bodies():
    cars = Cars(n=200, seed=1)
    assert all(cars.classes[cars.label(i)] == cars.attributes(i).body for i in range(len(cars)))
    assert set(cars.classes) == set(BODIES)


def test_one_body_is_rare_and_the_others_are_equally_frequent(table):
    count = Counter(a.body for a in table)
    assert 0.015 < count.pop(RARE) / len(table) < 0.025
    expected = sum(count.values()) / len(count)
    assert len(count) == len(BODIES) - 1
    assert (
        sum((c - expected) ** 2 / expected for c in count.values()) < 22.5
    )  # chi-square, 6 degrees, p = 0.001


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "body"])
def test_values_are_equally_frequent(table, name):
    count = Counter(getattr(a, name) for a in table)
    expected = len(table) / len(OPTIONS[name])
    assert set(count) == set(OPTIONS[name])
    assert (
        sum((c - expected) ** 2 / expected for c in count.values()) < 24.4
    )  # 7 degrees or fewer, p = 0.001


def dependence(xs, ys):
    """Chi-square of independence over its degrees of freedom, in standard deviations from its
    mean.
    """
    joint, x, y = Counter(zip(xs, ys, strict=True)), Counter(xs), Counter(ys)
    expected = {(a, b): x[a] * y[b] / len(xs) for a in x for b in y}
    degrees = (len(x) - 1) * (len(y) - 1)
    return (sum((joint[k] - e) ** 2 / e for k, e in expected.items()) - degrees) / (
        2 * degrees
    ) ** 0.5


@pytest.mark.parametrize(("one", "other"), list(combinations(OPTIONS, 2)))
def test_attributes_are_independent(table, one, other):
    assert dependence([getattr(a, one) for a in table], [getattr(a, other) for a in table]) < 4


def test_dependence_is_noticed(table):
    paints = [a.paint for a in table]
    tied = ["right" if a.paint == "red" else a.direction for a in table]
    assert dependence(paints, tied) > 100


def test_jitter_fills_its_range(table):
    for name in ("shift", "scale", "pan"):
        values = np.array([getattr(a, name) for a in table])
        assert -1 <= values.min() < -0.99
        assert 0.99 < values.max() <= 1
        assert abs(values.mean()) < 4 * 3**-0.5 / len(table) ** 0.5


# --- the picture
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 17, 31, 32, 33, 64, 100, 256])
def test_any_size(size):
    image = Cars(n=5, size=size).decode(2)
    assert image.shape == (3, size, size)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


@pytest.mark.parametrize("size", [16, 24, 33, 64])
def test_twice_the_size_reduced_is_the_same_picture(size):
    for a in SOME[:: 1 if size < 64 else 5]:
        a = replace(a, shift=0.37, pan=-0.61)
        large = draw(a, 2 * size).astype(float).reshape(3, size, 2, size, 2).mean((2, 4))
        small = draw(a, size).astype(float)
        assert np.abs(large - small).mean() < 3.0
        assert (
            np.abs(large - np.roll(small, 1, axis=2)).mean() > 3.0
        )  # a pixel's shift would be noticed


def test_edges_take_intermediate_values():
    canvas = Canvas(16)
    canvas.polygon(((0.1, 0.1), (0.5, 0.9), (0.9, 0.1)), rgb("ffffff"))
    image = canvas.pixels()[0]
    assert image[12, 8] == 255
    assert image[0, 0] == 0
    assert len(np.unique(image)) > 8
    assert image.sum() / 255 / 16**2 == pytest.approx(0.32, abs=0.005)  # the triangle's area


def test_rounded_path_of_a_canvas_is_clipped():
    canvas = Canvas(16)
    with canvas.inside(((0.25, 0.25), (0.25, 0.75), (0.75, 0.75), (0.75, 0.25))):
        canvas.gradient(1.0, 0.0, rgb("ffffff"), rgb("808080"))
    image = canvas.pixels()[0]
    inside = np.zeros((16, 16), dtype=bool)
    inside[4:12, 4:12] = True
    assert (image[~inside] < 30).all()  # up to half a subpixel of the edge's own width
    assert (image[5:11, 5:11] > 128).all()
    assert (np.diff(image[5:11, 8].astype(int)) < 0).all()


REGION = {  # rows and columns, as shares, that hold most of what the attribute changes
    "paint": (slice(0.3, 0.85), slice(0.0, 1.0)),
    "wheels": (slice(0.65, 0.9), slice(0.1, 0.9)),
    "windows": (slice(0.4, 0.65), slice(0.2, 0.8)),
    "backdrop": (slice(0.0, 0.76), slice(0.0, 1.0)),
}


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_value_changes_the_picture(name, size):
    pictures = [draw(replace(Attributes(), **{name: value}), size) for value in OPTIONS[name]]
    rows, columns = REGION.get(name, (slice(0, 1), slice(0, 1)))
    for a, b in combinations(pictures, 2):
        where = change(a, b)
        there = where[
            int(rows.start * size) : int(rows.stop * size),
            int(columns.start * size) : int(columns.stop * size),
        ]
        assert there.sum() > 0.012 * size**2
        assert there.sum() == where.sum()  # and nothing elsewhere
        assert np.abs(a.astype(int) - b)[:, where].mean() > 10  # an eye sees it


@pytest.mark.parametrize("name", ["shift", "scale", "pan"])
def test_jitter_changes_the_picture(name):
    assert change(
        draw(replace(Attributes(), **{name: -1.0}), 32),
        draw(replace(Attributes(), **{name: 1.0}), 32),
    ).any()


@pytest.mark.parametrize("body", list(BODIES))
def test_left_is_the_mirror_image_of_right(body):
    def car(direction):
        images = [
            draw(Attributes(body=body, direction=direction, backdrop=b, shift=0.5), 64)
            for b in OPTIONS["backdrop"]
        ]
        same = ~np.logical_or.reduce([change(images[0], image) for image in images[1:]])
        same[52:] = same[:20] = False  # sky and road are the same everywhere, too
        return images[0], same

    (right, where), (left, there) = car("right"), car("left")
    both = where & there[:, ::-1]
    assert both.sum() > 300
    assert np.array_equal(right[:, both], left[:, :, ::-1][:, both])
    assert not np.array_equal(right[:, where], left[:, where])


def test_the_car_fills_most_of_the_width_and_stays_in_the_picture():
    for body in BODIES:
        for shift, scale in ((-1.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
            red, blue = (
                draw(Attributes(body=body, paint=p, shift=shift, scale=scale), 64)
                for p in ("red", "blue")
            )
            columns = np.flatnonzero(change(red, blue).any(axis=0))
            assert columns[-1] - columns[0] > 0.62 * 64
            assert columns[0] >= 0
            assert columns[-1] <= 63
