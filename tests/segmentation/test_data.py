import numpy as np
import pytest
import torch

from dpkernels.segmentation.config import DataConfig
from dpkernels.segmentation.data import (
    CaseStore,
    crop_view,
    prepare,
    restore,
)
from dpkernels.segmentation.layouts import read_scans
from dpkernels.segmentation.volume import Volume
from dpkernels.training.sampling import flatten_views
from dpkernels.training.store import PatientDataset


def volume(shape=(10, 12, 14), spacing=(2.0, 2.0, 2.0)) -> Volume:
    rng = np.random.default_rng(0)
    image = rng.normal(50, 200, size=(1, *shape)).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:8, 4:9] = 1
    return Volume("v", image, label, spacing, np.diag([*spacing, 1.0]))


def store_of(folder, **settings) -> CaseStore:
    store = CaseStore(read_scans(folder), DataConfig(**settings), divisor=4)
    store.read_all()
    return store


def test_copies_of_a_scan_belong_to_one_patient(folder, manifest):
    """Two patients in the books, one person: the guarantee would hold for each copy only."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "phantom_005.nii.gz").write_bytes(
            (folder / part / "phantom_002.nii.gz").read_bytes()
        )
    with pytest.raises(ValueError, match=r"phantom_002.* and .*phantom_005.* have the same voxels"):
        store_of(folder, shape=(8, 8, 8))
    manifest(folder, lambda values: values["training"][5].update(patient_id="phantom_002"))
    assert len(store_of(folder, shape=(8, 8, 8)).folder.patients) == 7


def test_the_window_is_fixed_and_maps_to_zero_and_one():
    config = DataConfig(shape=(10, 12, 14), window=(-100.0, 100.0))
    scan = volume()
    image = prepare(scan, config, divisor=2).image
    expected = np.clip((scan.image + 100) / 200, 0, 1)
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)


def test_zscore_uses_each_scan_alone():
    image = prepare(volume(), DataConfig(shape=(10, 12, 14), intensity="zscore"), divisor=2).image
    assert abs(float(image.mean())) < 1e-4
    assert float(image.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(17, 16, 33), (8, 9, 10)])
def test_axes_are_padded_to_multiples_of_the_total_stride(shape):
    case = prepare(volume(), DataConfig(shape=shape), divisor=16)
    assert case.content == shape
    assert all(
        n % 16 == 0 and 0 <= n - c < 16 for n, c in zip(case.image.shape[1:], shape, strict=False)
    )
    assert case.label.shape[1:] == case.image.shape[1:]


def test_spacing_decides_the_grid():
    config = DataConfig(spacing=(1.0, 2.0, 4.0), crop=(4, 4, 4))
    assert prepare(volume(), config, divisor=1).content == (20, 12, 7)


def test_restore_undoes_prepare():
    scan = volume(shape=(16, 16, 16))
    case = prepare(scan, DataConfig(shape=(32, 32, 24)), divisor=16)
    scores = torch.nn.functional.one_hot(case.label[0].long(), 2).permute(3, 0, 1, 2)
    restored = restore(scores.float(), case, scan).numpy()
    overlap = 2 * (restored & scan.label).sum() / (restored.sum() + scan.label.sum())
    assert restored.shape == scan.label.shape
    assert overlap > 0.85


def test_views_of_a_patient_are_adjacent_rows_from_any_of_their_scans(folder, manifest):
    def one_patient_per_two_scans(values):
        for number, entry in enumerate(values["training"]):
            entry["patient_id"] = f"patient{number // 2}"

    manifest(folder, one_patient_per_two_scans)
    settings = {"spacing": (17.0, 17.0, 17.0), "crop": (8, 8, 8), "views_per_patient": 12}
    store = store_of(folder, **settings)
    dataset = PatientDataset(list(store.folder.patients), store, None, seed=0)
    image, label = dataset[1]
    assert image.shape == (12, 1, 8, 8, 8)
    assert label.shape == (12, 1, 8, 8, 8)
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8
    origins = {scan.name: 0 for scan in store.folder.patients["patient1"]}
    for view in image:
        for name in origins:
            whole = next(s for s in store.folder.records if s.name == name)
            windows = store.item(whole).image[0]
            for axis in range(3):
                windows = windows.unfold(axis, 8, 1)
            origins[name] += bool((windows == view[0]).flatten(3).all(-1).any())
    assert sum(origins.values()) == 12
    assert min(origins.values()) > 0

    images = torch.stack([dataset[0][0], dataset[1][0]])
    torch.testing.assert_close(flatten_views(images)[12:], image)


def test_draws_depend_on_seed_step_and_patient_only(cohort):
    store = store_of(cohort, spacing=(17.0, 17.0, 17.0), crop=(8, 8, 8))
    names = list(store.folder.patients)

    def draw(seed, step):
        dataset = PatientDataset(names, store, None, seed=seed)
        dataset.step = step
        return dataset[2][0]

    torch.testing.assert_close(draw(0, 5), draw(0, 5), rtol=0, atol=0)
    assert any(not torch.equal(draw(0, 5), draw(*other)) for other in ((0, 6), (1, 5), (0, 7)))


def test_without_a_cache_the_same_cases_come_from_disk(cohort):
    cached, fresh = (
        store_of(cohort, shape=(8, 8, 8)),
        store_of(cohort, shape=(8, 8, 8), cache="none"),
    )
    scan = cached.folder.records[0]
    assert cached.item(scan) is cached.item(scan)
    torch.testing.assert_close(fresh.item(scan).image, cached.item(scan).image)


def test_crops_centre_on_labelled_voxels_as_often_as_asked():
    case = prepare(volume(shape=(24, 24, 24)), DataConfig(shape=(24, 24, 24)), divisor=1)
    rng = np.random.default_rng(0)
    centred = sum(int(crop_view(case, (3, 3, 3), 0.75, rng)[1][0, 1, 1, 1]) for _ in range(600))
    inside = float((case.label > 0).float().mean())
    expected = 600 * (0.75 + 0.25 * inside)
    assert abs(centred - expected) < 5 * np.sqrt(600 * 0.25 * 0.75)


def test_crops_larger_than_the_scan_are_padded_and_unlabelled_scans_are_cropped_anywhere():
    scan = volume(shape=(6, 6, 6))
    scan.label[:] = 0
    case = prepare(scan, DataConfig(shape=(6, 6, 6)), divisor=1)
    image, label = crop_view(case, (8, 4, 6), 1.0, np.random.default_rng(0))
    assert image.shape == label.shape == (1, 8, 4, 6)
    assert float(image[:, 6:].max()) == float(case.image.min())


def test_augmentations_act_on_image_and_label_alike_and_leave_the_cache_alone(cohort):
    class FlipBoth:
        def set_random_state(self, seed):
            self.seed = seed

        def __call__(self, sample):
            return {key: value.flip(1) for key, value in sample.items()}

    store = store_of(cohort, shape=(8, 8, 8))
    names = list(store.folder.patients)
    plain = PatientDataset(names, store, None, seed=0)[0]
    flipped = PatientDataset(names, store, FlipBoth(), seed=0)[0]
    for a, b in zip(plain, flipped, strict=True):
        torch.testing.assert_close(a.flip(2), b)
    torch.testing.assert_close(PatientDataset(names, store, None, seed=0)[0], plain)
