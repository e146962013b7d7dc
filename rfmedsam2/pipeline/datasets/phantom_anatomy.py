"""The phantom's anatomy: shapes, positions and variation of the structures of an upper abdomen.

All lengths are millimeters of an adult body in LPS coordinates (+x the patient's left, +y posterior, +z superior), with
the origin in the middle of the field of view, which spans `FIELD_MM`. Positions and sizes are typical values of
anatomy textbooks; small organs are slightly enlarged so that coarse grids keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rfmedsam2.pipeline.datasets.label_tables import BTCV_LABELS

Point = tuple[float, float, float]

FIELD_MM = (350.0, 350.0, 280.0)
"""Extent of the field of view along x, y, z."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ellipsoid:
    """A superquadric: sum of |coordinate / semi-axis| ** power below 1, in a rotated frame."""

    center: Point
    semi: Point
    rotation: np.ndarray
    power: float = 2.0

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (x, y, z) of a box around the shape."""
        # the box in the rotated frame contains the shape for any power
        reach = np.abs(self.rotation) @ np.asarray(self.semi)
        return np.asarray(self.center) - reach, np.asarray(self.center) + reach

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance from the center relative to the surface's: below 1 inside, 1 on the surface."""
        dx, dy, dz = (c - np.float32(c0) for c, c0 in zip((x, y, z), self.center, strict=True))
        total = np.zeros_like(dx)
        for axis, semi in enumerate(self.semi):
            a, b, c = (np.float32(v / semi) for v in self.rotation[:, axis])
            local = dx * a + dy * b + dz * c
            total += local * local if self.power == 2 else np.abs(local) ** np.float32(self.power)
        return total ** np.float32(1 / self.power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tube:
    """A chain of round segments along a center line, with a radius at each point."""

    points: tuple[Point, ...]
    radii: tuple[float, ...]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (x, y, z) of a box around the shape."""
        points, radii = np.asarray(self.points), np.asarray(self.radii)[:, None]
        return (points - radii).min(0), (points + radii).max(0)

    def level(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance from the center line relative to the radius there: below 1 inside."""
        lowest = np.full(np.broadcast_shapes(x.shape, y.shape, z.shape), np.inf, np.float32)
        for start, stop, r0, r1 in zip(self.points, self.points[1:], self.radii, self.radii[1:], strict=False):
            run = np.subtract(stop, start).astype(np.float32)
            dx, dy, dz = (c - np.float32(c0) for c, c0 in zip((x, y, z), start, strict=True))
            along = np.clip((dx * run[0] + dy * run[1] + dz * run[2]) / max(float(run @ run), 1e-6), 0, 1)
            squared = (dx - along * run[0]) ** 2 + (dy - along * run[1]) ** 2 + (dz - along * run[2]) ** 2
            radius = np.float32(r0) + along * np.float32(r1 - r0)
            np.minimum(lowest, squared / (radius * radius), out=lowest)
        return np.sqrt(lowest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A shape filled with a tissue; later parts overwrite earlier ones."""

    shape: Ellipsoid | Tube
    tissue: str
    label: int = 0
    size: float = 1.0
    """Paint where the level is below this; less than 1 for a core inside an organ."""
    in_front_of_y: float | None = None
    """Paint only voxels with a smaller y: gas rises to the front of a supine patient."""
    in_cavity: bool = True
    """Paint only inside the abdominal cavity, below the diaphragm; else anywhere under the skin."""


@dataclass(frozen=True, slots=True)
class _Variation:
    """Draws the individual variation of a body."""

    rng: np.random.Generator

    def near(self, point: Point, sd_mm: float) -> Point:
        x, y, z = (np.asarray(point) + self.rng.normal(0, sd_mm, 3).clip(-2 * sd_mm, 2 * sd_mm)).tolist()
        return (x, y, z)

    def ellipsoid(
        self, center: Point, semi: Point, *, turn_degrees: Point = (0, 0, 0), power: float = 2.3
    ) -> Ellipsoid:
        """Draw an organ with varied position, size (8 % overall, 5 % per axis) and rotation (6 degrees)."""
        scale = np.exp(self.rng.normal(0, 0.08) + self.rng.normal(0, 0.05, 3)).clip(0.8, 1.25)
        a, b, c = (np.asarray(semi) * scale).tolist()
        angles = np.radians(np.asarray(turn_degrees) + self.rng.normal(0, 6, 3))
        return Ellipsoid(center=self.near(center, 4), semi=(a, b, c), rotation=_rotation(angles), power=power)

    def tube(self, points: Sequence[Point], radii: Sequence[float], *, sd_mm: float = 2.5) -> Tube:
        """Draw a smooth tube near the given points; radii vary by 8 %."""
        moved = [self.near(p, sd_mm) for p in points]
        factor = float(np.exp(self.rng.normal(0, 0.08)).clip(0.85, 1.2))
        return _smooth_tube(moved, [r * factor for r in radii])


def upper_abdomen(rng: np.random.Generator) -> list[Part]:
    """Everything inside the body wall in painting order; a different body for each state of `rng`."""
    vary = _Variation(rng)
    return [*_bowel(vary), *_large_organs(vary), *_retroperitoneum(vary), *_vessels_and_small_organs(vary)]


def spine(rng: np.random.Generator) -> list[Part]:
    """Vertebral column and the muscles beside it; not limited to the abdominal cavity."""
    vary = _Variation(rng)
    parts: list[Part] = []
    for side in (-1, 1):
        psoas = vary.tube([(side * 34, 52, -150), (side * 30, 50, -60), (side * 22, 55, 20)], [20, 15, 6])
        back = Ellipsoid(center=(side * 34, 90, 0), semi=(30, 18, 300), rotation=np.eye(3), power=3)
        parts += [Part(shape=s, tissue="muscle", in_cavity=False) for s in (psoas, back)]
    for number in range(-5, 6):
        z = number * 30.0
        body = Ellipsoid(center=(0, 56, z), semi=(23, 18, 13.5), rotation=np.eye(3), power=5)
        spur = Ellipsoid(center=(0, 97, z - 6), semi=(4, 13, 12), rotation=np.eye(3))
        arch = Ellipsoid(center=(0, 82, z), semi=(20, 9, 14), rotation=np.eye(3))
        wings = Ellipsoid(center=(0, 80, z), semi=(40, 4.5, 5), rotation=np.eye(3))
        parts += [Part(shape=s, tissue="bone", in_cavity=False) for s in (body, spur, arch, wings)]
        parts.append(Part(shape=body, tissue="marrow", size=0.85, in_cavity=False))
        disc = Ellipsoid(center=(0, 56, z + 15), semi=(22, 17, 4), rotation=np.eye(3), power=3)
        parts.append(Part(shape=disc, tissue="disc", in_cavity=False))
    canal = Tube(points=((0, 81, -160), (0, 81, 160)), radii=(8.5, 8.5))
    return [*parts, Part(shape=canal, tissue="fluid", in_cavity=False)]


def _bowel(vary: _Variation) -> list[Part]:
    parts: list[Part] = []
    loops = [vary.near((x, y, z), 9) for x in (-55, -15, 25, 60) for y in (-45, -10) for z in (-120, -75)]
    for x, y, z in loops:
        ends = [vary.near((x, y, z), 14) for _ in range(3)]
        loop = vary.tube(ends, [13, 14, 13])
        parts += [Part(shape=loop, tissue="bowel_wall"), Part(shape=loop, tissue="bowel_content", size=0.75)]
    colon = [
        vary.tube([(-98, 8, -150), (-98, 5, -90), (-92, -10, -50)], [21, 22, 19]),
        vary.tube([(-92, -10, -50), (-50, -62, -45), (20, -70, -50), (75, -45, -20)], [18, 17, 17, 17]),
        vary.tube([(88, 0, 0), (102, 18, -60), (100, 20, -150)], [16, 15, 15]),
    ]
    for tube in colon:
        y = float(np.mean([p[1] for p in tube.points]))
        parts += [
            Part(shape=tube, tissue="bowel_wall"),
            Part(shape=tube, tissue="stool", size=0.85),
            Part(shape=tube, tissue="gas", size=0.8, in_front_of_y=y - 4),
        ]
    return parts


def _large_organs(vary: _Variation) -> list[Part]:
    liver, stomach = BTCV_LABELS["liver"], BTCV_LABELS["stomach"]
    right = vary.ellipsoid((-72, -8, 38), (60, 74, 82), turn_degrees=(0, 12, -8))
    left = vary.ellipsoid((-6, -48, 62), (68, 36, 36), turn_degrees=(0, 18, 0))
    parts = [Part(shape=s, tissue="liver", label=liver) for s in (right, left)]
    for _ in range(6):
        root = vary.near((-45, 0, 50), 8)
        tip = vary.near((-75, -15, 55), 28)
        parts.append(Part(shape=vary.tube([root, tip], [4, 2]), tissue="liver_vessel", label=liver))
    belly = vary.tube(
        [(52, 12, 82), (60, -18, 58), (46, -48, 22), (12, -56, 2), (-14, -46, 4)], [34, 34, 27, 21, 14], sd_mm=4
    )
    surface = float(np.mean([p[1] for p in belly.points]))
    parts += [
        Part(shape=belly, tissue="stomach_wall", label=stomach),
        Part(shape=belly, tissue="stomach_content", label=stomach, size=0.85),
        Part(shape=belly, tissue="gas", label=stomach, size=0.82, in_front_of_y=surface - vary.rng.uniform(8, 25)),
    ]
    spleen = vary.ellipsoid((98, 32, 52), (27, 44, 50), turn_degrees=(15, 0, -25))
    return [*parts, Part(shape=spleen, tissue="spleen", label=BTCV_LABELS["spleen"])]


def _retroperitoneum(vary: _Variation) -> list[Part]:
    parts: list[Part] = []
    for name, center, turn in (
        ("right_kidney", (-64.0, 44.0, -42.0), (-8.0, -10.0, 20.0)),
        ("left_kidney", (62.0, 44.0, -22.0), (-8.0, 10.0, -20.0)),
    ):
        kidney = vary.ellipsoid(center, (25, 28, 54), turn_degrees=turn)
        inner = replace(kidney, center=(kidney.center[0] * 0.9, kidney.center[1] - 4, kidney.center[2]))
        parts += [
            Part(shape=kidney, tissue="kidney_cortex", label=BTCV_LABELS[name]),
            Part(shape=inner, tissue="kidney_medulla", label=BTCV_LABELS[name], size=0.62),
            Part(shape=inner, tissue="kidney_sinus", label=BTCV_LABELS[name], size=0.3),
        ]
    duodenum = vary.tube([(-16, -42, 4), (-44, -18, -5), (-46, 0, -45), (-5, 8, -62)], [13, 13, 12, 11])
    pancreas = vary.tube(
        [(-27, -12, -28), (-18, -16, -6), (6, -22, 6), (36, -8, 18), (72, 16, 36)], [17, 16, 12, 12, 10]
    )
    return [
        *parts,
        Part(shape=duodenum, tissue="bowel_wall"),
        Part(shape=duodenum, tissue="bowel_content", size=0.6),
        Part(shape=pancreas, tissue="pancreas", label=BTCV_LABELS["pancreas"]),
    ]


def _vessels_and_small_organs(vary: _Variation) -> list[Part]:
    portal = BTCV_LABELS["portal_vein_and_splenic_vein"]
    cava = vary.tube([(-20, 26, -160), (-22, 24, -20), (-26, 18, 60), (-26, 6, 112)], [11, 12, 13, 12])
    aorta = vary.tube([(8, 28, -160), (9, 26, -40), (10, 28, 40), (14, 36, 160)], [9, 10, 11, 12], sd_mm=1.5)
    mesenteric = vary.tube([(-10, -8, -6), (-8, -14, -70), (0, -16, -130)], [6, 5.5, 4], sd_mm=2)
    trunk = vary.tube([(-10, -6, -4), (-24, -8, 18), (-42, -4, 42)], [8, 8.5, 8], sd_mm=1.5)
    splenic = vary.tube([(-10, -6, -4), (14, -2, 12), (44, 8, 26), (82, 28, 44)], [7.5, 6.5, 6, 6], sd_mm=1.5)
    celiac = vary.tube([(10, 22, 32), (9, -2, 30)], [4.5, 4])
    gallbladder = vary.ellipsoid((-46, -50, -16), (15, 17, 27), turn_degrees=(25, -10, 0), power=2)
    gullet = vary.tube([(2, 20, 160), (4, 18, 118), (16, 12, 98), (34, 6, 88)], [9.5, 9.5, 10, 9], sd_mm=1.5)
    parts = [
        Part(shape=cava, tissue="cava", label=BTCV_LABELS["inferior_vena_cava"], in_cavity=False),
        Part(shape=mesenteric, tissue="portal"),
        Part(shape=celiac, tissue="aorta"),
        Part(shape=aorta, tissue="aorta", label=BTCV_LABELS["aorta"], in_cavity=False),
        Part(shape=splenic, tissue="portal", label=portal),
        Part(shape=trunk, tissue="portal", label=portal),
        Part(shape=gallbladder, tissue="bile", label=BTCV_LABELS["gallbladder"]),
        Part(shape=gullet, tissue="esophagus", label=BTCV_LABELS["esophagus"], in_cavity=False),
    ]
    for name, x, y, z in (("right_adrenal_gland", -36.0, 40.0, 34.0), ("left_adrenal_gland", 34.0, 40.0, 36.0)):
        # an inverted Y: a body in front, two limbs behind
        side = float(np.sign(x))
        front, back = vary.near((x, y - 12, z + 2), 2), vary.near((x + side * 2, y, z), 2)
        for limb in ((x + side * 12, y + 12, z - 14), (x - side * 2, y + 14, z - 12)):
            shape = vary.tube([front, back, limb], [5, 5.5, 4.5], sd_mm=1)
            parts.append(Part(shape=shape, tissue="adrenal", label=BTCV_LABELS[name], in_cavity=False))
    return parts


def _rotation(angles_xyz: np.ndarray) -> np.ndarray:
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles_xyz), np.sin(angles_xyz)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _smooth_tube(points: Sequence[Point], radii: Sequence[float], steps: int = 3) -> Tube:
    """Catmull-Rom curve through the points, `steps` segments between two of them."""
    knots = np.column_stack([np.asarray(points, float), np.asarray(radii, float)])
    padded = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    p0, p1, p2, p3 = (padded[i : i + len(knots) - 1, None] for i in range(4))
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    line = np.vstack([curve.reshape(-1, 4), knots[-1:]])
    return Tube(points=tuple(map(_point, line[:, :3])), radii=tuple(line[:, 3].clip(1.0).tolist()))


def _point(values: np.ndarray) -> Point:
    x, y, z = values.tolist()
    return (x, y, z)
