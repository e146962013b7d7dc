"""Labels written with the header of any image come back voxel for voxel, in the same place."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from rfmedsam2.geometry import Grid
from rfmedsam2.store.formats.image_header import ImageHeader, displacement_mm
from rfmedsam2.store.images import read_header, read_label, write_label
from rfmedsam2.store.orientation import reoriented
from rfmedsam2.volume import Volume

angles = st.floats(-180, 180)
spacings = st.tuples(*[st.floats(0.1, 9)] * 3)
origins = st.tuples(*[st.floats(-500, 500)] * 3)
shapes = st.tuples(*[st.integers(1, 6)] * 3)
axes = st.permutations([0, 1, 2])
signs = st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)


@st.composite
def directions(draw: st.DrawFn) -> np.ndarray:
    """Rotated, permuted and mirrored unit axes."""
    matrix = np.eye(3)[draw(axes)] * np.asarray(draw(signs))
    if draw(st.booleans()):
        matrix = Rotation.from_euler("xyz", [draw(angles) for _ in range(3)], degrees=True).as_matrix() @ matrix
    return matrix


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = draw(directions()) * np.asarray(draw(spacings))
    affine[:3, 3] = draw(origins)
    return Grid.from_affine_lps(affine, draw(shapes))


def labels_of(grid: Grid, seed: int, highest: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest, grid.shape_zyx).astype(np.int32)


def header_of(grid: Grid) -> ImageHeader:
    return ImageHeader(grid=grid, source_grid=grid, channels=1, dtype="int16", format="itk")


@settings(max_examples=40, deadline=None)
@given(grid=grids(), seed=st.integers(0, 99), ending=st.sampled_from([".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"]))
def test_label_comes_back_with_its_grid_in_every_format(grid: Grid, seed: int, ending: str) -> None:
    labels = labels_of(grid, seed, 300)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"l{ending}"
        write_label(path, labels, header_of(grid))
        volume, _ = read_label(path)
    np.testing.assert_array_equal(volume.array[0], labels)
    assert displacement_mm(grid, volume.grid) < 2e-3  # NIfTI stores single precision


@settings(max_examples=30, deadline=None)
@given(grid=grids(), seed=st.integers(0, 99), codes=st.sampled_from([(1, 1), (0, 2), (2, 0), (1, 4)]))
def test_nifti_geometry_survives_to_the_last_bit(grid: Grid, seed: int, codes: tuple[int, int]) -> None:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine_lps
    image = nib.Nifti1Image(np.zeros(grid.shape_zyx[::-1], np.int16), affine)
    image.set_qform(affine, code=codes[0])
    image.set_sform(affine, code=codes[1])
    with tempfile.TemporaryDirectory() as folder:
        source, label = Path(folder) / "i.nii", Path(folder) / "l.nii.gz"
        nib.save(image, source)
        write_label(label, labels_of(grid, seed, 7), read_header(source))
        one, two = nib.load(source), nib.load(label)
        np.testing.assert_array_equal(one.affine, two.affine)
        for field in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "quatern_c", "qoffset_x"):
            np.testing.assert_array_equal(one.header[field], two.header[field])
        assert read_header(source).grid == read_header(label).grid


@given(grid=grids(), seed=st.integers(0, 99))
def test_turning_to_ras_equals_nibabel_and_undo_gives_the_source(grid: Grid, seed: int) -> None:
    labels = labels_of(grid, seed, 99)
    turned, orientation = reoriented(Volume(array=labels[None], grid=grid), "RAS")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine_lps
    expected = nib.as_closest_canonical(nib.Nifti1Image(labels.T, affine))
    np.testing.assert_array_equal(turned.array[0], np.asarray(expected.dataobj).T)
    found = np.diag([-1.0, -1.0, 1.0, 1.0]) @ turned.grid.affine_lps
    np.testing.assert_allclose(found, expected.affine, atol=1e-6)
    np.testing.assert_array_equal(orientation.undo(turned.array[0]), labels)
    np.testing.assert_array_equal(orientation.undo(turned.array), labels[None])
