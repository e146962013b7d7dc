"""The public Python API: every promised name is there, documented and listed; the READMEs' examples run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfmedsam2 import Layout, Plan, Predictor, TrainOptions, evaluate, open_dataset, train

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rfmedsam2", "segment_anything_hq")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def section(package: str) -> str:
    """The chapter "Python API" of a package's README."""
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^## Python API\n(.*?)^## ", text, re.M | re.S)
    assert found is not None
    return found[1]


def run_examples(package: str) -> None:
    """Run all examples of the chapter in one go, as a reader would type them."""
    example = doctest.DocTestParser().get_doctest(section(package).replace("```", ""), {}, package, None, 0)
    assert len(example.examples) > 5
    faults: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=faults.append)
    assert not faults, "".join(faults)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_documented_and_listed(name: str) -> None:
    package = importlib.import_module(name)
    assert dir(package) == sorted(package.__all__)
    table = "\n".join(line for line in section(name).splitlines() if line.startswith("| `"))
    for public in package.__all__:
        value = getattr(package, public)
        assert f"`{public}`" in table, f"{public} is not in the table of {name}/README.md"
        assert isinstance(value, str | dict) or value.__doc__, public
    promised = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert set(promised) == set(package.__all__)
    assert set(re.findall(r"\| (\w+) \|$", table, re.M)) <= {"stable", "provisional"}
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        package.nothing_of_the_kind  # noqa: B018


@pytest.mark.parametrize("name", [*PACKAGES, "rfmedsam2.metrics"])
def test_names_are_known_before_anything_is_loaded(name: str) -> None:
    heavy = "{'torch', 'nibabel', 'numpy'}"
    code = f"import sys, {name} as package; assert dir(package); assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_public_names(tmp_path: Path) -> None:
    assert all((ROOT / name / "py.typed").is_file() for name in PACKAGES)
    lines = [
        "import rfmedsam2",
        "import segment_anything_hq",
        "from rfmedsam2.metrics import dice",
        *(f"reveal_type({name}.{public})" for name in PACKAGES for public in importlib.import_module(name).__all__),
        "reveal_type(dice)",
    ]
    (tmp_path / "user.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path / "user.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    types = re.findall(r'Type of "(\S+)" is "(.*)"', done.stdout)
    assert done.returncode == 0, done.stdout
    assert len(types) == len(lines) - 3
    unknown = [name for name, kind in types if kind in ("Unknown", "Any")]
    assert not unknown


def test_progress_is_shown_where_it_is_asked_for(root_of, trained_root, tmp_path: Path, capsys) -> None:
    root = root_of(trained_root)
    layout, dataset = Layout.under(root), open_dataset("PhantomCT", root=root)
    image, labels = dataset.training[0].images[0], dataset.training[0].label
    assert labels is not None
    predictor = Predictor.load(layout.model_folder(dataset.name, "rfmed_cpu", "3d_fullres"), device="cpu")
    plan = predictor.plan.with_overrides("3d_fullres.train.epochs=1", "3d_fullres.train.iterations_per_epoch=2")
    calls: dict[str, Callable[[bool], object]] = {
        "tiles": lambda progress: predictor(image, progress=progress),
        "tiles (file)": lambda progress: predictor.predict_file(image, tmp_path / "labels.nii.gz", progress=progress),
        "Evaluating": lambda progress: evaluate(labels, labels, plan.labels, progress=progress),
        "training": lambda progress: train(
            layout,
            plan,
            "3d_fullres",
            fold=1,
            options=TrainOptions(device="cpu", validate=False, restart=True, progress=progress),
        ),
    }
    for shown, call in calls.items():
        call(False)
        assert capsys.readouterr().err == ""
        call(True)
        assert f"{shown.split()[0]}: " in capsys.readouterr().err


def test_the_examples_of_volumes_run(root_of, trained_root, monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_of(trained_root)
    root = root.rename(root.with_name("rfmed_data"))
    plan_file = Layout.under(root).plan_file("Dataset900_PhantomCT", "rfmed_cpu")
    short = ("3d_fullres.train.epochs=2", "3d_fullres.train.iterations_per_epoch=5")
    Plan.load(plan_file).with_overrides(*short, name="rfmed_cpu").save(plan_file)
    monkeypatch.chdir(root.parent)
    run_examples("rfmedsam2")


def test_the_examples_of_images_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((40, 50), np.uint8)
    mask[8:30, 10:35] = 255
    for part, array in (("images", np.stack([mask] * 3, axis=-1)), ("masks", mask)):
        (tmp_path / "photos" / part).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "photos" / part / "square.png")
    run_examples("segment_anything_hq")
