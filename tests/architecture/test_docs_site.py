"""The site builds without a warning and without a network, and its pages fetch nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_FETCHED = re.compile(r"""(?:<script[^>]*\ssrc|<img[^>]*\ssrc
                          |<link[^>]*rel="(?:stylesheet|preload|preconnect|icon)"[^>]*\shref)="(?:https?:)?//""",
                      re.VERBOSE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("material", "mkdocs_static_i18n"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    offline = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9",
               "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
                          cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_both_languages_are_there(site: Path) -> None:
    english = {path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.parts[-2] != "zh"}
    for name in ("index.html", "tutorials/mindspeed-mm.html", "reference/flags.html"):
        assert name in english and (site / "zh" / name).is_file()
    assert "快速上手" in (site / "zh" / "quickstart.html").read_text(encoding="utf-8")


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    assert _FETCHED.search('<link rel="stylesheet" href="https://x/y.css">') and _FETCHED.search('<script src="//x">')
    for page in site.rglob("*.html"):
        assert not _FETCHED.search(page.read_text(encoding="utf-8")), page


def test_links_out_of_the_folder_go_to_the_repository(site: Path) -> None:
    page = (site / "tutorials" / "mindspeed-mm.html").read_text(encoding="utf-8")
    assert 'href="https://github.com/mindspeed-wan/mindspeed-wan/blob/main/examples/wan2.2/README.md"' in page


def test_benchmark_tables_are_on_the_performance_page(site: Path) -> None:
    assert "convert_cpu_full_size" in (site / "performance.html").read_text(encoding="utf-8")


def test_schemas_are_served(site: Path) -> None:
    assert (site / "schemas" / "model.schema.json").is_file()
