"""Whether the options fit a model: checked with its config, before its weights are loaded, and once with its history."""

from __future__ import annotations

from sparsessm.errors import InputError
from sparsessm.layerwise.layer import Layer
from sparsessm.models.architecture import Layout, targets
from sparsessm.models.history import History, already_pruned
from sparsessm.options import Options
from sparsessm.procedure.plan import Plan
from sparsessm.pruning.methods import WHOLE


def check_model(options: Options, layout: Layout) -> tuple[int, int]:
    """The range of layers to prune, first <= i < stop.

    Args:
        layout: of a model without weights (checkpoint.skeleton).

    Raises:
        InputError: one line that says what to do.
    """
    if options.save_format == "state-spaces" and not layout.row.original:
        raise InputError(f"--save_format state-spaces does not support {layout.model.config.model_type}: leave it out")
    count = len(layout.layers)
    first, stop = max(0, options.minlayer), min(options.maxlayer, count)
    recipe = options.recipe
    if recipe is None:
        return first, stop
    mixers = [mixer for i in range(first, stop) if (mixer := layout.mixer(layout.layers[i])) is not None]
    if not mixers:
        raise InputError(
            f"--minlayer {options.minlayer} and --maxlayer {options.maxlayer} leave none of the model's {count} layers"
        )
    if recipe.removes_parts:
        _check_parts(options, layout, len(mixers), count)
        return first, stop
    structure, m = recipe.structure, options.prunem
    if options.prune_A and structure != "entries":
        if (first, stop) != (0, count):
            raise InputError("removing states needs every layer, because a config has one state size: drop the layer range")
        _check_structure(options, layout, structure)
    cols = mixers[0].A_log.shape[1]
    if m and options.prune_A and cols % m:
        raise InputError(f"--prunem {m} does not divide the {cols} entries of a row of A_log")
    if options.prune_layers:
        _check_weights(options, layout, first, stop)
    return first, stop


def without_ssm(layout: Layout, first: int, stop: int) -> list[int]:
    """The layers first <= i < stop that have no mixer of an SSM."""
    return [i for i in range(first, stop) if layout.mixer(layout.layers[i]) is None]


def check_rest(options: Options, plan: Plan, layout: Layout, history: History, first: int, stop: int) -> None:
    """Refuses a sparsity that everything in the plan has already.

    Raises:
        InputError: with the share that was pruned before.
    """
    full = set()
    for index in range(first, stop):
        layer = Layer(layout, index, layout.layers[index])
        if plan.transitions and plan.transitions.pattern.spreads and layer.has_mixer:
            full.add(layer.full_name("A_log"))
        if plan.weights and plan.weights.pattern.spreads:
            full |= {layer.full_name(f"{module}.weight") for module in layer.those(plan.weights.modules)}
    refusal = already_pruned(history, layout.model, full, options.share) if full else None
    if refusal:
        raise InputError(refusal)


def _check_parts(options: Options, layout: Layout, mixers: int, layers: int) -> None:
    if options.removal_target == "mamba_block" and layout.row.without_layer is None:
        raise InputError(
            f"a config of {layout.model.config.model_type} cannot say that a layer is removed: use --shed_target ssm"
        )
    steps = round(options.share * mixers)
    if steps == 0:
        raise InputError(f"--sparsity {options.sparsity} removes none of the {mixers} layers in range")
    if options.removal_target == "mamba_block" and steps == layers:
        raise InputError(f"--sparsity {options.sparsity} leaves none of the model's {steps} blocks: give a lower one")


def _check_structure(options: Options, layout: Layout, structure: str) -> None:
    for layer in layout.layers:
        mixer = layout.mixer(layer)
        if mixer is None:
            continue
        if structure not in mixer.STRUCTURES or structure not in layout.row.shrink:
            able = [name for name in mixer.STRUCTURES if name in layout.row.shrink]
            raise InputError(
                f"--structure {structure} cannot be removed from {layout.model.config.model_type} models"
                + (f": use {' or '.join(able)}" if able else "")
            )
        size = mixer.scored(structure).shape[1]
        removed = round(options.share * size)
        if not 0 < removed < size:
            raise InputError(f"--sparsity {options.sparsity} removes none or all of the {size} {WHOLE[structure]}")
        groups = mixer.competing(structure)
        if removed % groups:
            raise InputError(
                f"--sparsity {options.sparsity} removes {removed} of {size} {WHOLE[structure]}, which is not the "
                f"same from each of {groups} groups: choose another"
            )
        try:
            layout.row.shrink[structure](layout.model.config, size - removed)
        except ValueError as error:
            raise InputError(f"--structure {structure}: {error}") from None


def _check_weights(options: Options, layout: Layout, first: int, stop: int) -> None:
    """Whether the modules exist, and groups of M fit their columns."""
    found = {}
    for index in range(first, stop):
        for name, module in layout.modules(layout.layers[index]).items():
            found[name] = module
            if options.prunem and name in targets({name: module}, options.target_modules, options.parts, options.module):
                columns = layout.layers[index].get_parameter(f"{module.path}.weight").shape[-1]
                if columns % options.prunem:
                    raise InputError(
                        f"--prunem {options.prunem} does not divide the {columns} columns of {name}: "
                        "choose others with --target_modules or --module"
                    )
    if not targets(found, options.target_modules, options.parts, options.module):
        raise InputError(f"--module {options.module} and --target_modules name no module; there are: {', '.join(found)}")
