"""Published splits of BTCV and AMOS22, by the case numbers of the official downloads.

btcv_24_6      BTCV, 24 training and 6 validation cases (UNETR, Swin UNETR: the json file that MONAI distributes)
synapse_18_12  BTCV, 18 training and 12 test cases (TransUNet's lists)
amos22         AMOS22, official training (200 CT, 40 MR) and validation (100 CT, 20 MR) cases; also one modality alone
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rfmedsam2.records.plan import Split


def _numbers(text: str) -> frozenset[int]:
    """Parse numbers and ranges: "1-3 7" -> {1, 2, 3, 7}."""
    spans = [[int(end) for end in part.split("-")] for part in text.split()]
    return frozenset(n for span in spans for n in range(span[0], span[-1] + 1))


BTCV = _numbers("1-10 21-40")
AMOS_VALIDATION = _numbers(
    "8 13 18 22 29 32 34 40-41 51 56 61 63 70 73 85 87 90 106 108 112 117 120 123 128 132 136 140 144 150 155 157 167 "
    "174 176 189 191 194 200 202-204 206-208 216 218-219 223 228 233 238 244 247 250 255 257-258 278 280 283-284 "
    "286-287 289-290 292-293 304 308-311 313 316 318 323 325-326 328 333-334 339 342 344 346 352 356-357 363-365 368 "
    "372-373 377 385 397 399 409 544-547 549-550 552-553 556 559 561-563 568 572-573 575-576 581 598"
)
AMOS_TRAINING = _numbers(
    "1 4-7 9-11 14-17 19 21 23-25 27 30 33 35-36 38 42-45 47-50 52 54 57-60 64 66-67 69 71-72 75-79 81 83-84 86 "
    "88-89 92 94 97-99 102-105 109-111 113 115-116 118-119 121 124-127 129 131 133-135 137-138 141-143 147 149 "
    "152-154 156 158-162 166 170-173 175 177 179-181 184-186 188 190 192-193 195-199 212 214-215 217 224-226 "
    "230-231 235 237 239 242 245 248-249 254 259 263-264 268 272-274 276 279 281-282 288 294 296-297 299 301-302 "
    "307 317 320-321 330 332 336-337 341 348-351 353 358 361-362 366-367 370-371 374 376 378-381 383-384 387-388 "
    "390-392 395-396 398 400-406 408 410 507-508 510 514 517-518 522 530 532 538 540-541 548 551 554-555 557-558 "
    "570-571 578 580 582-597 599-600"
)
AMOS_LAST_CT = 500
"""Cases up to this number are CT, the others MR (the archive's readme)."""


def _one_modality(numbers: frozenset[int], *, ct: bool) -> frozenset[int]:
    return frozenset(n for n in numbers if (n <= AMOS_LAST_CT) == ct)


PUBLISHED: dict[str, tuple[tuple[frozenset[int], frozenset[int]], ...]] = {
    "btcv_24_6": ((BTCV - _numbers("35-40"), _numbers("35-40")),),
    "synapse_18_12": ((BTCV - _numbers("1-4 8 22 25 29 32 35-36 38"), _numbers("1-4 8 22 25 29 32 35-36 38")),),
    "amos22": (
        (AMOS_TRAINING, AMOS_VALIDATION),
        (_one_modality(AMOS_TRAINING, ct=True), _one_modality(AMOS_VALIDATION, ct=True)),
        (_one_modality(AMOS_TRAINING, ct=False), _one_modality(AMOS_VALIDATION, ct=False)),
    ),
}
"""Name -> (training numbers, validation numbers), one pair per variant of the dataset."""


def case_number(case: str) -> int | None:
    """Find the last number in a case id: 35 for img0035, 0035, btcv_0035."""
    numbers = re.findall(r"\d+", case)
    return int(numbers[-1]) if numbers else None


def published_split(name: str, ids: Sequence[str]) -> Split | None:
    """The published split `name` over these ids; None if their numbers are not exactly the published ones."""
    by_number = {number: case for case in ids if (number := case_number(case)) is not None}
    if len(by_number) != len(ids):
        return None
    for train, val in PUBLISHED[name]:
        if train | val == by_number.keys():
            return Split(train=tuple(by_number[n] for n in sorted(train)), val=tuple(by_number[n] for n in sorted(val)))
    return None
