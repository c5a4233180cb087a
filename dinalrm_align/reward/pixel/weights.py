"""Gradient checkpointing of the transformers models in pixel rewards."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: nn.Module, recompute: bool) -> None:
    """Recompute a transformers model's layers in the backward pass, or keep their activations.

    transformers recomputes in training mode only, so `training` is set on the layers themselves, while the modules
    inside them (dropout) stay in evaluation mode. `model.eval()` undoes it: call this again afterwards.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer.training = recompute
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
