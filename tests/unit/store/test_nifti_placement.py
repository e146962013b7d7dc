"""Where NIfTI files place their voxels: as SimpleITK reads them, with nibabel's reading kept where it differs."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation

from rfmedsam2.errors import GeometryError
from rfmedsam2.geometry import Grid
from rfmedsam2.store.formats.image_header import displacement_mm, grids_differ, readers_differ
from rfmedsam2.store.images import read_channels, read_header, read_image, read_label, write_label

ARRAY = np.arange(12 * 10 * 8, dtype=np.int16).reshape(12, 10, 8)  # x, y, z
AFFINE = np.diag([-0.8, -0.9, 2.5, 1.0])
AFFINE[:3, 3] = 100, 90, 30


def write(
    path: Path,
    *,
    sform: int = 1,
    qform: int = 1,
    affine: np.ndarray = AFFINE,
    q_affine: np.ndarray | None = None,
    array: np.ndarray = ARRAY,
    **fields: object,
) -> Path:
    """An uncompressed NIfTI file with these codes and affines; then raw header fields are overwritten."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine if q_affine is None else q_affine, code=qform)
    image.set_sform(affine, code=sform)
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    pixdim = np.array(header["pixdim"])
    for name, value in fields.items():
        if name.startswith("pixdim") and name != "pixdim":
            pixdim[int(name[6:])] = value
            header["pixdim"] = pixdim
        else:
            header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


def by_itk(path: Path) -> Grid:
    """The grid that SimpleITK reads."""
    reader = sitk.ReadImage(str(path))  # its information alone has negative spacings as they are stored
    x, y, z = reader.GetSize()
    rows = np.reshape(reader.GetDirection(), (3, 3)).tolist()
    return Grid(
        shape_zyx=(z, y, x),
        spacing_zyx_mm=reader.GetSpacing()[::-1],
        origin_xyz_mm=reader.GetOrigin(),
        direction=tuple(map(tuple, rows)),
    )


def by_nibabel(path: Path) -> Grid:
    """The grid that nibabel reads."""
    image = nib.load(path)
    x, y, z = image.shape
    return Grid.from_affine_ras(image.affine, (z, y, x))


def assert_same(one: Grid, other: Grid) -> None:
    np.testing.assert_allclose(one.spacing_zyx_mm, other.spacing_zyx_mm, rtol=1e-5)
    np.testing.assert_allclose(one.origin_xyz_mm, other.origin_xyz_mm, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.direction, other.direction, atol=2e-5)


def moved(affine: np.ndarray, mm: float) -> np.ndarray:
    other = affine.copy()
    other[:3, 3] += mm
    return other


def sheared(affine: np.ndarray, mm: float) -> np.ndarray:
    other = affine.copy()
    other[0, 2] += mm
    return other


def turned(rng: np.random.Generator) -> np.ndarray:
    affine = np.eye(4)
    flips = np.diag(rng.choice([-1.0, 1.0], 3))
    affine[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-180, 180, 3), degrees=True).as_matrix() @ flips
    affine[:3, :3] *= rng.uniform(0.3, 4, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def test_any_codes_units_and_forms_are_read_as_by_itk(tmp_path: Path) -> None:
    """150 headers at random: axes, codes, units, forms that differ a little or much, a sheared sform, odd qfac."""
    rng = np.random.default_rng(7)
    ambiguous = 0
    for number in range(150):
        affine = turned(rng)
        other = [affine, moved(affine, rng.uniform(0.1, 50)), turned(rng)][rng.integers(3)]
        if not np.allclose(np.linalg.norm(other, axis=0), np.linalg.norm(affine, axis=0)):
            other[:3, :3] *= np.linalg.norm(affine[:3, :3], axis=0) / np.linalg.norm(other[:3, :3], axis=0)
        sform, qform = rng.integers(0, 5, 2).tolist()
        sform_affine = sheared(affine, rng.uniform(0.02, 0.5)) if qform and rng.random() < 0.3 else affine
        path = write(tmp_path / f"{number}.nii", sform=sform, qform=qform, affine=sform_affine, q_affine=other)
        image = nib.Nifti1Header(path.read_bytes()[:348], check=False)
        fields: dict[str, object] = {"xyzt_units": int(rng.choice([0, 1, 2, 3, 10, 11]))}
        if float(image["pixdim"][0]) > 0 and rng.random() < 0.3:
            fields["pixdim0"] = float(rng.choice([0.0, 7.0]))
        write(path, sform=sform, qform=qform, affine=sform_affine, q_affine=other, **fields)
        header = read_header(path)
        assert_same(header.grid, by_itk(path))
        assert header.skew_degrees < 0.01
        nibabel_grid = by_nibabel(path)
        assert header.nibabel_grid.mismatch(nibabel_grid) is None
        ambiguous += readers_differ(header) is not None
        assert (readers_differ(header) is None) or header.grid.mismatch(nibabel_grid) is not None
    assert 40 < ambiguous < 140


@pytest.mark.parametrize("sform", [1, 2, 4])
@pytest.mark.parametrize("signs", [(-1, -1, 1), (1, -1, -1), (1, 1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("mm", [0, 1])
def test_straight_forms_with_opposite_axes_are_read_as_by_itk(
    tmp_path: Path, mm: float, signs: tuple[int, int, int], sform: int
) -> None:
    """From the same origin ITK takes them for one form, and reads the sform."""
    mirrored = moved(AFFINE, mm)
    mirrored[:3, :3] *= signs
    path = write(tmp_path / "a.nii", sform=sform, q_affine=mirrored)
    grid = read_header(path).grid
    assert_same(grid, by_itk(path))
    assert (grid.mismatch(by_nibabel(path)) is None) is (sform == 1 or mm == 0)


@pytest.mark.parametrize("unit", ["meter", "micron"])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0)])
def test_lengths_in_other_units_become_mm(tmp_path: Path, unit: str, codes: tuple[int, int]) -> None:
    factor = {"meter": 1e-3, "micron": 1e3}[unit]
    affine = AFFINE.copy()
    affine[:3] *= factor
    code = {"meter": 1, "micron": 3}[unit]
    path = write(tmp_path / "a.nii", sform=codes[0], qform=codes[1], affine=affine, xyzt_units=code)
    grid = read_header(path).grid
    np.testing.assert_allclose(grid.spacing_zyx_mm, (2.5, 0.9, 0.8), rtol=1e-6)
    np.testing.assert_allclose(grid.origin_xyz_mm, (-100, -90, 30) if any(codes) else (0, 0, 0), rtol=1e-6)
    assert_same(grid, by_itk(path))
    assert "unit of length" in str(readers_differ(read_header(path)))


def test_image_in_micrometers_and_label_in_mm_are_on_one_grid(tmp_path: Path) -> None:
    tiny = AFFINE.copy()
    tiny[:3] *= 1e-3  # a microscope: 0.8 x 0.9 x 2.5 micrometers
    image = read_header(write(tmp_path / "a.nii", affine=AFFINE, xyzt_units=3))
    label = read_header(write(tmp_path / "b.nii", affine=tiny, xyzt_units=2))
    assert grids_differ(image, label) is None
    # nibabel's user: numbers without their unit
    assert grids_differ(image, read_header(write(tmp_path / "c.nii", affine=AFFINE, xyzt_units=0))) is None
    other = tiny.copy()
    other[2, 2] *= 1.1
    differ = grids_differ(image, read_header(write(tmp_path / "d.nii", affine=other, xyzt_units=2)))
    assert differ is not None
    assert "spacing" in differ[0]
    assert "origins" in str(grids_differ(image, read_header(write(tmp_path / "e.nii", affine=moved(tiny, 2e-3)))))


@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (1, 0), (2, 1)])
@pytest.mark.parametrize("qfac", [0.0, 7.0, np.nan])
def test_any_qfac_that_is_not_negative_means_one(tmp_path: Path, codes: tuple[int, int], qfac: float) -> None:
    path = write(tmp_path / "a.nii", sform=codes[0], qform=codes[1], pixdim0=qfac)
    assert_same(read_header(path).grid, by_itk(path))
    assert_same(read_header(path).grid, read_header(write(tmp_path / "b.nii")).grid)


@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (2, 1)])
def test_a_quaternion_too_long_by_rounding_is_shortened(tmp_path: Path, codes: tuple[int, int]) -> None:
    path = write(
        tmp_path / "a.nii", sform=codes[0], qform=codes[1], quatern_b=0, quatern_c=0, quatern_d=np.float32(1.000001)
    )
    assert_same(read_header(path).grid, by_itk(path))
    write_label(tmp_path / "b.nii", np.zeros((8, 10, 12), np.uint8), read_header(path))
    assert_same(by_nibabel(tmp_path / "b.nii"), by_itk(path))  # nibabel refuses the image itself


TURNS = {
    "axial": (0, 0, 1),
    "about x": (1, 0, 0),
    "about y": (0, 1, 0),
    "oblique": (0.6, 0.0, 0.8),
    "double oblique": (0.267, -0.535, 0.802),
    "nearly axial": (0.0013, 0.0021, 0.9999),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("length", [1.0, 1.000001, 1.00003, 1.0001, 1.0004, 0.99999])
def test_labels_of_any_quaternion_lie_on_the_image(tmp_path: Path, turn: str, length: float) -> None:
    """Half turns: there the smallest shortening of the quaternion turns the axes."""
    bcd = np.array(TURNS[turn]) / np.linalg.norm(TURNS[turn]) * length
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), bcd, strict=True))
    array = np.zeros((512, 512, 4), np.uint8)
    path = write(tmp_path / "a.nii", sform=0, affine=np.diag([-0.7, -0.7, 5, 1]), array=array, **fields)
    header = read_header(path)
    write_label(tmp_path / "b.nii", array.T, header)
    image = by_itk(path)
    assert displacement_mm(image, header.grid) < 1e-3
    assert displacement_mm(image, by_itk(tmp_path / "b.nii")) < 1e-3
    if length != 1:  # of length 1 rounding decides, and the two programs differ on the image itself
        assert displacement_mm(image, by_nibabel(tmp_path / "b.nii")) < 1e-3


def test_a_damaged_quaternion_is_refused_unless_the_sform_is_good(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", sform=0, qform=1, quatern_b=3.0)
    with pytest.raises(GeometryError, match="qform is invalid"):
        read_header(path)
    assert_same(
        read_header(write(tmp_path / "b.nii", sform=2, quatern_b=np.nan)).grid, by_nibabel(path.parent / "b.nii")
    )


def test_without_forms_the_axes_run_left_back_and_up_from_the_origin(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", sform=0, qform=0)
    header = read_header(path)
    assert header.grid.origin_xyz_mm == (0, 0, 0)
    np.testing.assert_array_equal(header.grid.direction, np.eye(3))
    assert "neither a sform nor a qform" in str(readers_differ(header))


def test_an_empty_pixdim_is_taken_from_the_sform(tmp_path: Path) -> None:
    for value in (0.0, np.nan):
        grid = read_header(write(tmp_path / "a.nii", qform=0, pixdim3=value)).grid
        np.testing.assert_allclose(grid.spacing_zyx_mm, (2.5, 0.9, 0.8), rtol=1e-6)
        path = write(tmp_path / "b.nii", sform=2, affine=np.diag([-1, -1, 1.5, 1]), pixdim2=value, pixdim3=value)
        assert read_header(path).grid.spacing_zyx_mm == (1.5, 1.0, 1.0)
        found = str(readers_differ(read_header(path)))  # 7 steps of 1.5 and of 1 mm
        assert "by up to 3.5 mm: the header's pixdim does not state every spacing of its sform; read with the" in found
        assert "sform's spacing" in found
    unit = write(tmp_path / "c.nii", affine=np.diag([-1, -1, 1.0, 1]), pixdim3=0.0)  # both programs read 1
    assert readers_differ(read_header(unit)) is None
    with pytest.raises(GeometryError, match="spacing is not positive"):
        read_header(write(tmp_path / "a.nii", sform=0, pixdim3=0.0))


def test_a_pixdim_of_1_beside_another_spacing_in_the_sform_is_an_empty_one(tmp_path: Path) -> None:
    for values in ({"pixdim3": 1.0}, {"pixdim1": 1.0, "pixdim2": 1.0, "pixdim3": 1.0}):
        header = read_header(write(tmp_path / "a.nii", qform=0, **values))
        np.testing.assert_allclose(header.grid.spacing_zyx_mm, (2.5, 0.9, 0.8), rtol=1e-6)
        assert "does not state every spacing" in str(readers_differ(header))


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (2, 1), (0, 0)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_an_axis_with_a_negative_pixdim_is_turned_around_as_by_itk(tmp_path: Path, codes, axis: int) -> None:
    mm = {1: -0.8, 2: -0.9, 3: -2.5}[axis]
    path = write(tmp_path / "a.nii", sform=codes[0], qform=codes[1], **{f"pixdim{axis}": mm})
    header = read_header(path)
    assert_same(header.grid, by_itk(path))
    assert header.nibabel_grid.mismatch(by_nibabel(path)) is None
    assert "a spacing of the header's pixdim is negative; read as by ITK" in str(readers_differ(header))


def test_a_sform_without_scale_leaves_the_spacing_to_pixdim(tmp_path: Path) -> None:
    rows = {"srow_x": [-1, 0, 0, 0], "srow_y": [0, -1, 0, 0], "srow_z": [0, 0, 1, 0]}
    for qform in (0, 1):
        path = write(tmp_path / "a.nii", qform=qform, **rows)
        assert_same(read_header(path).grid, by_itk(path))
        assert "nibabel" in str(readers_differ(read_header(path)))


def test_a_sheared_sform_beside_a_straight_qform_gives_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", affine=sheared(AFFINE, 0.02), q_affine=AFFINE)
    header = read_header(path)
    assert header.skew_degrees == 0
    assert_same(header.grid, by_itk(path))
    sitk.WriteImage(sitk.ReadImage(str(path)) > 5, str(tmp_path / "label.nii.gz"))
    assert grids_differ(header, read_header(tmp_path / "label.nii.gz")) is None


# --- pairs ------------------------------------------------------------------------------------------------------------

KINDS = {
    "no forms": {"sform": 0, "qform": 0},
    "forms differ": {"sform": 2, "qform": 1, "q_affine": moved(AFFINE, 40)},
    "sheared sform": {"sform": 1, "qform": 1, "affine": sheared(AFFINE, 0.03), "q_affine": AFFINE},
    "sform only": {"sform": 4, "qform": 0},
    "qform only": {"sform": 0, "qform": 1},
    "sform without scale": {
        "sform": 2,
        "qform": 0,
        "srow_x": [-1, 0, 0, 0],
        "srow_y": [0, -1, 0, 0],
        "srow_z": [0, 0, 1, 0],
    },
    "micrometers": {"xyzt_units": 3},
    "micrometers, forms differ": {"sform": 2, "qform": 1, "q_affine": moved(AFFINE, 40), "xyzt_units": 3},
    "meters, no forms": {"sform": 0, "qform": 0, "xyzt_units": 1},
    "pixdim 3 empty": {"sform": 1, "qform": 0, "pixdim3": 0.0},
    "pixdim 3 empty, both forms": {"sform": 2, "qform": 1, "pixdim3": 0.0},
    "pixdim empty": {"sform": 4, "qform": 1, "pixdim1": 0.0, "pixdim2": 0.0, "pixdim3": np.nan},
    "micrometers, pixdim 3 empty": {"sform": 1, "qform": 0, "pixdim3": 0.0, "xyzt_units": 3},
    "pixdim 1 negative": {"sform": 1, "qform": 1, "pixdim1": -0.8},
    "pixdim 3 negative, no qform": {"sform": 4, "qform": 0, "pixdim3": -2.5},
    "pixdim 2 negative, no forms": {"sform": 0, "qform": 0, "pixdim2": -0.9},
    "qfac 0": {"sform": 0, "qform": 1, "pixdim0": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_either_program_fit_their_image(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.nii", **KINDS[kind])
    header = read_header(path)
    sitk.WriteImage(sitk.ReadImage(str(path)) > 5, str(tmp_path / "itk.nii.gz"))
    sitk.WriteImage(sitk.ReadImage(str(path)) > 5, str(tmp_path / "itk.nrrd"))
    image = nib.load(path)
    nib.save(nib.Nifti1Image((ARRAY > 5).astype(np.uint8), image.affine), tmp_path / "nibabel.nii.gz")
    nib.save(nib.Nifti1Image((ARRAY > 5).astype(np.uint8), image.affine, image.header), tmp_path / "header.nii.gz")
    for name in ("itk.nii.gz", "itk.nrrd", "nibabel.nii.gz", "header.nii.gz"):
        label, found = read_label(tmp_path / name)
        assert grids_differ(header, found) is None, name
        np.testing.assert_array_equal(label.array[0], ARRAY.T > 5)
    wrong = nib.Nifti1Image((ARRAY > 5).astype(np.uint8), moved(image.affine, 20))
    nib.save(wrong, tmp_path / "wrong.nii.gz")
    assert grids_differ(header, read_header(tmp_path / "wrong.nii.gz")) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".mgz"])
def test_written_labels_are_put_on_the_image_by_itk_and_by_nibabel(tmp_path: Path, kind: str, ending: str) -> None:
    path = write(tmp_path / "a.nii", **KINDS[kind])
    target = tmp_path / f"label{ending}"
    write_label(target, ARRAY.T % 3, read_header(path))
    if ending != ".mgz":  # ITK does not read it
        assert_same(by_itk(target), by_itk(path))
    if ending in (".nii", ".nii.gz"):
        assert by_nibabel(target).mismatch(by_nibabel(path)) is None
    if ending == ".mgz" and "meters" not in kind:  # the format knows only mm
        assert by_nibabel(target).mismatch(by_nibabel(path)) is None
    label, header = read_label(target)
    np.testing.assert_array_equal(label.array[0], ARRAY.T % 3)
    assert grids_differ(read_header(path), header) is None


def test_channels_of_either_program_are_one_case(tmp_path: Path) -> None:
    one = write(tmp_path / "a_0000.nii", sform=0, qform=0)
    two = tmp_path / "a_0001.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(one)), str(two))
    volume, _ = read_channels([one, two])
    np.testing.assert_array_equal(volume.array[0], volume.array[1])


# --- two axes ---------------------------------------------------------------------------------------------------------

FLAT = np.arange(80, dtype=np.float32).reshape(10, 8)  # x, y


def flat_files(folder: Path) -> dict[str, Path]:
    """One plane with pixels of 0.5 mm, as programs write it."""
    half = np.diag([-0.5, -0.5, 1, 1])
    images = {
        "affine": nib.Nifti1Image(FLAT, half),
        "plane": nib.Nifti1Image(FLAT[..., None], np.diag([-0.5, -0.5, 3, 1])),
        "offset": nib.Nifti1Image(FLAT, moved(half, 0) + np.array([[0, 0, 0, 0]] * 2 + [[0, 0, 0, 33.0]] + [[0] * 4])),
    }
    images["qform"] = nib.Nifti1Image(FLAT, half)
    images["qform"].set_qform(half, 1)
    files = {}
    for name, image in images.items():
        files[name] = folder / f"{name}.nii.gz"
        nib.save(image, files[name])
    for name in ("itk.nii.gz", "itk.mha", "itk.nrrd"):
        image = sitk.GetImageFromArray(FLAT.T)
        image.SetSpacing((0.5, 0.5))
        files[name] = folder / name
        sitk.WriteImage(image, str(files[name]))
    return files


def test_two_axes_of_any_writer_are_one_plane_with_nnunets_spacing(tmp_path: Path) -> None:
    files = flat_files(tmp_path)
    for name, path in files.items():
        volume, header = read_image(path)
        np.testing.assert_array_equal(volume.array[0, 0], FLAT.T)
        assert volume.grid.spacing_zyx_mm == ((3.0, 0.5, 0.5) if name == "plane" else (499.5, 0.5, 0.5)), name
        assert header.flat == (name != "plane")
        for other in files.values():
            assert grids_differ(header, read_header(other)) is None, (name, other)


def test_two_axes_without_spacing_are_read(tmp_path: Path) -> None:
    for name, affine in (("eye", np.eye(4)), ("none", None)):
        nib.save(nib.Nifti1Image(FLAT, affine), tmp_path / f"{name}.nii.gz")
        assert read_header(tmp_path / f"{name}.nii.gz").grid.spacing_zyx_mm == (999.0, 1.0, 1.0)


def test_a_label_with_two_axes_is_written_with_two_axes(tmp_path: Path) -> None:
    for name, path in flat_files(tmp_path).items():
        if name != "plane":
            for ending in (".nii.gz", ".nrrd"):
                write_label(tmp_path / f"label{ending}", (FLAT.T > 40)[None].astype(np.uint8), read_header(path))
                label, image = sitk.ReadImage(str(tmp_path / f"label{ending}")), sitk.ReadImage(str(path))
                assert label.GetSize() == image.GetSize() == (10, 8)
                np.testing.assert_allclose(label.GetSpacing(), image.GetSpacing())
                np.testing.assert_allclose(label.GetOrigin(), image.GetOrigin())
                np.testing.assert_allclose(label.GetDirection(), image.GetDirection())


def test_different_pixel_sizes_of_two_axes_are_noticed(tmp_path: Path) -> None:
    """The spacing of 999 between planes that do not exist is no reason to be generous."""
    for name, spacing in (("a", 0.5), ("b", 0.51)):
        nib.save(
            nib.Nifti1Image(np.zeros((512, 512), np.uint8), np.diag([spacing, spacing, 1, 1])), tmp_path / f"{name}.nii"
        )
    assert "spacing" in str(grids_differ(read_header(tmp_path / "a.nii"), read_header(tmp_path / "b.nii")))


def test_an_upright_plane_of_two_axes_is_read_and_its_labels_are_written(tmp_path: Path) -> None:
    """A sagittal slice: ITK cannot read it, as its direction in two axes would have no second column."""
    sagittal = np.array([[0, 0, 1.0, 5], [0.5, 0, 0, 6], [0, 0.7, 0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(FLAT, sagittal), tmp_path / "a.nii.gz")
    volume, header = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array[0, 0], FLAT.T)
    np.testing.assert_allclose(volume.grid.spacing_zyx_mm, (999 * 0.7, 0.7, 0.5), rtol=1e-6)
    for ending in (".nii.gz", ".nrrd", ".mha", ".mgz"):
        write_label(tmp_path / f"b{ending}", (FLAT.T > 40)[None].astype(np.uint8), header)
        label, found = read_label(tmp_path / f"b{ending}")
        np.testing.assert_array_equal(label.array[0, 0], FLAT.T > 40)
        if ending == ".nii.gz":
            assert grids_differ(header, found) is None


@pytest.mark.parametrize("degrees", [(25, 0), (25, 40), (0.9, 30), (1.1, 30)])
def test_labels_of_a_tilted_plane_of_two_axes_lie_on_it(tmp_path: Path, degrees: tuple[float, float]) -> None:
    """A slice of an oblique volume: its axes, seen along z, need not be perpendicular."""
    affine = np.eye(4)
    turn = Rotation.from_euler("zxy", [20, degrees[1], degrees[0]], degrees=True).as_matrix()
    affine[:3] = np.column_stack([turn * [0.5, 0.7, 3], [5, 6, 7]])
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(FLAT, affine), path)
    header = read_header(path)
    np.testing.assert_allclose(header.grid.spacing_zyx_mm, (999 * 0.7, 0.7, 0.5), rtol=1e-6)
    for ending in (".nii.gz", ".nrrd", ".mha"):
        target = tmp_path / f"b{ending}"
        write_label(target, (FLAT.T > 40)[None].astype(np.uint8), header)
        label, found = read_label(target)
        np.testing.assert_array_equal(label.array[0, 0], FLAT.T > 40)
        assert grids_differ(header, found) is None
        one, other = sitk.ReadImage(str(path)), sitk.ReadImage(str(target))
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(one, name)(), getattr(other, name)(), atol=1e-5)
    sitk.WriteImage(one > 40, str(tmp_path / "itk.nrrd"))
    assert grids_differ(header, read_header(tmp_path / "itk.nrrd")) is None


def test_channels_of_two_axes_are_one_plane(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.stack([FLAT.T, FLAT.T + 1], axis=-1), isVector=True)
    image.SetSpacing((0.5, 0.7))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    volume, header = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.array[:, 0], [FLAT.T, FLAT.T + 1])
    np.testing.assert_allclose(header.grid.spacing_zyx_mm, (999 * 0.7, 0.7, 0.5), rtol=1e-6)
    write_label(tmp_path / "b.nii.gz", np.ones((1, 8, 10), np.uint8), header)
    assert sitk.ReadImage(str(tmp_path / "b.nii.gz")).GetSize() == (10, 8)
    assert grids_differ(header, read_header(tmp_path / "b.nii.gz")) is None
