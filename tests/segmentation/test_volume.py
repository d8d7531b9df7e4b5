import nibabel as nib
import numpy as np
import pytest

from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.scans import Scan
from dpkernels.segmentation.volume import check_headers, load_volume

LABELS = {0: "background", 1: "liver", 2: "cancer"}


@pytest.fixture
def scan(folder) -> Scan:
    return read_scans(folder).records[0]


def load(scan: Scan):
    return load_volume(scan, channels=1, labels=LABELS)


def test_a_flipped_and_permuted_scan_reads_like_the_upright_one(scan):
    upright = load(scan)
    for path in (scan.image, scan.label):
        image = nib.load(path)
        axes = nib.orientations.axcodes2ornt(("P", "L", "S"))
        nib.save(
            image.as_reoriented(
                nib.orientations.ornt_transform(nib.io_orientation(image.affine), axes)
            ),
            path,
        )
    assert nib.aff2axcodes(nib.load(scan.image).affine) == ("P", "L", "S")
    turned = load(scan)
    np.testing.assert_array_equal(turned.image, upright.image)
    np.testing.assert_array_equal(turned.label, upright.label)
    np.testing.assert_allclose(turned.spacing, upright.spacing, rtol=1e-6)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PLS", "SAR", "IPR"])
def test_a_label_map_returns_to_the_grid_of_its_file(scan, codes):
    for path in (scan.image, scan.label):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        nib.save(image.as_reoriented(turn), path)
    volume = load(scan)
    native = volume.to_native(volume.label)
    original = nib.load(scan.label)
    np.testing.assert_array_equal(np.asanyarray(native.dataobj), np.asanyarray(original.dataobj))
    np.testing.assert_allclose(native.affine, original.affine, atol=1e-6)


def test_anisotropic_spacing_is_reported_along_the_axes(scan, rewrite):
    for path in (scan.image, scan.label):
        rewrite(path, affine=np.diag([1.0, 2.0, -5.0, 1.0]))
    assert load(scan).spacing == (1.0, 2.0, 5.0)


def test_an_empty_label_is_allowed(scan, rewrite):
    rewrite(scan.label, np.zeros_like)
    assert load(scan).label.max() == 0


def test_a_truncated_file_is_named(scan):
    data = scan.image.read_bytes()
    scan.image.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"phantom_000.nii.gz: .*truncated or damaged"):
        load(scan)


def test_a_file_that_is_no_nifti_is_named(scan):
    scan.image.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"phantom_000.nii.gz: not a readable NIfTI"):
        check_headers(scan)


def test_a_flipped_label_affine_is_refused_with_both_affines(scan, rewrite):
    affine = nib.load(scan.label).affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
    rewrite(scan.label, affine=affine)
    with pytest.raises(ValueError, match=r"labelsTr.*affine .* differs from that of .*imagesTr"):
        check_headers(scan)


def test_a_label_one_voxel_short_is_refused_with_both_shapes(scan, rewrite):
    rewrite(scan.label, lambda array: array[:, :, :-1])
    with pytest.raises(ValueError, match=r"labelsTr.*shape \(20, .*\), but its image .* has shape"):
        check_headers(scan)


def test_label_values_outside_dataset_json_are_refused(scan, rewrite):
    def spoil(array):
        array[0, 0, 0] = 7
        return array

    rewrite(scan.label, spoil)
    with pytest.raises(ValueError, match=r"labelsTr.*label values \[7\] found, expected only"):
        load(scan)
    rewrite(scan.label, lambda array: array * 0.5)
    with pytest.raises(ValueError, match=r"label values \[0.5"):
        load(scan)


def test_nan_voxels_are_refused(scan, rewrite):
    def spoil(array):
        array = array.astype(np.float32)
        array[1, 1, 1] = np.nan
        return array

    rewrite(scan.image, spoil)
    with pytest.raises(ValueError, match=r"imagesTr.*1 voxels are NaN or infinite"):
        load(scan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.astype(np.complex64), "voxels of type complex64"),
        (lambda array: array[:0], r"shape \(0, "),
        (lambda array: 0 * array + 7, "every voxel is 7, expected a picture"),
    ],
)
def test_files_that_hold_no_picture_are_refused(scan, rewrite, change, message):
    rewrite(scan.image, change)
    with pytest.raises(ValueError, match=message) as refused:
        load(Scan("x", "x", scan.image, None))
    assert str(scan.image) in str(refused.value)


def test_modalities_are_the_last_axis_and_must_be_as_many_as_dataset_json_lists(scan, rewrite):
    rewrite(scan.image, lambda array: np.stack([array, 2 * array], axis=-1))
    volume = load_volume(scan, channels=2, labels=LABELS)
    assert volume.image.shape == (2, *volume.label.shape)
    np.testing.assert_array_equal(volume.image[1], 2 * volume.image[0])
    with pytest.raises(ValueError, match="has 2 modalities, expected 1"):
        load(scan)


def test_two_dimensional_images_are_refused(scan, rewrite):
    rewrite(scan.image, lambda array: array[:, :, 0])
    with pytest.raises(ValueError, match="expected three dimensions"):
        check_headers(scan)


def test_a_singular_affine_is_refused(scan):
    image = nib.load(scan.image)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=2)
    array = np.asanyarray(image.dataobj)
    broken = nib.Nifti1Image(array, None, image.header)
    nib.save(broken, scan.image)
    with pytest.raises(ValueError, match="singular"):
        check_headers(scan)
