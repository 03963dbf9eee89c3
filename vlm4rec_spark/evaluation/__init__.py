"""Offline evaluation as of a cut, through the stages' own functions. Only cli/, the pipeline and
report/ know it."""
