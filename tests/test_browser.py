"""The widgets in a real browser: as files, in JupyterLab and under Voilà, numbers on screen against PyTorch."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import ASK_KERNEL, CHROMIUM, FLAGS, LAB, RUN_ALL, Widget, serving

from spd.component_viewer import component_sizes, component_widget, factors
from spd.curves import Subject, known_toy, sweep
from spd.decompose import decompose
from spd.experiments.resid_mlp import PRESETS
from spd.magnitude_widget import MagnitudeWidget
from spd.masks import ci_masks

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
NBS = Path(__file__).parent.parent / "nbs"
MAGNITUDES = torch.linspace(0, 2, 51)
HARMLESS = (  # errors that are not ours
    "jupytext",  # its Lab extension complains when it is loaded by Voilà
    "cdn.jsdelivr.net/npm/@fortawesome/",  # icons Voilà would like to fetch; our voila.json forbids it
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that fails the test for errors on its console and for requests that leave this machine."""
    page, errors, outside = browser.new_page(viewport={"width": 1280, "height": 1000}), [], []
    page.on("console", lambda m: errors.append(f"{m.text} ({m.location})") if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    here = ("http://127.0.0.1:", "ws://127.0.0.1:", "file://", "data:", "blob:")
    page.on("requestfinished", lambda r: None if r.url.startswith(here) else outside.append(r.url))
    page.on(
        "requestfailed", lambda r: outside.append(r.url) if not r.url.startswith(here) and r.failure != "csp" else None
    )
    yield page
    page.close()
    assert outside == []
    assert [e for e in errors if not any(word in e for word in HARMLESS)] == []


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return known_toy()


def outputs(subject: Subject, feature: int, magnitude: float, off: tuple[str, ...] = ()) -> dict[str, Any]:
    """The feature's own output and the numbers of active components, from PyTorch."""
    swept = sweep(subject, [feature], torch.tensor([magnitude]))
    ci = {site: g[0].clone() for site, g in swept.lower.items()}
    active = [int((g > 0.1).sum()) for g in ci.values()]
    for key in off:
        site, c = key.split(":")
        ci[site][:, int(c)] = 0
    x = magnitude * torch.eye(subject.target.config.n_features)[[feature]]
    with torch.no_grad():
        ablated = subject.model(x, ci_masks(ci))[0, feature].item()
    own = {k: v[0, 0, feature].item() for k, v in swept.outputs.items()}
    return own | {"ablated": ablated, "active": active}


def check_numbers(widget: Widget, subject: Subject, feature: int, magnitude: float, off: tuple[str, ...] = ()):
    expected = outputs(subject, feature, magnitude, off)
    for key in ("target", "ci", "ideal", *(["ablated"] if off else [])):
        assert widget.number(key) == pytest.approx(expected[key], abs=1e-3), key  # curves travel as 16-bit numbers
    assert widget.root.locator("[data-value='active']").inner_text() == " + ".join(map(str, expected["active"]))


def test_the_exhibit(page, toy, tmp_path):
    file = MagnitudeWidget(toy, MAGNITUDES).save_html(tmp_path / "sweep.html")
    assert file.stat().st_size < 3_000_000
    page.goto(file.as_uri())
    widget = Widget(page)
    pictures = {}
    for view in ("grid", "overlay", "heat map", "summary"):
        pictures[view] = widget.view(view).picture()
        moved = widget.put("magnitude", 1.6).picture()  # the cursor
        assert moved != pictures[view] != widget.put("feature", 7).picture()
        page.screenshot(path=tmp_path / f"{view}.png", full_page=True)
        widget.put("magnitude", 1.0).put("feature", 0)
    assert len(set(pictures.values())) == 4
    for feature, magnitude in ((0, 1.0), (7, 0.4), (19, 2.0)):
        widget.put("feature", feature).put("magnitude", magnitude)
        check_numbers(widget, toy, feature, magnitude)


def test_ablation_by_hand(page, toy, tmp_path):
    page.goto(MagnitudeWidget(toy, MAGNITUDES, feature=7).save_html(tmp_path / "sweep.html").as_uri())
    widget = Widget(page)
    before = widget.picture()
    off = ("layers.0.mlp_in:7",)
    assert widget.toggle(*off).picture() != before
    check_numbers(widget, toy, 7, 1.0, off)
    widget.root.locator("[data-control='layer']").select_option("1")
    widget.settle()
    second = widget.root.locator("[data-component^='layers.1.mlp_out']").first.get_attribute("data-component")
    assert second is not None
    widget.toggle(second)
    check_numbers(widget, toy, 7, 1.0, (*off, second))
    widget.control("restore").click()
    widget.settle()
    check_numbers(widget, toy, 7, 1.0)
    assert widget.root.locator("[data-value='ablated']").count() == 0
    widget.root.locator("[data-control='layer']").select_option("0")
    assert widget.settle().picture() == before


def test_a_threshold_that_nothing_passes_and_the_linked_cursor(page, toy, tmp_path):
    page.goto(MagnitudeWidget(toy, MAGNITUDES, feature=7).save_html(tmp_path / "sweep.html").as_uri())
    widget = Widget(page)
    assert "none active" in widget.put("threshold", 1.0).words()
    assert widget.root.locator("[data-component]").count() == 0
    widget.put("threshold", 0.1)
    box = widget.control("canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + 100)  # inside the first panel
    value = float(widget.settle().control("magnitude").input_value())
    assert 0 < value < 1
    check_numbers(widget, toy, 7, value)


def test_dragging_is_smooth(page, toy, tmp_path):
    page.goto(MagnitudeWidget(toy, MAGNITUDES).save_html(tmp_path / "sweep.html").as_uri())
    widget = Widget(page)
    assert widget.drag("magnitude") == 2
    check_numbers(widget, toy, 0, 2.0)
    for view in ("overlay", "grid"):
        widget.view(view)
        for control in ("feature", "magnitude", "threshold"):
            tried = []
            while len(tried) < 3 and max(tried, default=0) < 20:  # other work may hold the machine
                tried.append(widget.frames_per_second(control))
            print(f"{view}, {control}: {tried[-1]:.0f} frames/s")
            assert tried[-1] >= 20, (view, control, tried)


def test_the_component_viewer(page, toy, tmp_path):
    viewer = component_widget(toy, component_sizes(toy))
    page.goto(viewer.save_html(tmp_path / "components.html").as_uri())
    widget = Widget(page)
    own = component_sizes(toy).query("site == 'layers.0.mlp_in'")
    before = widget.picture()
    assert widget.put("place", 7).picture() != before
    row = own.iloc[7]
    assert widget.control("place").evaluate("(e) => e.nextSibling.textContent") == str(row.component)
    assert f"largest importance 1.00, for feature {row.feature}" in widget.words()
    box = widget.control("canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 120, box["y"] + 100)
    said = widget.root.locator("[data-value='entry']").inner_text()
    ((neuron, feature, value),) = re.findall(r"component: neuron (\d+), feature (\d+): (\S+)", said)
    expected = factors(toy, "layers.0.mlp_in").components()[row.component, int(neuron), int(feature)].item()
    assert float(value) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    page.screenshot(path=tmp_path / "components.png")


def places(tmp_path: Path) -> dict[str, str]:
    """Where the servers keep things: nothing of this user's."""
    names = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    names |= {"SPD_CACHE": "cache", "SPD_RUNS": "runs", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    (tmp_path / "runs").mkdir()
    return {k: str(tmp_path / v) for k, v in names.items()} | {"IPYTHONDIR": str(tmp_path / "ipython")}


def test_in_jupyterlab(page, toy, tmp_path):
    shutil.copy(NBS / "30b_magnitude_app.ipynb", tmp_path / "app.ipynb")
    with serving("jupyter", *LAB, cwd=tmp_path, **places(tmp_path)) as address:
        page.goto(f"{address}/lab/workspaces/w1/tree/app.ipynb?reset", timeout=90_000)
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=60_000)
        page.evaluate(RUN_ALL)
        widget = Widget(page)
        before = widget.picture()
        widget.put("feature", 3).put("magnitude", 0.6)
        assert widget.picture() != before
        check_numbers(widget, toy, 3, 0.6)
        widget.toggle("layers.0.mlp_in:3")
        check_numbers(widget, toy, 3, 0.6, ("layers.0.mlp_in:3",))
        page.wait_for_timeout(500)
        assert page.evaluate(ASK_KERNEL, "print(widget.feature, widget.ablated)") == "3 ['layers.0.mlp_in:3']\n"
        page.evaluate(ASK_KERNEL, "widget.feature, widget.ablated = 11, []")  # and Python moves the slider
        page.wait_for_function("document.querySelector('[data-control=feature]').value === '11'")
        check_numbers(widget, toy, 11, 0.6)
        page.screenshot(path=tmp_path / "lab.png")
        page.goto("about:blank")  # leave before the server does


def test_under_voila(page, toy, tmp_path):
    env = places(tmp_path)
    shutil.copy(NBS.parent / "voila.json", tmp_path)
    small = {
        "faithfulness_warmup": {"steps": 0},
        "steps": 2,
        "batch_size": 32,
        "eval_batch_size": 32,
        "n_eval_batches": 1,
    }
    config = PRESETS["default"][2].replace(modules={"layers.*.mlp_in": 20, "layers.*.mlp_out": 10}, **small)
    target = type(toy.target)(toy.target.config)
    run = decompose(
        target, target.config.data(), config, name="resid_mlp_tiny", out_dir=env["SPD_RUNS"], progress=False
    )
    with serving("voila", str(NBS / "30b_magnitude_app.ipynb"), cwd=tmp_path, **env) as address:
        page.goto(address, timeout=90_000)
        widget = Widget(page)
        widget.put("feature", 5).put("magnitude", 1.4)
        check_numbers(widget, toy, 5, 1.4)
        before = widget.picture()
        page.locator("select").first.select_option(index=1)
        page.wait_for_function("(n) => document.querySelector('.spd-sweep .name').textContent === n", arg=run.path.name)
        widget.settle()
        assert widget.picture() != before
        check_numbers(widget, Subject("tiny", run.parts), 5, 1.4)
        page.screenshot(path=tmp_path / "voila.png")
        page.goto("about:blank")  # leave before the server does
