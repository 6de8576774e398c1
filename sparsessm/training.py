"""Fine-tuning a pruned model: pruned entries keep their values through the steps of any torch optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from sparsessm.api import history_of
from sparsessm.errors import InputError
from sparsessm.models.architecture import Layout
from sparsessm.models.history import History, cut_between, read_history
from sparsessm.models.place import MASKS
from sparsessm.result import Result


class HeldMasks:
    """Masks that hold until `remove`, or until the end of a with block. `masks`: by parameter name, True = pruned."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        parameters = dict(model.named_parameters())
        self._held = [_Held(parameters[name], mask) for name, mask in masks.items()]
        self._hooks = [register_optimizer_step_post_hook(self._restore)]
        # with gradients of 0 pruned entries count neither in the norm that is clipped nor in the moments of an optimiser
        self._hooks += [
            held.parameter.register_post_accumulate_grad_hook(held.clear_gradient)
            for held in self._held
            if held.parameter.requires_grad
        ]

    def _restore(self, *_: Any) -> None:
        for held in self._held:
            held.restore()

    def remove(self) -> None:
        """Lets all entries change again."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Held:
    """One parameter, its pruned entries and their values."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter = parameter
        self.mask = mask.to(parameter.device)
        self.values = parameter.detach()[self.mask].clone()

    def clear_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._follow(parameter)
            parameter.grad.masked_fill_(self.mask, 0)

    @torch.no_grad()
    def restore(self) -> None:
        self._follow(self.parameter)
        self.parameter[self.mask] = self.values.to(self.parameter.dtype)

    def _follow(self, parameter: Tensor) -> None:
        """A trainer may move the model after the masks were given to it."""
        if self.mask.device != parameter.device:
            self.mask, self.values = self.mask.to(parameter.device), self.values.to(parameter.device)


def hold_masks(model: PreTrainedModel, masks: Result | Mapping[str, Tensor] | str | Path | None = None) -> HeldMasks:
    """Keeps pruned entries as they are while the model is trained: weights 0, A_log at its pruned value.

    After each step of any torch optimiser, pruned entries get their values back, whatever momentum or weight decay made of
    them; their gradients are 0. Call it when the parameters that shall be trained have `requires_grad`. It works where
    parameters stay whole: not under FSDP, DeepSpeed or other sharding.

    Args:
        masks: of `prune`; or the folder of a saved model; or tensors by name, bool, True = pruned, under the names of the
            model or of its checkpoint, in the shape of the parameter or from before states or heads were removed. By
            default what `load` and `prune` know of the model, or else what its values say.

    Returns:
        A handle, to be removed after training: `.remove()`, or use it in a with statement.

    Raises:
        sparsessm.errors.InputError: no masks, masks of another model, or no parameter with masks that is trained.
    """
    layout = Layout(model)
    if masks is None:
        found = history_of(model, layout).present()
    elif isinstance(masks, Result):
        found = _checked(model, History().followed_by(masks.masks, masks.past, {}).present())
    elif isinstance(masks, Mapping):
        names = dict(model.named_parameters())
        found = _checked(model, {layout.row.here(name, names): mask for name, mask in masks.items()})
    else:
        if not (Path(masks) / MASKS).is_file():
            raise InputError(f"{masks} holds no {MASKS}: give the folder of a model that was saved after pruning")
        found = read_history(Path(masks), layout).present()
    if not found:
        raise InputError("hold_masks: nothing of this model was pruned: give masks, or the folder of the pruned model")
    parameters = dict(model.named_parameters())
    if not any(parameters[name].requires_grad for name in found):
        raise InputError("hold_masks: no pruned parameter is trained: call model.requires_grad_(True) first")
    return HeldMasks(model, found)


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks in the present shapes.

    Raises:
        InputError: a mask is of another model, or marks weights that are not 0.
    """
    parameters, found = dict(model.named_parameters()), {}
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or mask.dtype != torch.bool or mask.dim() != parameter.dim():
            raise InputError(f"hold_masks: {name} is not a mask of this model: give those of the model that is trained")
        if mask.shape != parameter.shape:
            mask = cut_between(mask, parameter.shape).left(mask)
        if mask.shape != parameter.shape:
            shapes = f"has shape {tuple(masks[name].shape)}, the parameter {tuple(parameter.shape)}"
            raise InputError(f"hold_masks: the mask of {name} {shapes}: give those of the model that is trained")
        if not name.endswith(".A_log") and (parameter[mask.to(parameter.device)] != 0).any():
            raise InputError(f"hold_masks: {name} has pruned entries that are not 0: load the pruned model first")
        found[name] = mask
    return found
