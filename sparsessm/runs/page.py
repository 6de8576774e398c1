"""The page of a run on Weights & Biases: its figures, small files and pictures; the checkpoint only where asked."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsessm.errors import InputError, first_line
from sparsessm.files import write_text
from sparsessm.report.plots import write_run_plots
from sparsessm.report.results import read_run

logger = logging.getLogger("sparsessm")

RECORD = "wandb.json"  # in the run folder: what --resume needs to continue the same page
_SMALL_FILES = ("options.json", "sparsity.json", "metrics.json")


def check_wandb() -> None:
    """Raises InputError where wandb is wanted and not there."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--log_wandb needs wandb: pip install wandb, or leave the flag out")


class Page:
    """The wandb run of one run folder. After the start, an error of wandb is a warning: the run itself goes on."""

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        """Starts a wandb run, or continues the one that an interrupted run left in the folder.

        Without a key or a network it is an offline one, and the log says how to upload it.

        Raises:
            InputError: wandb refuses the settings.
        """
        self.folder = folder
        before = _record(folder)
        self._rows = _rows_before(folder) if before else set()
        self._run = _started(options, folder, before)
        if self._run is not None:
            kept = {"id": self._run.id, "project": self._run.project, "entity": self._run.entity or None}
            write_text(folder / RECORD, json.dumps(kept) + "\n", follow=False)

    def row(self, phase: str, layer: int, figures: Mapping[str, float]) -> None:
        """Logs the figures of a layer, once: --resume reports the layers that were finished before again."""
        if self._run is None or (phase, layer) in self._rows:
            return
        step = len(self._rows)
        self._rows.add((phase, layer))
        try:
            self._run.log({f"{phase}/{name}": value for name, value in figures.items()} | {"layer": layer}, step=step)
        except Exception as error:  # of an optional service
            logger.warning("warning: wandb takes no more rows (%s); the run continues without", first_line(error))
            self._run = None

    def finish(self, metrics: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Logs what metrics.json holds, the small files and the pictures, and the checkpoint where there is one."""
        if self._run is None:
            return
        try:
            self._run.summary.update(_flat(metrics))
            for name in _SMALL_FILES:
                self._run.save(str(self.folder / name), base_path=str(self.folder), policy="now")
            if checkpoint is not None:
                self._log_checkpoint(checkpoint)
            self._log_plots()
        except Exception as error:  # the same
            logger.warning("warning: wandb did not take all of the run (%s)", first_line(error))

    def _log_checkpoint(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def _log_plots(self) -> None:
        """Logs the pictures of this run."""
        import wandb

        with tempfile.TemporaryDirectory() as folder:
            drawn = write_run_plots(read_run(self.folder), Path(folder))
            if drawn:
                pictures = {f"plots/{kind}": wandb.Image(str(file)) for kind, file in drawn.items()}
                self._run.log(pictures, step=len(self._rows))

    def close(self, failed: bool) -> None:
        if self._run is not None:
            with suppress(Exception):  # its service may be gone
                self._run.finish(exit_code=int(failed))


def _started(options: Mapping[str, Any], folder: Path, before: Mapping[str, Any]) -> Any:
    """A wandb run; None where wandb is disabled. before: id, project and entity of the run that is continued.

    Raises:
        InputError: wandb refuses the settings.
    """
    import wandb

    try:
        given = wandb.setup().settings
        arguments = _arguments(given, options, folder, before)
        try:
            online = given.mode not in ("offline", "dryrun", "disabled")
            if online and not wandb.login(prompt=False, verify=False):
                raise InputError("no key: wandb login stores one")  # init would ask for it, and wait
            run = wandb.init(**arguments)
        except Exception as error:  # of its settings, the key, the network, the service: they share no base class
            run = wandb.init(mode="offline", **arguments)
            reason, sync = first_line(error), f"wandb sync {run.settings.wandb_dir}"
            logger.warning("warning: wandb logs this run offline (%s); to upload it later: %s", reason, sync)
    except Exception as error:  # the same
        raise InputError(
            f"wandb cannot start ({first_line(error)}): correct its settings, or leave --log_wandb out"
        ) from error
    return None if run.disabled else run


def _arguments(given: Any, options: Mapping[str, Any], folder: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of wandb.init, which would win over WANDB_* variables and wandb's own files of settings.

    So ours are left out where these settings say something, and in a sweep, whose agent names the project and the id.
    """
    ours: dict[str, tuple[str, Any]] = {
        "root_dir": ("dir", str(folder)),
        "run_name": ("name", f"{folder.parent.name}-{folder.name}"),
        "run_job_type": ("job_type", "prune" if options["method"] else "eval"),
    }
    if given.sweep_id is None:
        ours["project"] = ("project", before.get("project", "sparsessm"))
        ours |= {"entity": ("entity", before.get("entity")), "run_id": ("id", before.get("id"))}
    if before:
        ours["resume"] = ("resume", "allow")
    arguments = {argument: value for name, (argument, value) in ours.items() if name not in given.model_fields_set}
    # what is not yet in its file is lost when the run is killed, and --resume logs no row twice
    return {"config": dict(options), "settings": {"x_transaction_log_flush_interval": 0.1}, **arguments}


def _record(folder: Path) -> dict[str, Any]:
    """What is known of the page of an interrupted run; nothing where it had none.

    Raises:
        InputError: the file was damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {name: kept[name] for name in ("id", "project", "entity")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): remove it, and the run gets a new page") from None


def _rows_before(folder: Path) -> set[tuple[str, int]]:
    """Phase and layer of every row that an interrupted run had logged."""
    file = folder / "events.jsonl"
    found = set()
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError):  # a line that was cut short
            event = json.loads(line)
            if event["event"] == "layer":
                found.add((event["phase"], event["layer"]))
    return found


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by their path, as wandb's tables want them."""
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
