#!/usr/bin/env bash
# On a CPU, the bf16 gradient of a Conv3d's weights is partly uninitialized memory where the feature map is two planes deep.
#
# Expected: autocast to bfloat16 changes a gradient by rounding, at most some percent. Seen with torch 2.14.1 on a CPU with
# AVX512-BF16: with a kernel of 3x3x3, padding 1 and a depth of 2, some values of the weights' gradient are never written.
# They are whatever the memory held: mostly small numbers, so that training goes on with wrong gradients, now and then inf
# or nan, so that it diverges. Depths of 1 and of 3 and more are right, and so are the outputs and the gradient of the
# input. glibc can be told to fill memory before it is handed out, which makes the unwritten places visible.
#
# Run: bash findings/torch_bf16_conv3d_gradient_of_depth_two.sh    Exits with 1 when this is no longer so, with 3 where the
# CPU has no AVX512-BF16 and nothing can be said.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.14.1 numpy
MALLOC_PERTURB_=128 env/bin/python - <<'PYTHON'
import sys

import torch

if not torch.cpu.get_capabilities().get("avx512_bf16"):
    print("this CPU has no AVX512-BF16")
    sys.exit(3)
torch.manual_seed(0)
unwritten = {}
for depth in (1, 2, 3, 4):
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1)
    image = torch.randn(2, 32, depth, 8, 8)
    gradients = []
    for half in (False, True):
        convolution.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = convolution(image)
        result.float().pow(2).sum().backward()
        gradients.append(convolution.weight.grad.clone())
    unwritten[depth] = int(((gradients[1] - gradients[0]).abs() > gradients[0].abs().max()).sum())
print("torch", torch.__version__, "values of 27648 that are off by more than the largest gradient, by depth:", unwritten)
sys.exit(0 if unwritten[2] and not (unwritten[1] or unwritten[3] or unwritten[4]) else 1)
PYTHON
