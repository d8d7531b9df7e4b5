import re
from pathlib import Path

import pytest
import yaml

from dpkernels.segmentation.config import SegmentationConfig
from dpkernels.segmentation.presets import PRESETS
from dpkernels.training.settings import merge, parse_override


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_a_round_trip_through_yaml(name):
    config = SegmentationConfig.from_dict(PRESETS[name])
    again = SegmentationConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())))
    assert again == config


def test_a_preset_can_be_changed_in_python():
    config = SegmentationConfig.from_preset("phantom", {"privacy": {"epsilon": 3}})
    assert config.privacy.epsilon == 3.0
    assert config.preset == "phantom"
    with pytest.raises(ValueError, match="--preset must be one of"):
        SegmentationConfig.from_preset("liver")


def test_an_override_changes_one_setting():
    values = merge(PRESETS["phantom"], parse_override("network.channels=[16,32,64]"))
    values = merge(values, parse_override("privacy.delta=1e-6"))
    config = SegmentationConfig.from_dict(values)
    assert config.network["channels"] == [16, 32, 64]
    assert config.network["strides"] == [2, 2]
    assert config.privacy.delta == 1e-6


def test_another_target_replaces_the_whole_block():
    block = {"_target_": "monai.losses.TverskyLoss", "softmax": True}
    merged = merge(PRESETS["phantom"], {"loss": block})
    assert merged["loss"] == block


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=5", "unknown setting training.step; did you mean steps"),
        ("foo=1", "unknown setting foo; expected one of data"),
        ("training.steps=many", "training.steps must be a value of type int"),
        ("training.steps=0", "training.steps must be at least 1"),
        ("training.seed=-1", "training.seed must be at least 0"),
        ("privacy.insecure_fixed_noise=-1", "privacy.insecure_fixed_noise must be at least 0"),
        ("training.schedule=linear", "training.schedule must be constant or cosine"),
        ("data.shape=32", "data.shape must be a list"),
        ("data.shape=[32,32]", "data.shape must be three positive numbers"),
        ("data.spacing=[1,1,1]", "either data.shape or data.spacing"),
        ("data.test_share=1.5", "data.test_share must be between 0 and 1"),
        ("data.window=[200,-150]", "data.window must be"),
        ("data.cache=disk", "data.cache must be memory or none"),
        ("privacy.noise_multiplier=1", "either privacy.epsilon or privacy.noise_multiplier"),
        ("privacy.epsilon=-1", "privacy.epsilon must be positive"),
        ("privacy.delta=2", "privacy.delta must be between 0 and 1"),
        ("privacy=3", "privacy must be a mapping"),
        ("network._target_=null", "network"),
    ],
)
def test_faulty_settings_are_refused_by_name(override, message):
    if override.startswith("network"):
        values = {**PRESETS["phantom"], "network": {"channels": [1]}}
    else:
        values = merge(PRESETS["phantom"], parse_override(override))
    with pytest.raises(ValueError, match=message):
        SegmentationConfig.from_dict(values)


def test_the_yaml_of_the_tutorial_is_valid():
    tutorial = Path(__file__).parents[2] / "docs" / "tutorials" / "segmentation.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", tutorial.read_text(), flags=re.DOTALL)
    config = SegmentationConfig.from_preset("phantom", yaml.safe_load(block))
    assert config.data.views_per_patient == 4
    assert config.network["_target_"].endswith("SegResNet")
