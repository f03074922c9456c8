"""The weights of the base that a method adapts, by their role, as found in the adapted model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peftsweep.models.attach import EXPERTS, Roles, role_members
from peftsweep.models.parts import base_of, expert_parameters, head_names, router_modules, text_part, weight_count
from peftsweep.models.quantised.layers import bits

COVERAGE = "peftsweep_coverage"  # the attribute of an adapted model that holds its coverage
EMBEDDINGS, HEAD, ROUTER, BESIDE_TEXT, OTHER = "embeddings", "head", "router", "beside_text", "other"
# The parts that PEFT adds to the name of a weight that it wraps.
WRAPPING = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
MIN_NAMED_SHARE = 0.01  # a role that is not adapted is named from this share of all weights on


@dataclass(frozen=True)
class Weight:
    """One weight of the untouched base."""

    role: str
    layer: int | None  # the number of its layer
    size: int  # how many numbers it holds, unpacked
    bits: int | None  # how many bits store a number, if it is quantised


@dataclass(frozen=True)
class Reach:
    """The weights and layers of a role, and how many of them are adapted."""

    weights: int
    adapted: int
    layers: int
    adapted_layers: int


@dataclass(frozen=True)
class Coverage:
    """How much of its base a method adapts, by role."""

    roles: dict[str, Reach]
    layers: int
    quantised: dict[int, int]  # bits -> how many weights are stored in them

    @property
    def weights(self) -> int:
        """All weights of the base."""
        return sum(reach.weights for reach in self.roles.values())

    @property
    def share(self) -> float:
        """The share of weights that have an adapter or are trained themselves."""
        return sum(reach.adapted for reach in self.roles.values()) / max(self.weights, 1)

    def facts(self) -> dict[str, Any]:
        """For a trial's record: the shares, from 0 to 1, and the adapted layers of each role."""
        roles = {
            role: {
                "weights": reach.weights,
                "share": reach.adapted / reach.weights,
                "layers": f"{reach.adapted_layers} of {self.layers}" if reach.layers else None,
            }
            for role, reach in self.roles.items()
        }
        kept = {f"share_in_{bits}bit": size / self.weights for bits, size in self.quantised.items()}
        return {"share": self.share, **kept, "roles": roles, "line": self.line()}

    def line(self) -> str:
        """``adapts 4.2% of the weights: q, v (2 of 8 layers); not experts (80.1% of them), ...``."""
        reached = [self._reached(role, reach) for role, reach in self.roles.items() if reach.adapted]
        ordered = sorted(self.roles.items(), key=lambda item: -item[1].weights)
        left = [
            f"{role} ({percent(reach.weights / self.weights)} of them)"
            for role, reach in ordered
            if not reach.adapted and reach.weights >= MIN_NAMED_SHARE * self.weights
        ]
        text = f"adapts {percent(self.share)} of the weights" + (f": {', '.join(reached)}" if reached else "")
        text += f"; not {', '.join(left)}" if left and reached else ""
        return text + stored(self.quantised, self.weights)

    def _reached(self, role: str, reach: Reach) -> str:
        notes = [] if reach.adapted == reach.weights else [percent(reach.adapted / reach.weights)]
        if reach.layers and reach.adapted_layers < self.layers:
            notes.append(f"{reach.adapted_layers} of {self.layers} layers")
        return f"{role} ({', '.join(notes)})" if notes else role


def stored(quantised: dict[int, int], total: int) -> str:
    """``; 91% of the base are stored in 4 bits``; empty for a base that is not quantised."""
    return "".join(
        f"; {percent(size / total)} of the base are stored in {bits} bits" for bits, size in quantised.items()
    )


def percent(share: float) -> str:
    """``12.3%``, with more digits for small shares."""
    digits = 1 if share >= 0.01 or share == 0 else 3
    return f"{100 * share:.{digits}f}%".replace(".0%", "%")


def weights(base: Any, roles: Roles) -> dict[str, Weight]:
    """The weights of ``base`` by name, before a method is attached to it."""
    playing = {name: role for role, names in reversed(role_members(base, roles).items()) for name in names}
    experts, routers = set(expert_parameters(base)), router_modules(base)
    special = {id(p): HEAD for name in head_names(base) for p in base.get_submodule(name).parameters()}
    special |= {id(p): EMBEDDINGS for p in base.get_input_embeddings().parameters()}  # a tied head counts as embeddings
    text = {id(p) for p in text_part(base).parameters()} | special.keys()
    found = {}
    for name, parameter in base.named_parameters():
        owner, _, own = name.rpartition(".")
        role = EXPERTS if name in experts else playing.get(owner) or special.get(id(parameter), OTHER)
        if role == OTHER and owner in routers:
            role = ROUTER
        role, number = (role, re.search(r"\.(\d+)\.", name)) if id(parameter) in text else (BESIDE_TEXT, None)
        module = base.get_submodule(owner)
        layer = int(number[1]) if number else None
        found[name] = Weight(role, layer, weight_count(parameter), bits(module) if own == "weight" else None)
    return found


def coverage(before: dict[str, Weight], adapted: nn.Module, adapter: str | None = None) -> Coverage:
    """How much of the weights ``before`` the model ``adapted`` adapts, with ``adapter`` if it has several."""
    names = _adapted_names(adapted, adapter)
    roles: dict[str, Reach] = {}
    for role in dict.fromkeys(weight.role for weight in before.values()):
        mine = {name: weight for name, weight in before.items() if weight.role == role}
        reached = {name: weight for name, weight in mine.items() if name in names}
        roles[role] = Reach(
            sum(weight.size for weight in mine.values()),
            sum(weight.size for weight in reached.values()),
            len({weight.layer for weight in mine.values()} - {None}),
            len({weight.layer for weight in reached.values()} - {None}),
        )
    layers = len({weight.layer for weight in before.values()} - {None})
    return Coverage(roles, layers, quantised(before))


def quantised(before: dict[str, Weight]) -> dict[int, int]:
    """The number of weights that are stored in each number of bits; fused experts, for example, are not quantised."""
    kinds = sorted({weight.bits for weight in before.values() if weight.bits})
    return {bits: sum(weight.size for weight in before.values() if weight.bits == bits) for bits in kinds}


def _adapted_names(adapted: nn.Module, adapter: str | None) -> set[str]:
    """The names, in the untouched base, of weights with the adapter (None: any adapter) or trained themselves."""
    base = base_of(adapted)
    names = {_plain(name) for name, parameter in base.named_parameters() if parameter.requires_grad}
    if isinstance(adapted, PeftModel):
        for name, module in base.named_modules():
            if isinstance(module, BaseTunerLayer):
                if adapter is not None and adapter not in module._get_available_adapters():
                    continue
                own = getattr(module, "parameter_name", None)
                parts = [own] if own else [part for part, _ in module.get_base_layer().named_parameters()]
                names |= {f"{_plain(name)}.{part}" for part in parts}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                names |= {f"{_plain(name)}.{own}" for own, _ in module.original_module.named_parameters()}
    return names


def _plain(name: str) -> str:
    return WRAPPING.sub("", f"{name}.").removesuffix(".")
