"""Headless Chromium for the tests of the report page, driven by selenium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
WAIT = 20
"""Seconds after which a condition has failed."""


def missing() -> str:
    """Say what is missing to run these tests; "" if nothing is."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed; run `make browser-test`"
    return "" if CHROMIUM and DRIVER else "Chromium is not installed; run `make browser-test`"


class Browser:
    """A browser window with shortcuts for what the tests ask."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Open a page and wait until its scripts have run."""
        self.messages()
        self.driver.get(address)
        self.wait(lambda: self.run("return document.documentElement.dataset.ready") == "true")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page and return its result."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds; meanwhile the page may be loaded anew."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, WAIT, 0.05, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda driver: condition())

    def find(self, selector: str) -> list[Any]:
        """Return the visible elements of a CSS selector."""
        from selenium.webdriver.common.by import By

        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [element for element in found if element.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the visible elements of a CSS selector."""
        return [element.text for element in self.find(selector)]

    def choose(self, control: str, value: str) -> None:
        """Choose a value of a select element."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(f"#{control}")[0]).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, element: Any, x: int = 0, y: int = 0) -> None:
        """Move the mouse to an offset from the centre of an element."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element_with_offset(element, x, y).perform()

    def window(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set size and colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def messages(self) -> list[str]:
        """Return the console's messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def violations(self) -> list[str]:
        """Return the serious accessibility violations that axe-core finds."""
        # As the browser's own script: the page's content policy allows no other one.
        self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text(encoding="utf-8")})
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document).then((found) => done(found.violations));"
        )
        return [
            f"{violation['id']}: {[node['target'] for node in violation['nodes']][:3]}"
            for violation in found
            if violation["impact"] in ("serious", "critical")
        ]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium for a `with` block."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
