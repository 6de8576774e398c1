"""Run folders as finished runs of a job leave them."""

import json


def leave_run(base, cell, perplexity, zero_shot=None):
    """What a finished run of a cell leaves, with the given figures by data set."""
    run = base / cell.name / "20260101-000000"
    run.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps(cell.settings))
    metrics = {"perplexity": perplexity, "zero_shot": zero_shot or {}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run
