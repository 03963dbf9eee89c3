"""Users' queries, candidates, rules and final lists, in numpy."""
