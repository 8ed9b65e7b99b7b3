"""The HTML report in a real browser, the commands on real run folders, and the exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from framework.analysis import export
from framework.analysis.report import write_report
from framework.evaluation.run_folder import Run, open_runs
from framework.runtime.errors import UserError
from framework.tracking.metric_log import MetricLog
from tests.support.commands import run_tool


@pytest.fixture(scope="module")
def looked_at(both_runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the runs, with what the commands leave in the first."""
    folder = tmp_path_factory.mktemp("looked_at")
    copies = [Path(shutil.copytree(run, folder / run.name)) for run in both_runs]
    for name, arguments in {
        "plot_curves": copies,
        "probe_layers": [*copies, "--images", "300"],
        "cka": [*copies, "--images", "64"],
        "tsne": [*copies, "--per-class", "10", "--perplexity", "9"],
        "feature_maps": copies,
        "knn_eval": [*copies, "--images", "300"],
        "memory_report": [copies[0], "--images", "8", "--out", copies[0] / "analysis"],
    }.items():
        assert run_tool(name, *arguments) == 0
    return copies


@pytest.mark.slow
def test_every_command_leaves_numbers_and_a_picture(looked_at: list[Path]) -> None:
    folder = looked_at[0] / "analysis"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(found) == {"curves", "probe_layers", "cka", "tsne", "feature_maps", "knn_eval", "memory"}
    for name in set(found) - {"knn_eval"}:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(2**24) or []) > 20, name
    result = json.loads((looked_at[0] / "result.json").read_text())
    assert set(found["probe_layers"]["top1"]) == {"loco", "gim"}
    assert found["cka"]["reference"] == "loco" and len(found["cka"]["runs"][0]["same_segment"]) == 3
    assert found["memory"]["rows"][0]["saving"] > 1
    assert set(found["knn_eval"]["loco"]) == {"neighbors", "trained", "untrained", "raw pixels"}
    assert result["knn_top1"] > 50


def browser(width: int, height: int) -> Any:
    """Headless Chromium as a phone of that size, or a skip."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with chromedriver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = (
        "headless no-sandbox disable-gpu disable-background-networking no-first-run disable-component-update"
    )
    for switch in [*switches.split(), "disable-sync", "disable-dev-shm-usage"]:
        options.add_argument(f"--{switch}")
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}}
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_in_a_browser(looked_at: list[Path], tmp_path: Path, width: int) -> None:
    page = tmp_path / "report.html"
    page.write_text(write_report(open_runs(looked_at)))
    driver = browser(width, 844)
    try:
        driver.get(page.as_uri())
        driver.find_element("css selector", "summary").click()
        widths = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        pictures = driver.execute_script(
            "return [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
        )
        text = driver.find_element("css selector", "body").text
        screenshot = tmp_path / "screenshot.png"
        driver.save_screenshot(str(screenshot))
        console = driver.get_log("browser")
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    finally:
        driver.quit()
    assert console == []
    asked = {e["params"]["request"]["url"][:40] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("file:") for url in asked)
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}, "a request left the file"
    assert widths[0] <= widths[1], "the page scrolls sideways"
    assert len(pictures) == 2 + 3 + 2 + 6 - 1 and all(
        n > 0 and shown > 250 and alt for n, shown, alt in pictures
    )
    assert "method.name" in text and "k-NN" in text and "conv_blocks" in text and "torch" in text
    with Image.open(screenshot) as image:
        assert image.size[0] == 2 * width and len(image.convert("RGB").getcolors(2**24) or []) > 100


def test_the_report_holds_everything_and_escapes_names(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    odd = tmp_path / "<b>odd</b>"
    shutil.copytree(both_runs[1], odd)
    page = write_report(open_runs([odd]))
    assert "<b>odd" not in page and "&lt;b&gt;odd" in page
    assert "What differs" not in page
    sources = page.split('src="')[1:]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page.split("<body>")[0]


def test_a_run_that_has_not_begun_has_no_report(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((both_runs[0] / "recipe.yaml").read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl: no such file"):
        write_report([Run.open(tmp_path)])
    MetricLog(tmp_path / "metrics.jsonl", {}).close()
    with pytest.raises(UserError, match=r"metrics.jsonl: no steps"):
        write_report([Run.open(tmp_path)])


def test_timm_loads_the_export(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = Run.open(both_runs[0])
    backbone = run.backbone()
    export.export_timm(run, backbone, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for name, value in run.weights().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert tuple(again.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert tuple(again.pretrained_cfg["input_size"]) == (3, 8, 8)
    with pytest.raises(UserError, match="torchvision has no resnet8"):
        export.export_torchvision(run, backbone, tmp_path / "x")
    card = export.model_card(run)
    assert "less the mean [0.5, 0.5, 0.5],\ndivided by [0.5, 0.5, 0.5]" in card
    assert "resnet8 trained with loco" in card and "knn_top1:" in card and "temperature: 0.5" in card


@pytest.mark.slow
def test_programs_compute_the_features_for_any_batch(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run = Run.open(both_runs[0])
    backbone = run.backbone()
    export.export_program(run, backbone, tmp_path / "b.pt2")
    export.export_onnx(run, backbone, tmp_path / "b.onnx")
    images = torch.randn(5, 3, 8, 8)
    expected = backbone(images)
    torch.testing.assert_close(
        torch.export.load(tmp_path / "b.pt2").module()(images), expected, rtol=1e-4, atol=1e-5
    )
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_torchvision_loads_what_it_knows(both_runs: tuple[Path, Path], tmp_path: Path) -> None:
    from torchvision.models import resnet18

    run = Run.open(both_runs[0], ["network.name=resnet18", "data.image_size=32"])
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    export.export_torchvision(run, backbone, tmp_path / "tv.safetensors")
    theirs = resnet18()
    result = theirs.load_state_dict(load_file(tmp_path / "tv.safetensors"), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys


def test_an_export_that_computes_something_else_is_refused(
    both_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Run.open(both_runs[0])
    backbone = run.backbone()
    with pytest.raises(UserError, match="computes other features than the checkpoint"):
        export._compare(backbone, lambda x: backbone(x) * 1.001, torch.randn(2, 3, 8, 8), tmp_path)
