"""What moves the weights: AdamW, and Muon for the layers' matrices where the recipe says so."""

from typing import Any

import torch
from torch import nn

from melt_layers import GateLinear
from melt_models.modeling import MeltCausalLM
from melt_models.training.recipe import Recipe

_BETAS = (0.9, 0.95)


class Optimizer:
    """AdamW and Muon as one. A group's ``full_rate`` is its learning rate after warm-up and before decay.

    Where the exit gate is trained, it is AdamW's last group. What has no gradient in a phase stays as it is.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]):
        self._parts = parts

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all parts."""
        return [group for part in self._parts.values() for group in part.param_groups]

    def set_exit_rate(self, rate: float) -> None:
        """The full learning rate of the exit gate; each phase that trains it has its own."""
        self._parts["adamw"].param_groups[-1]["full_rate"] = rate

    def step(self, rate: float) -> None:
        """Moves the weights at a fraction of the full rates, and forgets their gradients."""
        for group in self.groups:
            group["lr"] = rate * group["full_rate"]
        for part in self._parts.values():
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the one that gave ``state``."""
        if state.keys() != self._parts.keys():
            raise ValueError(f"optimizers must be {', '.join(self._parts)}, got {', '.join(state)}")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def make_optimizer(student: MeltCausalLM, recipe: Recipe) -> Optimizer:
    """Rates of their own for the base, MELT's gates and the exit gate, of which it has those to be trained.

    Muon's rate is that of an AdamW whose updates are as large (``match_rms_adamw``).
    """
    leaving = exit_gate_of(student)
    exit_gate = [(leaving, 0.0, 0.0)] if recipe.trains_exit_gate else []
    if not recipe.trains_model:
        return Optimizer({"adamw": _adamw(exit_gate)})
    gates = [p for module in student.modules() if isinstance(module, GateLinear) for p in module.parameters()]
    known = {id(parameter) for parameter in (*gates, *leaving)}
    base = [p for p in student.parameters() if id(p) not in known]
    parts: dict[str, torch.optim.Optimizer] = {}
    if recipe.muon_learning_rate:
        inside = {id(parameter) for parameter in student.model.layers.parameters()}
        matrices = [p for p in base if p.ndim > 1 and id(p) in inside]
        group = {"params": matrices, "lr": recipe.muon_learning_rate, "full_rate": recipe.muon_learning_rate}
        parts["muon"] = torch.optim.Muon([group], weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        chosen = {id(parameter) for parameter in matrices}
        base = [p for p in base if id(p) not in chosen]
    parts["adamw"] = _adamw(
        [
            ([p for p in base if p.ndim > 1], recipe.base_learning_rate, recipe.weight_decay),
            ([p for p in base if p.ndim == 1], recipe.base_learning_rate, 0.0),
            (gates, recipe.gate_learning_rate, 0.0),
            *exit_gate,
        ]
    )
    return Optimizer(parts)


def exit_gate_of(student: MeltCausalLM) -> list[nn.Parameter]:
    """The exit gate's parameters; none where there is no such gate."""
    gate = student.model.early_exit_gate
    return [] if gate is None else list(gate.parameters())


def _adamw(groups: list[tuple[list[nn.Parameter], float, float]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "full_rate": rate, "weight_decay": decay} for p, rate, decay in groups if p],
        betas=_BETAS,
    )
