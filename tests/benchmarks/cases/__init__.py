"""One file per question; each has `run(bench) -> Outcome`, and its question as its docstring."""
