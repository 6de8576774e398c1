"""Run folders as finished runs of a job leave them."""

import json


def leave_run(base, cell, perplexity, zero_shot=None, dense=None):
    """What a finished run of a cell leaves, with the given figures by data set, and the dense ones of --eval_dense."""
    run = base / cell.name / "20260101-000000"
    run.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps(cell.settings))
    metrics = {"perplexity": perplexity, "dense_perplexity": dense or {}, "zero_shot": zero_shot or {},
               "sparsity": {"ssm": 0.5, "layers": 0.0}, "seconds": {"load": 1.25, "prune": 2.5, "eval": 0.25}}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run
