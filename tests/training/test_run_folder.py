"""The run folder: atomic writes, the ledger, and what is refused by name."""

import json
import math
from pathlib import Path

import pytest
import torch

from dpkernels.training.run_folder import (
    RunFolder,
    StepLedger,
    atomic,
    environment,
    load_checkpoint,
    steps_begun,
)


def test_a_ledger_line_cut_short_still_counts(tmp_path):
    path = tmp_path / "steps.ledger"
    path.write_bytes(b"1\n2\n3")
    ledger = StepLedger(path)
    assert ledger.count == 3
    assert ledger.begin() == 4
    ledger.close()
    assert StepLedger(path).count == steps_begun(path) == 4


def test_a_full_disk_is_reported_with_the_file_it_met(tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(OSError, match=r"No space left on device: .*metrics.json"), atomic(path):
        raise OSError(28, "No space left on device")  # as write() says it, without a name


def test_own_files_beside_the_overlays_stay(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for name in ("old.png", "notes.txt"):
        (folder.overlays / name).write_text("x")
    folder.clear_overlays()
    assert [path.name for path in folder.overlays.iterdir()] == ["notes.txt"]


def test_an_error_while_a_file_is_written_leaves_the_former_one_whole(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("split.json", {"train": ["a"]})

    def written_halfway() -> None:
        with atomic(folder.root / "split.json") as path:
            path.write_text('{"train": [')
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        written_halfway()
    assert folder.read_json("split.json") == {"train": ["a"]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        folder.write_json("split.json", {"train": {1, 2}})
    assert folder.read_json("split.json") == {"train": ["a"]}
    assert not list(folder.root.rglob("*.partial"))


def test_who_reads_meanwhile_has_the_former_file_whole(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_text("privacy_report.md", "former")
    with (folder.root / "privacy_report.md").open() as reader:
        folder.write_text("privacy_report.md", "new and longer")
        assert reader.read() == "former"
    assert (folder.root / "privacy_report.md").read_text() == "new and longer"


def test_a_file_appears_only_once_it_is_whole(tmp_path):
    with atomic(tmp_path / "report.md") as path:
        path.write_text("half")
        assert not (tmp_path / "report.md").exists()
        assert path.parent == tmp_path, "os.replace needs one file system"
    assert (tmp_path / "report.md").read_text() == "half"


def test_json_has_no_numbers_that_json_does_not_know(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_json("metrics.json", {"a": [1.5, math.nan, (math.inf, 2)], 3: -math.inf})
    text = folder.metrics_json.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, [None, 2]], "3": None}


def test_a_folder_without_a_run_is_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder: it has no config.yaml"):
        RunFolder.open(tmp_path)
    folder = RunFolder.create(tmp_path / "run")
    folder.write_yaml("config.yaml", {"training": {"steps": 1}})
    assert RunFolder.open(folder.root).config.read_text() == "training:\n  steps: 1\n"


def test_a_folder_whose_run_took_steps_is_not_taken_for_a_new_one(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    ledger = StepLedger(folder.ledger)
    RunFolder.create(folder.root)
    ledger.begin()
    ledger.close()
    with pytest.raises(ValueError, match="--out: .*holds a run that took steps.*--resume"):
        RunFolder.create(folder.root)


def test_steps_are_on_disk_as_soon_as_they_have_begun(tmp_path):
    path = tmp_path / "steps.ledger"
    assert steps_begun(path) == 0
    ledger = StepLedger(path)
    for step in (1, 2, 3):
        assert ledger.begin() == step == steps_begun(path)
    ledger.close()
    assert path.read_bytes() == b"1\n2\n3\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"damaged", "not a readable checkpoint"),
        ({"weights": torch.zeros(1)}, "expected a checkpoint that `train` wrote"),
        ([torch.zeros(1)], "expected a checkpoint that `train` wrote"),
        ({"model": Path("code")}, "not a readable checkpoint"),
    ],
)
def test_faulty_checkpoints_are_named(tmp_path, content, message):
    """The last holds an object that unpickling would have to run code for."""
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"last.pt: {message}"):
        load_checkpoint(path)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.save_checkpoint("last.pt", {"model": {"weight": torch.arange(3.0)}, "step": 2})
    state = load_checkpoint(folder.last)
    assert state["step"] == 2
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))


def test_the_environment_names_versions_and_device():
    stated = environment(torch.device("cpu"))
    assert torch.__version__.startswith(stated["packages"]["torch"].partition("+")[0])
    assert (stated["device"], stated["gpu"]) == ("cpu", None)
    assert json.loads(json.dumps(stated)) == stated
