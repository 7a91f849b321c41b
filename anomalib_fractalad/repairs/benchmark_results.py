# SPDX-License-Identifier: Apache-2.0
"""``anomalib benchmark`` fails to join the results of models with different arguments or metrics."""

import sys
from typing import Any

from .base import Repair


def _apply(for_all: bool) -> None:
    from pandas import DataFrame  # noqa: PLC0415

    from anomalib_fractalad.registration import MODELS  # noqa: PLC0415

    job: Any = sys.modules["anomalib.pipelines.benchmark.job"].BenchmarkJob
    original = job.collect

    def collect(results: list[dict[str, Any]]) -> Any:
        own = any(str(value).rpartition(".")[2] in MODELS for result in results for value in result.values())
        return DataFrame(results) if for_all or own else original(results)

    job.collect = staticmethod(collect)


BENCHMARK_RESULTS = Repair(
    name="benchmark results",
    defect="anomalib benchmark fails to join the results of models with different arguments or metrics.",
    versions=">=2.7,<2.8",
    modules=("anomalib.pipelines.benchmark.job",),
    apply=_apply,
)
