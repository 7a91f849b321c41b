# SPDX-License-Identifier: Apache-2.0
"""The jobs that anomalib's own benchmark makes of configs/anomalib_benchmark.yaml."""

from pathlib import Path

import yaml
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

CONFIG = Path(__file__).parents[2] / "configs" / "anomalib_benchmark.yaml"


def test_every_model_is_built_with_its_training_length(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    arguments = config["benchmark"]
    for model in arguments["model"]["grid"]:
        model["init_args"]["pre_trained"] = False
    arguments["data"]["init_args"] |= {"root": str(tmp_path), "category": {"grid": ["fabric"]}}
    jobs = list(BenchmarkJobGenerator(config["accelerator"]).generate_jobs(arguments, None))
    lengths = {job.model.name: job.model.trainer_arguments["max_epochs"] for job in jobs}
    assert lengths == {"FractalAD": 40, "ADPS": 20, "AAND": 11, "Patchcore": 1, "Padim": 1}
