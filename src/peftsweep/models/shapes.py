"""Attach methods to a base on the meta device, also those for which PEFT computes with the base's weights.

Some methods decompose, cluster or sample the weights of the base on attaching, which takes minutes and gigabytes for a
model of 3B parameters. The number of parameters and the size of the adapter's file depend only on the shapes of the
results, so these computations are replaced by tensors of the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import AdaLoraConfig
from peft.tuners.adamss import layer as adamss
from peft.tuners.frod import layer as frod_layer
from peft.tuners.frod import model as frod
from peft.tuners.shira import config as shira
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

State = dict[str, torch.Tensor]


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let any of PEFT's methods be created and attached to a base on the meta device.

    FRoD's joint decomposition, AdaMSS's singular vectors and clusters and SHiRA's random mask have the right shapes and
    no values. The sizes of AdaMSS's clusters depend on the weights; here all are equal, which changes no count, and the
    header of the file by at most three digits for each cluster.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(frod, "tqdm", _silent))
        stack.enter_context(patch.object(frod, "_projection_from_weights", _square))
        stack.enter_context(patch.object(frod_layer.FrodLayer, "_calculate_frod_u_and_lambda", _u_and_lambda))
        stack.enter_context(patch.object(adamss, "slice_pca", _singular_vectors))
        stack.enter_context(patch.object(adamss, "clustering_Z", _equal_clusters))
        stack.enter_context(patch.object(shira, "random_mask", _first_weights))
        stack.enter_context(_StayOnMeta())
        yield


class _StayOnMeta(TorchFunctionMode):
    """Keep a meta tensor on the meta device when code moves it to another device."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func is torch.Tensor.cpu:
                return args[0]
            if func is torch.Tensor.to:
                args = [torch.device("meta") if isinstance(one, torch.device | str) else one for one in args]
                kwargs = kwargs | ({"device": "meta"} if "device" in kwargs else {})
        return func(*args, **kwargs)


def _silent(rows: Any, **_: Any) -> Any:
    """A progress bar that shows nothing."""
    return tqdm(rows, disable=True)


def _square(matrices: list[torch.Tensor], _regularization: float) -> torch.Tensor:
    """FRoD's projection, shared by all layers of a kind: [in, in]."""
    width = matrices[0].shape[1]
    return torch.empty(width, width, device="meta")


def _u_and_lambda(_layer: Any, _projection: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FRoD's frozen factor of a layer, [out, in], and its trained diagonal, [in]."""
    return torch.empty(weight.shape, device="meta"), torch.empty(weight.shape[1], device="meta")


def _singular_vectors(
    weight: torch.Tensor, r: int, device: torch.device, dtype: torch.dtype, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaMSS's right and left singular vectors of ``weight``, [1, 1, out, in]: [1, 1, r, in] and [1, 1, out, r]."""
    *batch, height, width = weight.shape
    rank = min(r, height, width)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    return torch.empty(*batch, rank, width, **options), torch.empty(*batch, height, rank, **options)


def _equal_clusters(vectors: torch.Tensor, clusters: int, _iterations: int) -> tuple[torch.Tensor, int]:
    """The cluster of each row of ``vectors``, and the number of clusters."""
    rows = vectors.shape[0]
    count = min(clusters, rows)
    return torch.arange(rows, device="cpu") % count, count


def _first_weights(base_layer: nn.Module, r: int, **_: Any) -> torch.Tensor:
    """A mask over the weight of ``base_layer``, [out, in], with as many ones as SHiRA trains weights."""
    width, height = cast(tuple[int, int], _get_in_out_features(base_layer))
    mask = torch.zeros(height * width, dtype=torch.bool, device="cpu")
    mask[: r * (height + width)] = True
    return mask.view(height, width)


def at_target_rank(state: State, config: Any) -> State:
    """The part of ``state`` that AdaLoRA saves after training, if all layers keep the same number of ranks.

    Training reduces the ranks of a layer from ``init_r`` to ``target_r`` on average, and layers keep different numbers,
    so the real file is smaller or larger if the sizes of layers differ.
    """
    if not isinstance(config, AdaLoraConfig):
        return state
    kept, found = config.target_r, {}
    for name, tensor in state.items():
        found[name] = tensor[:, :kept] if "lora_B" in name else tensor[:kept] if "lora_" in name else tensor
    return found
