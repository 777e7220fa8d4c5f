"""The results of an audit: the rows of its table, and the record that a person can sign."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.captions import Prompt
from .ranking import Reference, statistic
from .significance import LEVEL, discoveries, fewest, interval, p_values
from .training_images import TrainingImages

log = logging.getLogger(__name__)
Line = Mapping[str, Any]
# The columns of audit.csv, the decisive ones first.
COLUMNS = (
    *("id", "caption", "flagged", "suspects", "n", "copies", "score", "gap", "p", "low", "high", "copies_low", "copies_high"),
    *("similarity", "measure", "nearest", "image", "status"),
)


def ranked(captions: Sequence[Prompt], lines: Mapping[str, Line], reference: Reference, rate: float) -> list[dict[str, Any]]:
    """Return a row for each caption, the largest statistic first, failed captions last. lines: of `first_gaps`, by id."""
    sound = [prompt.id for prompt in captions if lines[prompt.id]["status"] == "ok"]
    values = [statistic(lines[id]["gaps"], reference.gap) for id in sound]
    p = p_values(values, reference.ordinary)
    facts = {
        id: {"gap": round(gap, 5), "p": round(value, 6), "flagged": flagged}
        for id, gap, value, flagged in zip(sound, values, p, discoveries(p, rate), strict=True)
    }
    rows = []
    for prompt in captions:
        image, status = str(prompt.image) if prompt.image else None, lines[prompt.id]["status"]
        own = facts.get(prompt.id, {"gap": None, "p": None, "flagged": False})
        rows.append({"id": prompt.id, "caption": prompt.text, **own, "image": image, "status": status})
    return sorted(rows, key=lambda row: -(row["gap"] or 0))


def verdict(row: Line, found: Sequence[Line]) -> dict[str, Any]:
    """Return a row of audit.csv, with the verdicts on the pictures of its caption. found: lines of `Verification`.

    low, high: exact bounds of the share of suspect pictures; copies_low, copies_high: of copies. None: not verified.
    """
    whole: dict[str, Any] = dict.fromkeys(COLUMNS) | dict(row)
    if found:
        suspects = sum(line["suspect"] for line in found)
        whole |= {"score": max(line["score"] for line in found), "suspects": suspects, "n": len(found)}
        whole["low"], whole["high"] = (round(bound, 4) for bound in interval(suspects, len(found)))
    if found and "copy" in found[0]:
        copies = whole["copies"] = sum(line["copy"] for line in found)
        whole["copies_low"], whole["copies_high"] = (round(bound, 4) for bound in interval(copies, len(found)))
        nearest = max(found, key=lambda line: (line["copy"], line["similarity"]))
        whole |= {name: nearest[name] for name in ("similarity", "measure", "nearest")}
    return whole


def ranked_record(rows: Sequence[Line], lines: Mapping[str, Line], reference: Reference, rate: float) -> dict[str, Any]:
    """Return the record of the ranking, and log a warning if the ordinary captions are too few for any to be flagged.

    fewest: the number of captions that must stand out together before any can be flagged.
    """
    failed = [row["id"] for row in rows if row["status"] != "ok"]
    flagged = sum(row["flagged"] for row in rows)
    needed = fewest(len(rows) - len(failed), len(reference.ordinary), rate)
    if needed > max(1, flagged):
        log.warning(
            "%d ordinary prompts are few beside %d captions: unless %d captions or more stand out, none can be flagged at rate "
            "%g; give more ordinary prompts",
            *(len(reference.ordinary), len(rows) - len(failed), needed, rate),
        )
    return {
        "failed": failed,
        "truncated": [row["id"] for row in rows if lines[row["id"]].get("truncated")],
        "rate": rate,
        "flagged": flagged,
        "ordinary": len(reference.ordinary),
        "ordinary_source": reference.source,
        "fewest": needed,
    }


def verified_record(
    found: Mapping[str, Sequence[Line]], asked: int, threshold: float, index: TrainingImages | None
) -> dict[str, Any]:
    """Return the record of the verification. asked: the number of pictures to make. compared: None without training images."""
    pictures = [line for lines in found.values() for line in lines]
    record: dict[str, Any] = {"verified": len(found), "pictures": len(pictures), "pictures_failed": asked - len(pictures)}
    record |= {"threshold": threshold, "level": LEVEL, "suspects": sum(line["suspect"] for line in pictures), "compared": None}
    if index is not None and pictures:
        record["compared"] = {
            "thresholds": index.thresholds,
            "training_images": len(index.images),
            "training_sha256": index.sha256,
            "copies": sum(line["copy"] for line in pictures),
            "agreeing": sum(line["copy"] == line["suspect"] for line in pictures),
        }
    return record
