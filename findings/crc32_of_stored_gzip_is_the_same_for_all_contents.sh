#!/usr/bin/env bash
# The CRC-32 of a whole .gz file made at level 0 (stored) is the same for all contents of one length.
#
# Expected: a checksum over the file tells two contents apart. Seen with the zlib of Python 3: a .gz ends with the CRC-32 of
# its contents, and a CRC over stored bytes and their own CRC cancels out; two different label maps of equal size have
# equal CRC-32 over the file. Whoever finds changed files by CRC-32 misses every change. At level 6 they differ.
#
# Run: bash findings/crc32_of_stored_gzip_is_the_same_for_all_contents.sh    Exits with 1 when this is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 - <<'PYTHON'
import gzip
import sys
import zlib

contents = [bytes([value]) * 5000 for value in (0, 1, 200)]
found = {level: {zlib.crc32(gzip.compress(data, level, mtime=0)) for data in contents} for level in (0, 6)}
print("zlib", zlib.ZLIB_RUNTIME_VERSION, "different CRC-32 of three files:", {level: len(crcs) for level, crcs in found.items()})
sys.exit(0 if len(found[0]) == 1 and len(found[6]) == 3 else 1)
PYTHON
