"""Parameters on their way: Adam on float32 copies, a rate that falls as a cosine, and the values that did best."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsessm.layerwise import distributed
from sparsessm.procedure.driver import Journal

_BETAS = (0.9, 0.95)
# How many times windows that are set apart are looked at in a run over the whole model.
LOOKS = 10
# Looks in a row that are no better than the best before, after which it ends.
_PATIENCE = 3
_DIVERGED = 1e300  # in place of what is not finite


class Tuner:
    """Moves parameters against their gradients.

    Attributes:
        losses: on the windows set apart, at each look; the first before any step. done: steps so far, of `steps`.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], frozen: Mapping[str, Tensor], rate: float, steps: int
    ) -> None:
        """frozen: masks by name of entries that stay as they are."""
        self.parameters, self.rate, self.steps, self.done = dict(parameters), rate, steps, 0
        self.frozen = {name: mask for name, mask in frozen.items() if name in parameters}
        self.copies = {name: nn.Parameter(p.detach().float()) for name, p in parameters.items()}
        self.best = {name: copy.detach().clone() for name, copy in self.copies.items()}
        self.adam = torch.optim.Adam(self.copies.values(), lr=rate, betas=_BETAS)
        self.losses: list[float] = []

    @torch.no_grad()
    def step(self, count: float) -> None:
        """One step by the gradients of the parameters, sums over all processes of losses over `count` windows or tokens."""
        self.adam.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient.float() / count
            distributed.all_sum(gradient)
            if name in self.frozen:
                gradient.masked_fill_(self.frozen[name].to(gradient.device), 0)
            self.copies[name].grad, parameter.grad = gradient, None
        nn.utils.clip_grad_norm_(self.copies.values(), 1.0)
        self.adam.step()
        self.done += 1
        self._write(self.copies)

    def looks_due(self) -> bool:
        """Whether it is time to look at the windows set apart, LOOKS times in all."""
        return self.done * LOOKS // self.steps > (self.done - 1) * LOOKS // self.steps

    def look(self, loss: float) -> None:
        """Notes the loss on the windows set apart; the present values are kept if it is the lowest so far."""
        if self.losses and loss < min(self.losses):
            self.best = {name: copy.detach().clone() for name, copy in self.copies.items()}
        self.losses.append(loss if math.isfinite(loss) else _DIVERGED)

    def hopeless(self) -> bool:
        """Whether it has diverged, or has come no nearer for some looks."""
        recent, before = self.losses[-_PATIENCE:], self.losses[:-_PATIENCE]
        return self.losses[-1] == _DIVERGED or (bool(before) and min(recent) > min(before))

    def finish(self) -> None:
        """Gives the parameters the values that did best."""
        self._write(self.best)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])  # a copy that shares its memory stays as it is

    # ---- an interrupted run

    def store(self, journal: Journal, phase: str) -> None:
        """Records where it stands, in place of what was recorded before."""
        losses = torch.zeros(LOOKS + 1, dtype=torch.float64)
        losses[: len(self.losses)] = torch.tensor(self.losses, dtype=torch.float64)
        found = {"steps": torch.tensor([self.done, len(self.losses)]), "losses": losses}
        for name, copy in self.copies.items():
            state = self.adam.state[copy]
            found |= {f"now:{name}": copy, f"best:{name}": self.best[name]}
            found |= {f"mean:{name}": state["exp_avg"], f"square:{name}": state["exp_avg_sq"]}
        journal.store(phase, 0, found, {})

    @torch.no_grad()
    def resume(self, journal: Journal, phase: str) -> bool:
        """Goes on from what `store` recorded; whether there was anything."""
        shapes = {f"{what}:{name}": p.shape for name, p in self.copies.items() for what in ("now", "best", "mean", "square")}
        found = journal.load(phase, 0, {"steps": (2,), "losses": (LOOKS + 1,), **shapes}, {})
        if found is None:
            return False
        values, _ = found
        self.done, looks = values["steps"].tolist()
        self.losses = values["losses"][:looks].tolist()
        for name, copy in self.copies.items():
            copy.copy_(values[f"now:{name}"])
            self.best[name] = values[f"best:{name}"].to(copy.device)
            self.adam.state[copy] = {
                "step": torch.tensor(float(self.done)), "exp_avg": values[f"mean:{name}"].to(copy.device),
                "exp_avg_sq": values[f"square:{name}"].to(copy.device),
            }  # fmt: skip
        self._write(self.copies)
        return True
