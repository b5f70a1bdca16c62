"""What ends up in the sdist and the wheel: code, profiles and kernels, and nothing at the top level but ``kvplan``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kvplan", "kernels", "profiles")
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")


def run(*words: str | Path, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(path)} if path is not None else None
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=env)
    if done.returncode and any(s in done.stderr for s in ("No matching distribution", "Could not find a version",
                                                           "connection", "Temporary failure")):  # fmt: skip
        pytest.skip(f"pip reaches no package index for the build backend: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel built from that sdist), from a copy of the tree: nothing is written into the checkout."""
    work = tmp_path_factory.mktemp("packaging")
    source = work / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    backend = work / "backend"
    run(sys.executable, "-m", "pip", "install", "--target", backend, "setuptools>=77", cwd=work)
    build = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", work / "dist")
    run(*build, source, cwd=work, path=backend)  # the wheel is built from the sdist
    (sdist,) = (work / "dist").glob("*.tar.gz")
    (wheel,) = (work / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(artefacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and nothing else."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    target = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, artefacts[1], cwd=home)
    return python


def test_the_sdist_holds_the_source_and_no_measured_data(artefacts: tuple[Path, Path]) -> None:
    with tarfile.open(artefacts[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "pyproject.toml", "README.md", "kvplan/__init__.py", "kvplan/py.typed"} <= names
    assert not [name for name in names if "oracle" in name or name.endswith(".pyc")]


def test_the_wheel_holds_kernels_and_profiles_under_kvplan_only(artefacts: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(artefacts[1]) as archive:
        names = set(archive.namelist())
    top = {name.split("/", 1)[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kvplan"}
    assert {"kvplan/py.typed", "kvplan/kernels/__init__.py", "kvplan/profiles/__init__.py"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    checkout = {f"kvplan/profiles/{p.relative_to(ROOT / 'profiles')}" for p in (ROOT / "profiles").rglob("*.json")}
    assert checkout <= names
    assets = ROOT / "kvplan" / "document" / "assets"
    assert {f"kvplan/document/assets/{p.relative_to(assets)}" for p in assets.rglob("*.*") if p.is_file()} <= names
    modules = {f"kvplan/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names


def test_the_installed_package_finds_its_profiles_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "import kvplan.profiles as p, kvplan.gpu as g, kvplan\n"
        "assert len(p.names('models')) >= 30 and len(p.names('gpus')) >= 9\n"
        "plan = kvplan.size(model='70b', gpu='h100', tp_size=4, context_tokens='32k')\n"
        "print(plan.kv_cache.bytes_per_token, kvplan.__version__)"
    )
    # 80 layers × 2 heads a rank × 256 elements × 2 B, with no dependency installed: planning needs none of them
    assert run(installed, "-c", code, cwd=tmp_path).split()[0] == "81920"


@pytest.mark.parametrize("name", ["kernels", "profiles", "tests"])
def test_nothing_but_kvplan_is_importable_at_the_top_level(installed: Path, tmp_path: Path, name: str) -> None:
    code = f"import importlib.util as u; print(u.find_spec({name!r}))"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "None"


def test_the_version_has_one_home(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m, kvplan; print(m.version('kvplan') == kvplan.__version__)"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "True"


def test_the_core_without_torch_is_small(artefacts: tuple[Path, Path]) -> None:
    """The wheel's share of 80 MB; typer, pydantic, rich and numpy take the rest."""
    with zipfile.ZipFile(artefacts[1]) as archive:
        assert sum(info.file_size for info in archive.infolist()) < 10_000_000
