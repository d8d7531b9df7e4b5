"""What every run has: faulty values are refused by name, and presets can be changed."""

import pytest
import yaml

from dpkernels.training.config import PrivacyConfig, TrainingConfig
from dpkernels.training.settings import nest
from tests.training.toy import ToyConfig, tiny


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("training.steps", 0, "at least 1"),
        ("training.batch_size", 0, "at least 1"),
        ("training.physical_batch_size", -1, "at least 0"),
        ("training.validate_every", -1, "at least 0"),
        ("training.checkpoint_every", -1, "at least 0"),
        ("training.seed", -1, "at least 0"),
        ("training.ema_decay", 1.0, r"in \[0, 1\)"),
        ("training.schedule", "linear", "constant or cosine"),
        ("training.precision", "float16", "float32 or bfloat16"),
        ("privacy.epsilon", -1.0, "positive"),
        ("privacy.epsilon", None, "either privacy.epsilon or privacy.noise_multiplier"),
        ("privacy.noise_multiplier", 1.0, "either privacy.epsilon or privacy.noise_multiplier"),
        ("privacy.delta", 1.0, "between 0 and 1"),
        ("privacy.max_grad_norm", 0.0, "positive"),
        ("privacy.insecure_fixed_noise", -1, "at least 0"),
        ("network", {"channels": 3}, "a block with `_target_` naming a class"),
        ("loss", {}, "a block with `_target_` naming a class"),
    ],
)
def test_faulty_settings_are_refused_by_name(setting, value, expected):
    changes = nest(setting, value)
    if setting in ("network", "loss"):
        values = {**tiny().to_dict(), **changes}
    else:
        values = tiny().to_dict()
        section, name = setting.split(".")
        values[section][name] = value
    with pytest.raises(ValueError, match=rf"must be .*{expected}") as refused:
        ToyConfig.from_dict(values)
    assert str(refused.value).startswith(setting.replace("noise_multiplier", "epsilon"))


def test_no_guarantee_rests_on_an_accountant_that_may_fall_below():
    with pytest.raises(ValueError, match="privacy.accountant must be tight, rdp.*another one"):
        tiny({"privacy": {"accountant": "gdp"}})


def test_without_privacy_no_budget_is_needed():
    assert not PrivacyConfig(enabled=False, epsilon=None).enabled
    assert PrivacyConfig(epsilon=None, noise_multiplier=2.0).noise_multiplier == 2.0


def test_a_preset_can_be_changed_and_is_remembered():
    config = ToyConfig.from_preset("toy", {"privacy": {"epsilon": 3}, "data": {"patients": 20}})
    assert (config.preset, config.privacy.epsilon, config.data.patients) == ("toy", 3.0, 20)
    assert config.training == TrainingConfig()
    with pytest.raises(ValueError, match="--preset must be one of toy; got 'liver'"):
        ToyConfig.from_preset("liver")


def test_a_configuration_survives_yaml():
    config = tiny({"training": {"train_layers": ["weight"]}, "data": {"views_per_patient": 4}})
    again = ToyConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again == config
    assert again.data.views_per_patient == 4
