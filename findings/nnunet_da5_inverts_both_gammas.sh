#!/usr/bin/env bash
# nnU-Net's trainer DA5 changes gamma on inverted intensities twice, and never on the intensities as they are.
#
# Expected: as in nnU-Net's default trainer, one of the two gamma transforms inverts the image (a probability of 0.1) and the
# other one does not (0.3). Seen with nnunetv2 2.8.1: nnUNetTrainerDA5 makes both with p_invert_image=1 and a probability of
# 0.1, one after the other. So of 1000 patches about 190 are changed, all of them inverted, in place of about 370, mostly not
# inverted; whoever writes "DA5" into a paper or another program by its description gets another augmentation.
#
# Run: bash findings/nnunet_da5_inverts_both_gammas.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q nnunetv2==2.8.1 torch==2.14.1
export nnUNet_raw="$folder" nnUNet_preprocessed="$folder" nnUNet_results="$folder" nnUNet_compile=f
env/bin/python - <<'PYTHON'
import sys
from importlib.metadata import version

from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5


def gammas(trainer):
    made = trainer.get_training_transforms((32, 64, 64), (-0.5, 0.5), None, (0, 1, 2), False)
    chosen = [one for one in made.transforms if isinstance(getattr(one, "transform", None), GammaTransform)]
    return [(one.apply_probability, one.transform.p_invert_image) for one in chosen]


default, da5 = gammas(nnUNetTrainer), gammas(nnUNetTrainerDA5)
print(f"nnunetv2 {version('nnunetv2')}, (probability of the transform, of inverting the image)")
print("nnUNetTrainer   ", default)
print("nnUNetTrainerDA5", da5)
sys.exit(default != [(0.1, 1), (0.3, 0)] or da5 != [(0.1, 1), (0.1, 1)])
PYTHON
