#!/usr/bin/env bash
# numexpr 2.14.2 cannot be imported where OMP_NUM_THREADS is a list, as OpenMP allows for nested levels.
#
# Expected: the first number is taken, as by OpenMP and torch (OpenMP 5.2, 21.1.2: "a list of positive integer values").
# Seen: with OMP_NUM_THREADS=4,2 `import numexpr` ends in a ValueError of int(), so do packages that import it (blosc2).
#
# Run: bash findings/numexpr_fails_on_a_list_of_thread_numbers.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numexpr==2.14.2 numpy==2.2.6
cd "$folder"
env/bin/python - <<'PYTHON'
import os
import subprocess
import sys

code = "import numexpr; print(numexpr.__version__, numexpr.nthreads)"
seen = {}
for value in ("4", "4,2"):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": value}, capture_output=True, text=True, check=False
    )
    seen[value] = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
print(seen)
sys.exit(0 if "ValueError" in seen["4,2"] and "ValueError" not in seen["4"] else 1)
PYTHON
