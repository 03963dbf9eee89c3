"""What recommend's calibration tried, out of its run's details. Knows no HTML."""

from __future__ import annotations

from vlm4rec_spark.report.data import RecallCurve, Setting, StageRun, figures


def calibration(run: StageRun | None) -> RecallCurve | None:
    """None where nothing was tried, as with a small catalogue, or where the details can't be read."""
    told = figures(run.details.get("recall_curve")) if run else {}
    rows, exact = told.get("tried"), told.get("exact")
    if not run or not isinstance(rows, list) or not rows:
        return None
    try:
        tried = tuple(
            Setting(int(leaves), int(candidates), float(recall), float(low), float(speed))
            for leaves, candidates, recall, low, speed in rows
        )
        promise = float(run.details["recall_promised"])
    except (KeyError, TypeError, ValueError):
        return None
    # Null is exact search.
    taken = [each for each in tried if [each.leaves, each.candidates] == told.get("taken")]
    return RecallCurve(
        tried,
        promise,
        exact if isinstance(exact, int | float) else None,
        taken[0] if taken else None,
        run.details.get("k", "k"),
    )
