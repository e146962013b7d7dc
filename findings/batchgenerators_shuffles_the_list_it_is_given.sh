#!/usr/bin/env bash
# batchgeneratorsv2's cascade augmentation keeps its caller's list and shuffles it, so that equal seeds give other patches.
#
# Expected: a transform that is called twice on the same data, with all random generators seeded alike before each call,
# gives the same result, and the list of channels that it was made with stays as it was. Seen with batchgeneratorsv2 0.3.6:
# ApplyRandomBinaryOperatorTransform keeps the list `channel_idx` itself, and shuffles it in place at every call. The order
# of the channels then depends on how often the transform was called before, and so does the result: a batch of the second
# stage of nnU-Net's cascade cannot be made again from its seed alone. RemoveRandomConnectedComponentFromOneHotEncodingTransform
# does the same. A list that two transforms are given is shuffled by both.
#
# Run: bash findings/batchgenerators_shuffles_the_list_it_is_given.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q batchgeneratorsv2==0.3.6 torch==2.14.1 numpy
env/bin/python - <<'PYTHON'
import random
import sys
from importlib.metadata import version

import numpy as np
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform

channels = [0, 1, 2]
one_hot = torch.zeros(3, 8, 8, 8)
for channel in channels:
    one_hot[channel, 2 * channel + 1 : 2 * channel + 3, 2:6, 2:6] = 1
transform = ApplyRandomBinaryOperatorTransform(channel_idx=channels, p_per_label=1)


def called():
    for seed in (np.random.seed, torch.manual_seed, random.seed):
        seed(1)
    return transform(image=one_hot.clone())["image"]


first = called()
after_one_call = list(channels)
differ = int((first != called()).sum())
print("batchgeneratorsv2", version("batchgeneratorsv2"), "- the list after one call:", after_one_call, end=" ")
print("- values of 1536 that differ after another:", differ)
sys.exit(0 if differ and after_one_call != [0, 1, 2] else 1)
PYTHON
