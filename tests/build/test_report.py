# SPDX-License-Identifier: Apache-2.0
"""The report in a browser without a head: what a person sees when the threshold is dragged."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_fractalad.build.report import write_report
from anomalib_fractalad.build.scoring import _heat, _small

aiohttp = pytest.importorskip("aiohttp", reason="no client of the browser's debugging port")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCORES = {"good": np.linspace(0.02, 0.5, 30), "bad": np.linspace(0.3, 0.99, 12), "synthetic": np.linspace(0.1, 1, 20)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    levels = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    Image.fromarray(levels).save(folder / "image.png")
    image, heat = _small(folder / "image.png"), _heat(levels)
    images = [
        {"group": group, "name": f"{group} {index} </script><b>", "score": float(score), "image": image, "map": heat}
        for group, scores in SCORES.items()
        for index, score in enumerate(scores)
    ]
    outcome = {"quality": 0.7, "image_auroc": 0.8, "pixel_ap": 0.6, "standard_error": 0.02, "score": "top"}
    outcome["by_kind"] = {"crack": [0.9, 0.5], "fractal": [1.0, 0.7]}
    rows = {
        "one": {"image_size": [256, 256], "gflop": 1.5, "rung": 0, "outcome": outcome},
        "two": {"image_size": [256, 256], "failed": "ValueError: <img src=x onerror=alert(1)>"},
    }
    content = {
        "name": "part <1>",
        "request": {"seed": 0},
        "look": {
            "folder": "/a/long/path/" + "of_many_letters" * 8 + "/good",
            "images": 100,
            "parts": 90,
            "grouped_by": "names",
            "kind": "texture",
            "size": [640, 480],
            "sizes": {"640x480": 99, "320x240": 1},
            "is_gray": True,
            "unreadable": {},
            "duplicates": [],
        },
        "split": {"train": 70, "held": 16, "calibration": 30, "false_alarms": 0.04},
        "choice": {"rows": rows, "chosen": "one", "why": "best", "left_out": ["fractal"]},
        "training": {"max_epochs": 3, "seconds": 12.5, "effort": 0.5},
        "part": {
            "false_alarms": {"images": 30, "false_alarms": 0.04, "upper_bound": 0.1, "confidence": 0.95},
            "files": {"openvino_fp32": "model/fp32.xml"},
            "network": "model/fp32.xml",
            "check": {"images": 30, "openvino_fp32": {"score": 1e-6, "map": 1e-5, "decisions_changed": []}},
            "int8": {"taken": False, "reason": "it was not asked for"},
            "versions": {"torch": "2"},
        },
        "warnings": ["Too few images."],
    }
    return write_report(folder / "report.html", content, images)


class Page:
    """A page of a browser, by its debugging port."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    async def evaluate(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def named(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]


@contextlib.asynccontextmanager
async def opened(address: str, width: int) -> AsyncIterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*map(str, command), f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            for _ in range(600):
                if port_file.exists() and port_file.read_text():
                    break
                await asyncio.sleep(0.1)
            port = port_file.read_text().split()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Runtime", "Log", "Network", "Page"):
                        await page.call(f"{domain}.enable")
                    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
                    await page.call("Emulation.setDeviceMetricsOverride", **size)
                    await page.call("Page.navigate", url=address)
                    await page.evaluate(LOADED)
                    yield page
        finally:
            process.terminate()
            process.wait(30)


LOADED = """new Promise((done) => document.readyState === "complete" ? done() : addEventListener("load", done))"""
PLACE = """(() => {
    byId("histogram").scrollIntoView({block: "center"});
    const {x, y, width, height} = byId("histogram").getBoundingClientRect();
    return [x, y, width, height];
})()"""
FADED = "getComputedStyle(document.querySelector('#gallery .frame img + img')).opacity"
COUNTS = """Object.fromEntries([...document.querySelectorAll("#counts tr[data-group]")]
    .map((row) => [row.dataset.group, Number(row.dataset.alarms)]))"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium (Debian's package chromium)")
@pytest.mark.parametrize("width", [1400, 400])
def test_the_threshold_can_be_dragged(report: Path, width: int) -> None:
    asyncio.run(drag(report, width))


async def drag(report: Path, width: int) -> None:
    async with opened(report.as_uri(), width) as page:

        async def assert_counts(threshold: float) -> None:
            expected = {group: int((scores > threshold).sum()) for group, scores in SCORES.items()}
            assert await page.evaluate(COUNTS) == expected
            low, high = sorted((0.5, threshold))
            changed = sum(int(((scores > low) & (scores <= high)).sum()) for scores in SCORES.values())
            assert await page.evaluate("document.querySelectorAll('#changes figure').length") == changed

        assert await page.evaluate("document.title") == "Inspection report: part <1>"
        await assert_counts(0.5)
        left, top, across, down = await page.evaluate(PLACE)
        for kind, share, buttons in (("mousePressed", 0.5, 1), ("mouseMoved", 0.7, 1), ("mouseReleased", 0.7, 0)):
            mouse = {"x": left + share * across, "y": top + down / 2, "button": "left", "buttons": buttons}
            await page.call("Input.dispatchMouseEvent", type=kind, clickCount=1, **mouse)
        dragged = await page.evaluate("threshold")
        assert 0.65 < dragged < 0.75
        assert float(await page.evaluate("byId('threshold').value")) == pytest.approx(dragged, abs=1e-3)
        await assert_counts(dragged)
        await page.evaluate("byId('threshold').value = 0.2; byId('threshold').dispatchEvent(new Event('input'))")
        await assert_counts(0.2)
        await page.evaluate("byId('reset').click()")
        await assert_counts(0.5)

        await page.evaluate("byId('fade').value = 0; byId('fade').dispatchEvent(new Event('input'))")
        assert (
            await page.evaluate("getComputedStyle(document.querySelector('#gallery .frame img + img')).opacity") == "0"
        )
        buttons = "[...document.querySelectorAll('#groups button')]"
        await page.evaluate(f"{buttons}[0].click()")
        assert "good 29" in await page.evaluate("byId('gallery').textContent")
        assert await page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth)")
        text = await page.evaluate("document.body.innerText")
        notes = ("Too few images.", "INT8 was not taken: it was not asked for", "50 % of the whole training")
        for said in (*notes, "model/fp32.xml"):
            assert said in text
        assert await page.evaluate("document.documentElement.scrollWidth") <= width

        assert not page.named("Runtime.exceptionThrown")
        assert not [entry for entry in page.named("Log.entryAdded") if entry["entry"]["level"] in {"error", "warning"}]
        assert not page.named("Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
        addresses = {request["request"]["url"] for request in page.named("Network.requestWillBeSent")}
        assert {address for address in addresses if not address.startswith("data:")} == {report.as_uri()}
