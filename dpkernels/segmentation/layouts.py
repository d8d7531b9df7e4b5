"""The layouts of a data set of scans, and who each scan is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dpkernels.segmentation.decathlon import MANIFEST, read_decathlon
from dpkernels.segmentation.scans import SUFFIXES, Found, ScanFolder, scan_name
from dpkernels.training.cohort import assign_patients

#: by the file in a data set's folder that tells the layout; the first one found counts
LAYOUTS: dict[str, Callable[[Path], Found]] = {
    MANIFEST: read_decathlon,
}


def read_scans(root: str | Path, patients_csv: str | Path = "") -> ScanFolder:
    """Find the labelled scans of a data set and group them by patient.

    Args:
        root: its folder, in one of `LAYOUTS`.
        patients_csv: CSV with the columns scan,patient_id; overrides what the layout says.

    Raises:
        ValueError: the folder, a key of its list or a listed file is missing or malformed; the
            message names the file, what was found and what is expected.
    """
    folder = Path(root)
    fitting = (read for mark, read in LAYOUTS.items() if (folder / mark).is_file())
    found = next(fitting, read_decathlon)(folder)
    patients, unit, notes = assign_patients(
        [(scan.name, scan.patient_id) for scan in found.scans],
        "patient",
        patients_csv,
        record="scan",
        source=found.source,
        name_of=lambda name: scan_name(name) if name.endswith(SUFFIXES) else name,
    )
    scans = tuple(
        dataclasses.replace(scan, patient_id=patient)
        for scan, patient in zip(found.scans, patients, strict=True)
    )
    return ScanFolder(folder, scans, unit, (*found.notes, *notes), found.labels, found.modalities)
