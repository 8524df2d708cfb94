"""What is installed, and what importing it costs and touches."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WATCH = """
import json, logging, os, sys
before = {"environment": dict(os.environ), "loggers": set(logging.root.manager.loggerDict),
          "handlers": list(logging.root.handlers), "path": list(sys.path)}
import vidaccel
vidaccel.accelerate, vidaccel.report, vidaccel.restore
libraries = ("triton", "gradio", "lpips", "pycvvdp", "ray", "diffusers")
after = {"environment": dict(os.environ), "handlers": list(logging.root.handlers),
         "path": list(sys.path)}
print(json.dumps({
    "loaded": [m for m in libraries if m in sys.modules],
    "changed": [key for key in after if before[key] != after[key]],
}))
"""


def python(code, *, executable=sys.executable, **options):
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_has_no_side_effects():
    found = json.loads(python(WATCH))
    assert found == {"loaded": [], "changed": []}


def test_import_does_not_change_torch():
    settings = (
        "(torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), "
        "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, "
        "torch.get_rng_state().sum().item())"
    )
    use = "import vidaccel; vidaccel.accelerate"
    assert python(f"import torch; a = {settings}; {use}; print(a == {settings})").strip() == "True"


def test_the_source_checkout_does_not_hide_the_kernels_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "policies" / "__init__.py").exists()
    code = (
        "import vidaccel, vidaccel.policies, vidaccel.assets, vidaccel.kernels; "
        "print(vidaccel.__file__)"
    )
    shown = python(code, cwd=ROOT)
    assert Path(shown.strip()).parent == ROOT / "vidaccel"


def test_every_package_is_declared():
    """Setuptools installs the packages that pyproject.toml names, and no other."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["tool"]["setuptools"]["packages"]
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "vidaccel").rglob("__init__.py")]
    beside = ["vidaccel.kernels", "vidaccel.policies", "vidaccel.assets"]
    assert sorted(declared) == sorted([".".join(path.parts) for path in packages] + beside)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist of this tree, and the wheel made from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_wheel_holds_what_runs_and_nothing_else(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = (path for path in (ROOT / "vidaccel").rglob("*") if path.is_file())
    assert {path.relative_to(ROOT).as_posix() for path in package if path.suffix != ".pyc"} <= {
        *names
    }
    assert "vidaccel/assets/tiny-wan/model_index.json" in names
    assert "vidaccel/policies/README.md" in names
    assert "vidaccel/kernels/reference.py" in names
    assert not [n for n in names if n.startswith(("tests/", "examples/", "kernels/", "policies/"))]
    assert not [n for n in names if n.startswith("vidaccel/assets/results")]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("tests/engine/test_engine.py") for name in archive.getnames())


def test_the_wheel_generates_away_from_the_source(distributions, tmp_path):
    """In a clean environment that has the dependencies but no trace of this checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    scripts = tmp_path / "venv" / "bin"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # A folder listed in a .pth file is searched, but its own .pth files, among them that of an
    # editable install, are not read.
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    install = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install"]
    install += ["--quiet", "--no-deps", "--disable-pip-version-check", "--no-index"]
    install += [str(distributions[1])]
    done = subprocess.run(install, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    away = tmp_path / "away"
    away.mkdir()
    code = (
        "import vidaccel; from vidaccel.clips.embedded import embedded_model; "
        "from vidaccel.plans.shipped import shipped_policies; "
        "print(vidaccel.__file__, embedded_model(), shipped_policies())"
    )
    shown = python(code, executable=str(scripts / "python"), cwd=away, env=environment)
    assert str(site) in shown and str(ROOT) not in shown
    command = [str(scripts / "vidaccel"), "generate", "--size", "64x64", "--frames", "9"]
    command += ["--steps", "8", "--device", "cpu", "--compare"]
    done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (away / "out" / "video.mp4").is_file()
