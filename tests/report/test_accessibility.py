"""Pages in a browser: accessible by the rules of axe-core, and no wider than the screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

AXE = "axe-core@4.10.2"
DARK = "--blink-settings=preferredColorScheme=0"
CHECK = """<script>{axe}</script><script>
const wide = document.documentElement.scrollWidth - window.innerWidth;
axe.run().then(result => {{
  const found = result.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))]);
  document.body.innerHTML = "<pre></pre>";
  document.body.firstChild.textContent = JSON.stringify({{found, wide, checked: result.passes.length}});
}});
</script></body>"""


@pytest.mark.service
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("scheme", [(), (DARK,)], ids=["light", "dark"])
def test_a_page_is_accessible_and_fits(finished: Path, tmp_path: Path, width: int, scheme: tuple[str, ...]) -> None:
    browser, npm = shutil.which("chromium"), shutil.which("npm")
    assert browser and npm, "needs chromium and npm"
    subprocess.run([npm, "install", "--no-save", "--no-audit", AXE], cwd=tmp_path, check=True, capture_output=True)
    script = (tmp_path / "node_modules/axe-core/axe.min.js").read_text()
    source = (finished / "reports/posenc@nano/index.html").read_text()
    page = tmp_path / "page.html"
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    page.write_text(without_policy.replace("</body>", CHECK.format(axe=script)))
    options = ["--headless=new", "--no-sandbox", "--virtual-time-budget=60000", f"--window-size={width},1000", *scheme]
    command = [browser, *options, "--dump-dom", page.as_uri()]
    dumped = subprocess.run(command, check=True, capture_output=True, text=True, timeout=170).stdout
    result = json.loads(html.unescape(re.findall(r"<pre>(\{.*?\})</pre>", dumped, re.DOTALL)[-1]))
    assert result["checked"] > 10
    assert result["found"] == []
    assert result["wide"] <= 0
