"""What recommend's calibration tried, from its run's details. Knows no HTML."""

from __future__ import annotations

from collections.abc import Mapping

from vlm4rec_spark.report.data import RecallCurve, SearchSetting, parse_details


def calibration(details: Mapping[str, str]) -> RecallCurve | None:
    """None if nothing was tried, as for a small catalogue, or if the details can't be read."""
    curve = parse_details(details.get("recall_curve"))
    rows = curve.get("tried")
    exact = curve.get("exact")
    if not isinstance(rows, list) or not rows:
        return None
    try:
        tried = tuple(
            SearchSetting(int(leaves), int(candidates), float(recall), float(low), float(speed))
            for leaves, candidates, recall, low, speed in rows
        )
        promise = float(details["recall_promised"])
    except (KeyError, TypeError, ValueError):
        return None
    # Null is exact search.
    chosen = [row for row in tried if [row.leaves, row.candidates] == curve.get("taken")]
    return RecallCurve(
        tried,
        promise,
        exact if isinstance(exact, int | float) else None,
        chosen[0] if chosen else None,
        details.get("k", "k"),
    )
