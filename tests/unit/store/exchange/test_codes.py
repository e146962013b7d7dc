"""Codes of structures: true by pydicom's table, found in any spelling, and of users' own tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pydicom.sr._concepts_dict import concepts

from rfmedsam2.errors import RecordError
from rfmedsam2.pipeline.datasets.label_tables import AMOS22_LABELS, BTCV_LABELS
from rfmedsam2.records.dataset import LabelSet
from rfmedsam2.store.exchange import codes
from rfmedsam2.store.exchange.codes import LATERALITY, STRUCTURE, code_table, coding_of, segments_of

ROWS = [*csv.DictReader((Path(codes.__file__).parent / "codes.csv").read_text(encoding="utf-8").splitlines())]
TOTALSEGMENTATOR = """
spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left
lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right
lung_lower_lobe_right esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate
sacrum vertebrae_L5 vertebrae_T12 vertebrae_T1 vertebrae_C7 vertebrae_C1 heart aorta pulmonary_vein
brachiocephalic_trunk subclavian_artery_right common_carotid_artery_left brachiocephalic_vein_left
atrial_appendage_left superior_vena_cava inferior_vena_cava iliac_artery_left iliac_vena_right
humerus_left scapula_right clavicula_left femur_right spinal_cord brain skull rib_left_1 rib_right_12
sternum costal_cartilages
""".split()  # noqa: SIM905 - a list of one name per line would be a page
WITHOUT_EXACT_CODE = {"portal_vein_and_splenic_vein", "prostate_uterus"}


def meanings(code: str) -> set[str]:
    return {found[code][0] for found in concepts["SCT"].values() if code in found}


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_every_code_has_its_meaning_in_pydicoms_table(row: dict[str, str]) -> None:
    assert row["meaning"] in meanings(row["code"])


@pytest.mark.parametrize("code", [*LATERALITY.values(), STRUCTURE], ids=lambda code: code.meaning)
def test_sides_and_category_are_in_pydicoms_table(code: codes.Code) -> None:
    assert code.meaning in meanings(code.value)


def test_organs_of_public_data_sets_are_coded() -> None:
    names = {*BTCV_LABELS, *AMOS22_LABELS, *TOTALSEGMENTATOR} - {"background"}
    assert {name for name in names if coding_of(name).kind == STRUCTURE} == WITHOUT_EXACT_CODE


@pytest.mark.parametrize("name", ["right kidney", "kidney_right", "Right_Kidney", "rkidney", "R Kidney", "kidney-rt"])
def test_spellings_of_a_paired_organ(name: str) -> None:
    coding = coding_of(name)
    assert (coding.kind.value, coding.side) == ("64033007", LATERALITY["right"])


@pytest.mark.parametrize(
    ("name", "code", "side"),
    [
        ("lkidney", "64033007", "left"),
        ("kidney", "64033007", None),
        ("LIVER", "10200004", None),
        ("Inferior Vena Cava", "64131007", None),
        ("rib_left_7", "113197003", "left"),
        ("left middle lobe of lung", STRUCTURE.value, None),
        ("left liver", STRUCTURE.value, None),
        ("kidney_cyst_left", STRUCTURE.value, None),
        ("liver tumor", STRUCTURE.value, None),
        ("lung_middle_lobe_right", "72481006", None),
    ],
)
def test_names_and_sides(name: str, code: str, side: str | None) -> None:
    coding = coding_of(name)
    assert (coding.kind.value, coding.side) == (code, side and LATERALITY[side])


def test_a_users_table_comes_first_and_lists_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "codes.csv"
    file.write_text("name;code;meaning;scheme;red;green;blue\nspleen;S1;My spleen;99ME;1;2;3\n", encoding="utf-8")
    coding = coding_of("Spleen", code_table(file))
    assert (coding.kind, coding.color) == (codes.Code(value="S1", meaning="My spleen", scheme="99ME"), (1, 2, 3))
    assert coding_of("liver", code_table(file)) == coding_of("liver")
    file.write_text("name,code,meaning,paired,red\na,,x,,\nb,1,x,maybe,\nc,1,x,,300\n", encoding="utf-8")
    with pytest.raises(RecordError) as error:
        code_table(file)
    assert all(word in str(error.value) for word in ("3 row(s)", "line 2", "line 3", "line 4"))


def test_values_of_regions_are_segments_that_do_not_overlap() -> None:
    names = {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3}
    labels = LabelSet(names=names, regions_class_order=(1, 2, 3), ignore=4)
    found = {segment.value: segment.name for segment in segments_of(labels, (0, 1, 9))}
    assert found == {1: "whole only", 2: "core only", 3: "enhancing", 4: "ignore", 9: "label 9"}
