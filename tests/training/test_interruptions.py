"""A run killed, a disk full, a folder taken: nothing is lost and nothing miscounted."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dpkernels.accounting import get_epsilon
from dpkernels.training.logs import read_metrics
from dpkernels.training.run_folder import (
    RunFolder,
    StepLedger,
    load_checkpoint,
    steps_begun,
)
from dpkernels.training.settings import merge
from tests.training.runs import StopAfter, history, weights
from tests.training.toy import ToyConfig, ToyTrainer, tiny


def test_an_interrupted_run_continues_with_an_exact_history(tmp_path):
    config = tiny({"training": {"steps": 5}})
    with pytest.raises(KeyboardInterrupt):
        ToyTrainer(config, tmp_path / "run", StopAfter(2)).fit()
    assert history(tmp_path / "run")[0][2] == 2
    ToyTrainer.from_run(tmp_path / "run").evaluate()
    assert ToyTrainer.from_run(tmp_path / "run").finished() is None
    result = ToyTrainer.from_run(tmp_path / "run").fit(resume=True)
    assert result.steps == 5
    ((sigma, rate, steps),) = history(tmp_path / "run")
    assert (steps, rate) == (5, 2 / 6)
    assert result.epsilon == get_epsilon(
        noise_multiplier=sigma, sample_rate=rate, steps=5, delta=1e-5
    )
    assert read_metrics(tmp_path / "run" / "metrics.csv")["step"] == [1, 3, 4, 5]


def test_a_resumed_run_takes_the_very_steps_of_an_uninterrupted_one(tmp_path):
    """Without noise, and with every patient in every batch, nothing else is random."""
    change = {
        "training": {"steps": 5, "batch_size": 6, "ema_decay": 0.9, "schedule": "cosine"},
        "privacy": {"enabled": False},
    }
    ToyTrainer(tiny(change), tmp_path / "whole").fit()
    with pytest.raises(KeyboardInterrupt):
        ToyTrainer(tiny(change), tmp_path / "parts", StopAfter(3)).fit()
    ToyTrainer.from_run(tmp_path / "parts").fit(resume=True)
    torch.testing.assert_close(
        weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=1e-5
    )
    ema = [
        load_checkpoint(tmp_path / run / "checkpoints" / "ema.pt")["model"]
        for run in ("parts", "whole")
    ]
    for name, value in ema[0].items():
        torch.testing.assert_close(value, ema[1][name], rtol=0, atol=1e-5)


def test_resuming_with_other_privacy_parameters_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ToyTrainer(tiny({"training": {"steps": 4}}), tmp_path / "run", StopAfter(2)).fit()
    for change, name in (
        ({"privacy": {"epsilon": 9.0}}, "noise_multiplier"),
        ({"privacy": {"max_grad_norm": 0.7}}, "max_grad_norm"),
        ({"privacy": {"delta": 1e-6}}, "delta"),
        ({"privacy": {"enabled": False}}, "enabled"),
        ({"training": {"steps": 40}}, "steps"),
        ({"training": {"batch_size": 3}}, "sample_rate"),
        ({"training": {"seed": 1}}, "split"),
        ({"data": {"test_share": 0.4}}, "patients"),
    ):
        config = tiny(merge({"training": {"steps": 4}}, change))
        with pytest.raises(ValueError, match=f"--resume: a privacy parameter .*{name}"):
            ToyTrainer(config, tmp_path / "run").fit(resume=True)


def test_a_finished_run_is_neither_resumed_nor_overwritten(finished):
    trainer = ToyTrainer.from_run(finished)
    with pytest.raises(ValueError, match="all 3 planned steps are taken"):
        trainer.fit(resume=True)
    with pytest.raises(ValueError, match="holds a run that took steps"):
        trainer.fit()


def test_a_run_that_failed_before_its_first_step_may_be_repeated(tmp_path):
    with pytest.raises(ValueError, match=r"p3: not a readable vector"):
        ToyTrainer(tiny({"data": {"damaged": ["p3"]}}), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "checkpoints" / "steps.ledger").exists()
    assert ToyTrainer(tiny(), tmp_path / "run").fit().steps == 3


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    config = tiny({"training": {"steps": 4, "checkpoint_every": 1}})
    write = torch.save
    written = []

    def fill_the_disk(state, path):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(state, path)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"last.pt: .*No space left.*previous checkpoint is whole"):
        ToyTrainer(config, tmp_path / "run").fit()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 2
    assert not list((tmp_path / "run").rglob("*.partial"))
    monkeypatch.undo()
    result = ToyTrainer.from_run(tmp_path / "run").fit(resume=True)
    assert result.steps == 4
    assert history(tmp_path / "run")[0][2] == 4


def test_a_step_that_cannot_be_entered_in_the_ledger_is_not_taken(tmp_path):
    """A limit on file sizes stands for the full disk: real writes fail, also those of root."""
    config = tiny({"training": {"steps": 3, "checkpoint_every": 1}})
    with pytest.raises(KeyboardInterrupt):
        ToyTrainer(config, tmp_path / "run", StopAfter(2)).fit()
    ledger = tmp_path / "run" / "checkpoints" / "steps.ledger"
    counted, saved = steps_begun(ledger), weights(tmp_path / "run")
    entered = StepLedger(ledger)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.stat().st_size, limits[1]))
    try:
        with pytest.raises(OSError, match=r"steps.ledger: .*Step 3 was not taken.*--resume"):
            entered.begin()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        entered.close()
    assert steps_begun(ledger) == counted == 2
    torch.testing.assert_close(weights(tmp_path / "run"), saved)
    assert ToyTrainer.from_run(tmp_path / "run").fit(resume=True).steps == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"run folder: cannot write to .*file"):
        ToyTrainer(tiny(), tmp_path / "file" / "run").fit()


@contextlib.contextmanager
def unprivileged():
    """Permissions do not hold root back."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_run_folder_is_named_before_the_data_are_read(resume):
    with tempfile.TemporaryDirectory() as place:  # below tmp_path others than root see nothing
        run = RunFolder.create(Path(place) / "run")
        run.write_yaml("config.yaml", {})
        for part in (Path(place), run.root, run.checkpoints, run.overlays):
            part.chmod(0o555)
        nothing = tiny({"data": {"damaged": ["p0"]}})
        try:
            with (
                unprivileged(),
                pytest.raises(ValueError, match=r"cannot write to .*run:"),
            ):
                ToyTrainer(nothing, run.root).fit(resume=resume)
        finally:
            for part in (Path(place), run.root, run.checkpoints, run.overlays):
                part.chmod(0o755)


def test_a_run_folder_has_one_trainer_at_a_time(tmp_path):
    """Two would enter steps into one ledger, and one would overwrite the other's checkpoint."""
    folder = RunFolder.create(tmp_path / "run")
    with folder.claimed(), pytest.raises(ValueError, match="another process is training in"):
        ToyTrainer(tiny(), folder.root).fit()
    assert not folder.config.exists()
    assert ToyTrainer(tiny(), folder.root).fit().steps == 3


def _run_and_say(values: dict, out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    ToyTrainer(ToyConfig.from_dict(values), out).fit(resume=resume)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork server to be fast")
def test_killed_ten_times_no_step_goes_uncounted_and_no_checkpoint_is_unreadable(tmp_path):
    steps, run = 500, tmp_path / "run"
    values = tiny({"training": {"steps": steps, "checkpoint_every": 2}}).to_dict()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy"])
    rng = np.random.default_rng(0)
    ledger, last = run / "checkpoints" / "steps.ledger", run / "checkpoints" / "last.pt"

    def taken() -> int:
        return len(ledger.read_bytes().split()) if ledger.exists() else 0

    for kill in range(10):
        started = taken()
        child = context.Process(target=_run_and_say, args=(values, run, started > 0))
        child.start()
        target = started + int(rng.integers(1, 6))
        while taken() < target:
            assert child.is_alive(), f"the run ended by itself before kill {kill}"
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not last.exists() or load_checkpoint(last)["step"] <= taken()
    counted_before = taken()
    _run_and_say(values, run, True)
    assert counted_before < steps == taken()
    ((_, _, counted),) = history(run)
    assert counted == steps
    assert json.loads((run / "privacy_report.json").read_text())["epsilon"] <= 8
