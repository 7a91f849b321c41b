# SPDX-License-Identifier: Apache-2.0
"""Registration with anomalib, each case in a process of its own, since it depends on the order of imports."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

pytestmark = pytest.mark.slow

CHECK = """
import anomalib.data, anomalib.models
from anomalib.data import SurfaceDefects
from anomalib.models import FractalAD, get_model, list_models
import anomalib_fractalad
assert anomalib_fractalad.FractalAD is FractalAD, "two classes"
assert anomalib_fractalad.SurfaceDefects is SurfaceDefects
for name in ("ADPS", "AAND", "FractalMemory"):
    assert getattr(anomalib.models, name) is getattr(anomalib_fractalad, name)
assert {"fractal_a_d", "a_d_p_s", "a_a_n_d", "fractal_memory"} <= list_models(), sorted(list_models())
assert "distillation_module" not in list_models()
arguments = {"backbone": "test_resnet", "pre_trained": False}
for name in ("FractalAD", "fractalad"):
    assert type(get_model(name, **arguments)) is FractalAD
for path in ("FractalAD", "anomalib.models.FractalAD"):
    assert type(get_model({"class_path": path, "init_args": arguments})) is FractalAD
import sys, anomalib.deploy, anomalib.data.utils.synthetic, anomalib.visualization.image.item_visualizer as visualizer
from anomalib_fractalad import image_files
from anomalib_fractalad.repairs import REPAIRS, reach, state
for_all = reach() == "all"
for key, module in list(sys.modules.items()):
    for name in ("read_image", "read_mask"):
        if key.startswith("anomalib.") and name in vars(module):
            assert (vars(module)[name] is getattr(image_files, name)) == for_all, (key, name)
assert (visualizer.Image.open is image_files.open_rgb) == for_all
assert (anomalib.data.utils.path.contains_non_printable_characters is image_files.has_control_characters) == for_all
import anomalib.engine, anomalib.utils.config, anomalib.pipelines.benchmark.job
expected = {"own": "for this package's models", "all": "for every model", "none": "off"}
for repair in REPAIRS:
    assert state(repair).partition(" (")[0] == expected[reach()], (repair.name, state(repair))
assert hasattr(anomalib.engine.Engine.predict, "__wrapped__") == (reach() == "own")
assert hasattr(anomalib.utils.config.update_config, "__wrapped__") == (reach() != "none")
assert type(get_model({"class_path": "anomalib_fractalad.FractalAD", "init_args": arguments})) is FractalAD
print("registered")
"""


# Imports torch and what of anomalib's dependencies needs no torch, once, and runs each case in a fork. There, the first
# import of torch finds it ready, and then loads the packages that announce themselves to torch, as a real import does.
FORKS = """
import importlib.abc, importlib.machinery, json, os, sys, traceback, warnings
import kornia_rs, matplotlib.pyplot, mpmath, numpy, omegaconf, pandas, PIL.Image, scipy.signal, sklearn.base, sympy
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch, torch._dynamo, torch.onnx, torch.utils.data
del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
heavy = {"anomalib", "anomalib_fractalad", "lightning", "timm", "kornia", "wrapt"} & sys.modules.keys()
assert not heavy, heavy

class Torch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    spec = torch.__spec__

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name == "torch" else None

    def create_module(self, spec):
        return torch

    def exec_module(self, module):
        sys.meta_path.remove(self)
        module.__spec__ = self.spec
        if module._is_device_backend_autoload_enabled():
            module._import_device_backends()

for line in sys.stdin:
    case = json.loads(line)
    if (child := os.fork()) == 0:
        output = os.open(case["output"], os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= case["environment"]
        warnings.simplefilter("error", RuntimeWarning)
        del sys.modules["torch"]
        sys.meta_path.insert(0, Torch())
        try:
            exec(case["code"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs code in a process of its own, and gives what it prints."""
    file = tmp_path_factory.mktemp("output") / "output"
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def run(code: str, **environment: str) -> str:
            file.unlink(missing_ok=True)
            case = {"code": textwrap.dedent(code), "environment": environment, "output": str(file)}
            print(json.dumps(case), file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n"
            return file.read_text()

        yield run
        process.stdin.close()


@pytest.mark.parametrize(
    "first",
    [
        "anomalib.models",
        "anomalib.data.utils.image",
        "anomalib.engine",
        "torch",
        "anomalib_fractalad",
        "anomalib_fractalad.models.fractalad.lightning_model",
        "anomalib_fractalad.data.surface_defects",
        "anomalib_fractalad.image_files",
        "anomalib_fractalad.export.module",
        "anomalib_fractalad.training.callbacks",
    ],
)
def test_every_import_order(first: str, run: Run) -> None:
    result = run(f"import {first}\n{CHECK}")
    assert result.endswith("registered\n"), result


@pytest.mark.parametrize("reach", ["all", "none"])
def test_repairs_for_every_model_and_for_none(reach: str, run: Run) -> None:
    result = run(f"import anomalib.engine\n{CHECK}", ANOMALIB_FRACTALAD_REPAIRS=reach)
    assert result.endswith("registered\n"), result


def test_a_process_that_is_no_fork() -> None:
    code = f"import anomalib.models\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.endswith("registered\n"), done.stderr


def test_without_torch_autoload_importing_the_package_is_enough(run: Run) -> None:
    result = run(f"import anomalib.models\nimport anomalib_fractalad\n{CHECK}", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.endswith("registered\n"), result


def test_import_of_torch_stays_cheap(run: Run) -> None:
    result = run("""
        import sys
        import torch
        ours = {"anomalib_fractalad.models", "anomalib_fractalad.image_files"}
        heavy = ({"anomalib", "lightning", "timm", "kornia", "wrapt"} | ours) & sys.modules.keys()
        assert not heavy, heavy
        assert "anomalib_fractalad.registration" in sys.modules
        print("cheap")
    """)
    assert result.endswith("cheap\n"), result


@pytest.mark.parametrize("first", ["anomalib.models", "torch"])
def test_models_that_cannot_be_imported_leave_anomalib_and_torch_working(first: str, run: Run) -> None:
    result = run(f"""
        import sys, warnings
        sys.modules["anomalib_fractalad.models.fractalad"] = None  # its import fails
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import {first}
            import anomalib.models
        ours = [str(w.message) for w in caught if "anomalib-fractalad" in str(w.message)]
        assert len(ours) == 1, ours
        assert "anomalib>=2.7,<2.8" in ours[0]
        assert "padim" in anomalib.models.list_models()
        import torch
        print(torch.ones(2).sum().item())
    """)
    assert result.endswith("2.0\n"), result


def test_a_broken_wrapt_leaves_anomalib_working(run: Run) -> None:
    result = run("""
        import sys, warnings
        sys.modules["wrapt"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import anomalib.models
        ours = [str(w.message) for w in caught if "anomalib-fractalad" in str(w.message)]
        assert len(ours) == 2, ours
        assert "could not register" in ours[0]
        assert "repairs of anomalib are off" in ours[1]
        print("padim" in anomalib.models.list_models())
    """)
    assert result.endswith("True\n"), result
