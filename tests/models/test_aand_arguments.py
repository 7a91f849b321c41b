# SPDX-License-Identifier: Apache-2.0
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.data import Folder
from conftest import save, small_engine
from test_aand_training import small_model

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.student import SmallStudent

CONFIGS = Path(__file__).parents[2] / "configs"


def test_optimizer_settings() -> None:
    model = small_model()
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert all(group["lr"] == 0.005 and group["betas"] == (0.5, 0.999) for group in optimizer.param_groups)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["amplification", "distillation"]
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


def test_the_default_generator_is_that_of_the_paper() -> None:
    generator = small_model().generator.spec
    assert generator["class_path"] == "PerlinAnomalyGenerator"
    assert generator["init_args"]["probability"] == 0.8
    assert generator["init_args"]["blend_factor"] == (0.2, 1.0)


def test_textures_reach_the_generator(tmp_path: Path, tiles: Folder) -> None:
    save(torch.full((64, 64), 200).numpy(), tmp_path / "textures" / "gray.png")
    model = small_model(anomaly_source_path=tmp_path / "textures")
    assert model.generator.spec["init_args"]["anomaly_source_path"] == str(tmp_path / "textures")
    small_engine(tmp_path, fast_dev_run=2).fit(model, datamodule=tiles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be above 0 and a whole number"),
        ({"amplifier_width": True}, "amplifier_width is True; it must be above 0 and a whole number"),
        ({"strides": (4.0, 8.0)}, r"strides is \(4.0, 8.0\)"),
        ({"top_share": math.inf}, "top_share is inf"),
        ({"split": (math.nan, 1)}, r"split is \(nan, 1\).*finite"),
        ({"split": (1, math.inf)}, r"split is \(1, inf\).*finite"),
        ({"split": (1, 0)}, r"split is \(1, 0\).*stage II's above 0"),
        ({"split": (-1, 1)}, r"split is \(-1, 1\)"),
        ({"split": (1, 1, 1)}, r"split is \(1, 1, 1\)"),
        ({"anomaly_generator": "Nothing"}, "Nothing"),
        ({"score": "median"}, "'median'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


def test_the_published_settings_are_the_defaults() -> None:
    config = yaml.safe_load((CONFIGS / "aand.yaml").read_text())
    arguments = config["model"]["init_args"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(AAND).parameters.items()}
    assert {**arguments, "split": tuple(arguments["split"])} == {name: defaults[name] for name in arguments}
    assert config["trainer"]["max_epochs"] == sum(arguments["split"])


def test_choices_of_the_network_reach_it() -> None:
    model = small_model(amplifier_width=5, strides=[8, 16], alignment="centers", fine_embedding=True, split=(1, 1))
    assert [amplifier.gate.query[0].out_channels for amplifier in model.model.amplifiers] == [5, 5]
    assert [upsample.stride for upsample in model.model.upsample] == [8, 16]
    assert isinstance(model.model.student, SmallStudent)
    assert model.model.student.embed[0][0].stride == (1, 1)
    assert (model.hparams["amplifier_width"], model.hparams["fine_embedding"]) == (5, True)


def test_older_checkpoints_and_configs_are_understood() -> None:
    model = small_model(alignment="centres", strides=(8, 16))
    assert model.hparams["alignment"] == "centers"
    assert [upsample.stride for upsample in model.model.upsample] == [8, 16]
    state = {name.replace(".residual.", ".generator."): value for name, value in model.state_dict().items()}
    assert any(".generator." in name for name in state)
    loaded = small_model(alignment="centers", strides=(8, 16))
    loaded.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.model.eval()(images).anomaly_map, model.model.eval()(images).anomaly_map)
