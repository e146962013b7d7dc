"""Extensions as Python's metadata has them: found by name, told apart by package, and what is wrong with them."""

from __future__ import annotations

import sys

import pytest
from support.toy_task import make_plan

from rfmedsam2.errors import ExtensionError, RecordError
from rfmedsam2.extensions import make
from rfmedsam2.models import build_stage
from rfmedsam2.records.model import Extension
from rfmedsam2.records.plan import Plan
from rfmedsam2.system.entry_points import find, installed

MODULE = """
from rfmedsam2.records.base import Record

class Options(Record):
    width: int = 3

def plain(*, options): return options
def checked(*, options): return options.width
checked.Options = Options
def wrong(*, options): return options
wrong.Options = dict
def failing(*, options): raise ValueError("no such figure")
def network(*, channels, outputs, patch_size, options): return "no network"
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Lay packages on the search path as an installer would; gives a function that adds one."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(package: str, **entries: str) -> None:
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(MODULE)
        folder = tmp_path / f"{module}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
        lines = [f"[rfmedsam2.{group}]\n{entry}\n" for group, entry in entries.items()]
        (folder / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


def test_names_come_from_all_packages_and_nothing_is_imported(packages) -> None:
    packages("pack-a", losses="one = pack_a:plain", networks="net = pack_a:network")
    packages("pack-b", losses="two = pack_b:plain")
    assert [(r.name, r.package, r.version) for r in installed("loss")] == [
        ("one", "pack-a", "2.0"),
        ("two", "pack-b", "2.0"),
    ]
    assert "pack_a" not in sys.modules


def test_options_are_plain_or_checked_by_the_extension(packages) -> None:
    packages("pack-c", losses="plain = pack_c:plain\nchecked = pack_c:checked\nwrong = pack_c:wrong")
    assert make("loss", Extension(name="plain", options={"a": [1, 2]})) == {"a": [1, 2]}
    assert make("loss", Extension(name="checked")) == 3
    assert make("loss", Extension(name="checked", options={"width": 5})) == 5
    with pytest.raises(RecordError, match=r"width.*found 'wide'.*"):
        make("loss", Extension(name="checked", options={"width": "wide"}))
    with pytest.raises(ExtensionError, match=r"subclass of rfmedsam2\.records\.base\.Record"):
        make("loss", Extension(name="wrong"))


def test_two_packages_of_one_name_are_told_apart_by_the_plan(packages) -> None:
    packages("pack-d", losses="same = pack_d:plain")
    packages("pack-e", losses="same = pack_e:plain")
    with pytest.raises(ExtensionError, match=r"Several(.|\n)*pack-d 2.0, pack-e 2.0"):
        find("loss", "same")
    assert find("loss", "same", package="pack-e").package == "pack-e"


def test_what_is_not_there_says_what_is(packages) -> None:
    packages("pack-f", networks="net = pack_f:network")
    with pytest.raises(ExtensionError, match=r"network swin(.|\n)*Found net \(pack-f 2.0\)(.|\n)*pip install PACKAGE"):
        find("network", "swin")
    with pytest.raises(ExtensionError, match=r"network net of other(.|\n)*pip install other"):
        find("network", "net", package="other")


def test_a_package_that_does_not_import_or_fails_is_named(packages) -> None:
    packages("pack-g", losses="gone = pack_g:gone\nfailing = pack_g:failing\nnone = no_such_module:x")
    for name, found in (("gone", "AttributeError"), ("none", "ModuleNotFoundError")):
        with pytest.raises(ExtensionError, match=rf"cannot be imported(.|\n)*{found}(.|\n)*pack-g"):
            make("loss", Extension(name=name))
    with pytest.raises(ExtensionError, match="ValueError: no such figure"):
        make("loss", Extension(name="failing"))


def test_what_is_no_network_is_refused(packages) -> None:
    packages("pack-h", networks="net = pack_h:network")
    plan = custom_plan("net")
    with pytest.raises(ExtensionError, match=r"not a network(.|\n)*Found str"):
        build_stage(plan, plan.stages["3d_fullres"])


@pytest.mark.parametrize("name", ["os.path:join", "os:system", "../x", "", "a/b"])
def test_a_name_is_a_word_and_no_path_of_a_class(name) -> None:
    with pytest.raises(RecordError):
        custom_plan(name)


def custom_plan(name: str) -> Plan:
    data = make_plan().model_dump()
    data["stages"]["3d_fullres"]["model"] = {"kind": "custom", "name": name}
    return Plan.parse(data)
