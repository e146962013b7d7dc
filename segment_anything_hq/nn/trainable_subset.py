"""The trained part of a segmenter, without its frozen base: the module that a training optimizes and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn


class TrainedPart(nn.Module):
    """The trained modules of a segmenter (the same objects, not copies), under their names in the segmenter.

    Its `state_dict` contains only them, so that checkpoints do not repeat the base. Moving it to a device moves the
    whole segmenter. Frozen modules stay in evaluation mode: running statistics stay fixed and no path is dropped.

    Args:
        segmenter: its parameters that require gradients are the trained part, with the buffers of modules that are
            trained entirely.
    """

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self._whole = (segmenter,)  # in a tuple, so that it is not registered as a submodule
        _collect(segmenter, self)
        self._frozen = tuple(_frozen(segmenter))

    @property
    def segmenter(self) -> nn.Module:
        """The whole segmenter."""
        return self._whole[0]

    def train(self, mode: bool = True) -> TrainedPart:
        """Set the mode of the trained modules; frozen ones stay in evaluation mode."""
        self.training = mode
        self.segmenter.train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> TrainedPart:
        self.segmenter._apply(fn, recurse)
        return self


def _collect(source: nn.Module, target: nn.Module) -> None:
    """Register the trained parts of the source in the target; partly trained branches become new modules."""
    for name, child in source.named_children():
        trained = [parameter.requires_grad for parameter in child.parameters()]
        if trained and all(trained):
            target.add_module(name, child)
        elif any(trained):
            branch = nn.Module()
            target.add_module(name, branch)
            _collect(child, branch)
    for name, parameter in source.named_parameters(recurse=False):
        if parameter.requires_grad:
            target.register_parameter(name, parameter)


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest submodules without trained parameters."""
    for child in module.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            yield from _frozen(child)
        elif next(child.parameters(), None) is not None:
            yield child
