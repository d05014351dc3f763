"""A real browser for the pages that people look at: Debian's Chromium, steered by its driver."""

import base64
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
LACKING = "" if CHROMIUM and DRIVER else "no chromium with chromium-driver here"
PHONE, DESKTOP = 360, 1280
LEAST_CONTRAST = 4.5
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-sync", "--disable-component-update", "--disable-quic"),
    *("--disable-background-networking", "--no-proxy-server", "--hide-scrollbars"),
    # one process for all pages, and none in reserve: to begin one takes longer than to show a page
    *("--renderer-process-limit=1", "--disable-site-isolation-trials", "--in-process-gpu"),
    "--disable-features=SpareRendererForSitePerProcess,BackForwardCache",
]

# What a page has at an element, for messages.
NAMED = """
const named = element => element.outerHTML.slice(0, 90).replace(/\\s+/g, " ");
const shown = element => element.checkVisibility() && element.getClientRects().length > 0;
"""

# Elements beyond the sides of the window, and those whose content is wider than they are.
PROTRUDING = """
const inside = element => {
  const box = element.getBoundingClientRect();
  const clips = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
  return box.left >= -0.5 && box.right <= innerWidth + 0.5 && !clips;
};
return [document.documentElement, ...document.body.querySelectorAll("*:not(svg *)")]
  .filter(element => shown(element) && !inside(element)).map(named);
"""

# Texts, also those that CSS adds, whose colour is too near to what is behind them.
FAINT = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const paint = colours => {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = colours => paint(colours)
  .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => element === null ? ["white"]
  : [...behind(element.parentElement), getComputedStyle(element).backgroundColor];
const contrast = (element, pseudo) => {
  const ground = behind(element);
  const lights = [light(ground), light([...ground, getComputedStyle(element, pseudo).color])];
  return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
};
const says = (element, pseudo) => pseudo
  ? /"[^"]/.test(getComputedStyle(element, pseudo).content)
  : [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
return [...document.body.querySelectorAll("*:not(svg *, script, style, noscript)")].filter(shown)
  .flatMap(element => [null, "::before", "::after"]
    .filter(pseudo => says(element, pseudo))
    .map(pseudo => [contrast(element, pseudo), named(element)]))
  .filter(([found]) => found < arguments[0]);
"""

# What the keyboard reaches, and whether one sees where it is.
FOCUSED = """
const element = document.activeElement, style = getComputedStyle(element);
if (element === document.body) return null;
return [element, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
"""


class Browser:
    """One browser for many pages, one after the other."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(
        self, page: str | Path, *, width: int = DESKTOP, dark: bool = False, scripts: bool = True
    ) -> Self:
        """Show a page, by its address or file, to a person with such a screen and such settings."""
        self.driver.get("about:blank")
        self.console()
        self.requested()
        self.look(width=width, dark=dark)
        self.tell("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)
        return self

    def look(self, *, width: int = DESKTOP, dark: bool = False, media: str = "") -> Self:
        """Show the page that is open on such a screen, to a person with such settings, or print."""
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setDeviceMetricsOverride", **screen)
        self.tell("Emulation.setEmulatedMedia", features=[scheme], media=media)
        return self

    def tell(self, command: str, **values: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, values)

    def ask(self, script: str, *values: Any) -> Any:
        """What a script says in the page."""
        return self.driver.execute_script(NAMED + script, *values)

    def console(self) -> list[str]:
        """What the console has said since the last look."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last look, but for data in the page itself."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for one in sent if not (url := one["request"]["url"]).startswith("data:")]

    def unfold(self) -> None:
        """Show what is folded away."""
        self.ask("for (const details of document.querySelectorAll('details')) details.open = true")

    def protruding(self) -> list[str]:
        """Elements that do not stay in their box or in the window."""
        return self.ask(PROTRUDING)

    def faint(self) -> list[tuple[float, str]]:
        """Texts that are hard to read, with their contrast."""
        return self.ask(FAINT, LEAST_CONTRAST)

    def tabbed(self) -> Iterator[tuple[Any, bool]]:
        """The elements that Tab reaches, one after the other, and whether the focus is visible."""
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        while True:
            self.tell("Input.dispatchKeyEvent", type="rawKeyDown", **key)
            self.tell("Input.dispatchKeyEvent", type="keyUp", **key)
            if not (focused := self.ask(FOCUSED)):
                return
            yield tuple(focused)

    def printed(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self.tell("Page.printToPDF", printBackground=False)["data"])

    def screenshot(self, file: Path) -> None:
        """Keep a picture of the whole page."""
        options = {"captureBeyondViewport": True, "format": "png"}
        file.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", **options)["data"]))

    def faults(self, page: str | Path) -> list[Any]:
        """All that is wrong with a page, on a phone and a desktop, in light and in dark."""
        found: list[Any] = []
        self.open(page, width=PHONE).unfold()
        for width in (PHONE, DESKTOP):
            for dark in (False, True):
                self.look(width=width, dark=dark)
                found += [*self.protruding(), *self.faint()]
        address = self.driver.current_url
        return found + self.console() + [url for url in self.requested() if url != address]


@contextmanager
def served(page: Callable[[], str]) -> Iterator[str]:
    """Serve a page, made anew for each request; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page().encode() if self.path == "/" else b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser until the end of the block."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # it leaves files there
        driver = Chrome(
            options,
            ChromeService(DRIVER, env=os.environ | dict.fromkeys(("HOME", "TMPDIR"), folder)),
        )
        try:
            yield Browser(driver)
        finally:
            driver.quit()
