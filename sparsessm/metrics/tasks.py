"""The zero-shot tasks of the paper's tables, by their names in the harness."""

TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
