"""What is trained of a segmenter, apart from its frozen base: the module that a training optimizes and saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn


class TrainedPart(nn.Module):
    """The trained modules of a segmenter, not copies of them, under the names that they have in it.

    Its `state_dict` holds them alone, so that checkpoints do not repeat the base. Moving it to a device moves the whole
    segmenter. What is frozen stays in evaluation mode: no running mean moves, no path is dropped.

    Args:
        segmenter: whose parameters with gradients are meant, and the buffers of modules that have no others.
    """

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self._whole = (segmenter,)  # in a tuple it is no module of this one
        _collect(segmenter, self)
        self._frozen = tuple(_frozen(segmenter))

    @property
    def segmenter(self) -> nn.Module:
        """The whole of which this is a part."""
        return self._whole[0]

    def train(self, mode: bool = True) -> TrainedPart:
        """Switch what is trained."""
        self.training = mode
        self.segmenter.train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> TrainedPart:
        self.segmenter._apply(fn, recurse)
        return self


def _collect(source: nn.Module, target: nn.Module) -> None:
    """Give the target the parts of the source that are trained, branches of both kinds as new modules."""
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
    """The largest parts of a module of which nothing is trained."""
    for child in module.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            yield from _frozen(child)
        elif next(child.parameters(), None) is not None:
            yield child
