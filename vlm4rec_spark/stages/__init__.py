"""One stage per file: DataFrames and the few values it uses in, DataFrame out; no session, no IO."""
