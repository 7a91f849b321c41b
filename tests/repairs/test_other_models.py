# SPDX-License-Identifier: Apache-2.0
"""A model that is not the package's does the same with the package and without it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from PIL import Image

# Trains PaDiM on images of 8 and 16 bits, and prints its scores, its image and what truncated images and a path in
# another script come to. With an argument, a model of the package does the same first, on the same data module.
PADIM = """
import sys
from pathlib import Path
import numpy, torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
torch.set_num_threads(1)
root = Path(sys.argv[1])
results = root / f"results {len(sys.argv)}"
def data(folder):
    torch.manual_seed(0)
    return Folder(name="part", root=root, normal_dir=folder, train_batch_size=4, eval_batch_size=4, num_workers=0)
def engine(name):
    return Engine(default_root_dir=results / name, accelerator="cpu", max_epochs=1, logger=False,
                  enable_progress_bar=False, enable_model_summary=False)
def attempt(run):
    try:
        run()
        print("no error")
    except Exception as error:
        print(type(error).__name__, error)
shared = data("good")
shared.prepare_data()
shared.setup(TrainerFn.FITTING)
if sys.argv[2:]:
    import anomalib_fractalad
    kind = anomalib_fractalad.FractalAD
    own = kind(backbone="test_resnet", pre_trained=False, pre_processor=kind.configure_pre_processor((64, 64)))
    runner = engine("own")
    runner.fit(own, datamodule=shared)
    (deep,) = runner.predict(own, data_path=root / "deep.png")
    assert 0.4 < deep.image.mean() < 0.6, deep.image.mean()
    attempt(lambda: engine("again").fit(own, datamodule=data("truncated")))
    print("----")
seed_everything(0, verbose=False)
model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=3, post_processor=False)
runner = engine("padim")
seed_everything(0, verbose=False)
runner.fit(model, datamodule=shared)
for batch in runner.predict(model, data_path=root / "good") + runner.predict(model, data_path=root / "deep.png"):
    print(batch.image_path, round(float(batch.pred_score), 3), batch.image.double().mean().item())
for drawn in sorted((results / "padim").rglob("deep.png")):
    print(numpy.asarray(Image.open(drawn)).mean())
attempt(lambda: engine("padim").fit(Padim(pre_trained=False), datamodule=data("truncated")))
attempt(lambda: runner.predict(model, data_path=root / "truncated"))
attempt(lambda: runner.predict(model, data_path=root / "\u90e8\u54c1"))
"""


@pytest.mark.slow
def test_padim_is_the_same_with_and_without_the_package(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(12):
        save(random.integers(0, 255, (64, 64)), tmp_path / f"good/{i}.png")
        save(random.integers(0, 255, (64, 64)), tmp_path / f"truncated/{i}.png")
    save(random.integers(0, 255, (64, 64)), tmp_path / "部品/0.png")
    deep = Image.fromarray(random.integers(0, 65535, (64, 64)).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    deep.save(tmp_path / "good/deep.png")
    broken = tmp_path / "truncated/3.png"
    broken.write_bytes(broken.read_bytes()[:1000])

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PADIM, str(tmp_path), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    without = run(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    own, with_package = run("own").split("----\n")
    assert "3.png is truncated" in own
    assert without.count("Error") == 3, without
    pairs = zip(with_package.splitlines(), without.splitlines(), strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
