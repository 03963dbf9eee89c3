"""One stage per file: DataFrames and the values it uses in, a DataFrame out; no session, no IO."""
