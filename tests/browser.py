"""A real browser, servers for it to look at, and the widgets on their pages as a hand and an eye meet them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
LAB = ["lab", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url="]
LAB += ["--LabApp.expose_app_in_browser=True", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
RUN_ALL = """async () => {
  const app = window.jupyterapp; await app.restored;
  const w = app.shell.currentWidget; await w.context.ready; await w.sessionContext.ready;
  await w.sessionContext.session.kernel.info; await app.commands.execute('notebook:run-all-cells');
}"""
SWEEP_SLIDER = """async (input, frames) => {
  const [low, high, step] = [input.min, input.max, input.step].map(Number), start = performance.now();
  const n = Math.round((high - low) / step) + 1;
  for (let k = 0; k < frames; k++) {
    input.value = low + step * (k % n); input.dispatchEvent(new Event('input', {bubbles: true}));
    await new Promise(requestAnimationFrame);
  }
  await new Promise(requestAnimationFrame);
  return (performance.now() - start) / 1000;
}"""
ASK_KERNEL = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel, said = [];
  const future = kernel.requestExecute({code}); future.onIOPub = (m) => m.content.text && said.push(m.content.text);
  await future.done; return said.join('');
}"""


@contextmanager
def serving(*command: str, cwd: Path, **env: str) -> Iterator[str]:  # the server's address
    """Start `python -m command --port=...`, wait until it answers, end it afterwards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = [sys.executable, "-m", *command, f"--port={port}", "--no-browser"]
    with open(cwd / "server.log", "w") as log:
        server = subprocess.Popen(args, cwd=cwd, stdout=log, stderr=log, env=os.environ | env)
    try:
        deadline = time.time() + 60
        while time.time() < deadline and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        assert server.poll() is None, (cwd / "server.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


class Widget:
    """The magnitude widget on a page."""

    def __init__(self, page: Page):
        self.page, self.root = page, page.locator(".spd-sweep")
        self.root.wait_for(state="visible", timeout=90_000)
        page.wait_for_function("document.querySelector('.spd-sweep')?.dataset.frames > 0")

    def control(self, name: str):
        return self.root.locator(f"[data-control='{name}']")

    def settle(self) -> "Widget":
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return self

    def put(self, name: str, value: float) -> "Widget":
        self.control(name).fill(str(value))
        return self.settle()

    def view(self, name: str) -> "Widget":
        self.root.locator(f"[data-view='{name}']").click()
        return self.settle()

    def toggle(self, component: str) -> "Widget":
        self.root.locator(f"[data-component='{component}']").click()
        return self.settle()

    def number(self, key: str) -> float:
        return float(self.root.locator(f"[data-value='{key}']").inner_text())

    def words(self) -> str:
        return self.root.inner_text()

    def picture(self) -> str:
        return self.root.locator("canvas").evaluate("(c) => c.toDataURL()")

    def drag(self, name: str) -> float:
        """Pull a slider with the mouse from its middle to its end; gives the value it then has."""
        box = self.control(name).bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] - 2, y, steps=10)
        self.page.mouse.up()
        self.settle()
        return float(self.control(name).input_value())

    def frames_per_second(self, name: str, frames: int = 60) -> float:
        """Redraws per second while a slider is given a new value at every frame."""
        before = int(self.root.get_attribute("data-frames") or 0)
        took = self.control(name).evaluate(SWEEP_SLIDER, frames)
        return (int(self.root.get_attribute("data-frames") or 0) - before) / took
