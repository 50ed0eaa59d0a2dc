"""Weights that are split over the processes from the moment they are read: models larger than one process can hold.

Under ZeRO stage 3 (arXiv 1910.02054) each process holds a part of every parameter. DeepSpeed gathers them in training, where all processes
run the same passes. Here they are gathered for everything else: scoring and sampling before and between steps, frozen models, saving. A
`Block` (a layer of the network, say) is whole while its module runs, and only then.

To gather is something that all processes do together, and here each is about its own business: one may write its tenth word while another
scores, and a third has no prompt at all. So they agree block by block whose turn it is. Whoever asks for the block with the lowest number
gets it, the others help and ask again, which lets those behind catch up with those ahead; who is done helps until nobody asks (`alone`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOM = 2  # a model is gathered as a whole where this many times its weights are free on every process: weights, and what is made of them
NOTHING = 2**62  # what a process asks for that wants no block

_numbers = itertools.count()  # processes make the same blocks in the same order, so a number means the same block to all
_blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()


class Block:
    """Parameters that are gathered together. They are whole while somebody on this process holds the block."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters, self.number, self.holders = list(parameters), next(_numbers), 0
        _blocks[self.number] = self

    def hold(self) -> None:
        """Makes the parameters whole, if they are not. Other processes have to hold a block as well, or be in `alone`."""
        if not self.holders:
            while (turn := _agree(self.number)) != self.number:
                _blocks[turn].gather(keep=False)
            self.gather(keep=True)
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1
        if not self.holders:
            for parameter in self.parameters:
                _set(parameter, parameter.data.new_empty(0), "NOT_AVAILABLE")

    def gather(self, keep: bool) -> None:
        """This process's side of gathering the block."""
        for _, same in groupby(sorted(self.parameters, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
            parameters = list(same)
            # Parts are flat and equally long on all processes; the last one is padded.
            mine = torch.cat([p.ds_tensor.detach().to(p.device) for p in parameters])
            world, begin = dist.get_world_size(), 0
            everyone = mine.new_empty(world * len(mine))
            dist.all_gather_into_tensor(everyone, mine)
            for parameter in parameters if keep else ():
                size = parameter.ds_tensor.numel()
                flat = everyone.view(world, -1)[:, begin : begin + size].reshape(-1)
                _set(parameter, flat[: parameter.ds_numel].view(parameter.ds_shape), "AVAILABLE")
                begin += size


def _set(parameter: nn.Parameter, data: Tensor, status: str) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.data, parameter.ds_status = data, ZeroParamStatus[status]


class Hooks:
    """Has every module of `model` gather its own weights before it runs and let go of them after. `outside`: a module whose weights the
    model's `forward` itself uses. No gradient passes through; in training DeepSpeed has hooks of its own."""

    def __init__(self, model: nn.Module, outside: nn.Module | None = None):
        self.blocks, self._of = [], {}
        self.handles = [model.register_forward_pre_hook(_undisturbed)]
        self._visit(model, False)
        if outside is not None:
            self._hook(model, outside.parameters())

    def _visit(self, module: nn.Module, layer: bool) -> None:
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if layer and not listed:  # one of many alike: gathered as one
            self._hook(module, module.parameters())
            return
        self._hook(module, module.parameters(recurse=False))
        for child in module.children():
            self._visit(child, isinstance(module, nn.ModuleList))

    def _hook(self, module: nn.Module, parameters: Iterator[nn.Parameter]) -> None:
        wanted = [p for p in dict.fromkeys(parameters) if is_split(p)]
        if fresh := [p for p in wanted if p not in self._of]:
            self.blocks.append(Block(fresh))
            self._of |= dict.fromkeys(fresh, self.blocks[-1])
        blocks = list(dict.fromkeys(self._of[p] for p in wanted))
        if not blocks:
            return

        @torch.compiler.disable
        def before(*_: Any) -> None:
            for block in blocks:
                block.hold()

        @torch.compiler.disable
        def after(*_: Any) -> None:
            for block in blocks:
                block.release()

        self.handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In it, this process holds the whole model."""
        with ExitStack() as held:
            for block in self.blocks:
                block.hold()
                held.callback(block.release)
            yield

    def block(self, parameter: Tensor) -> Block | None:
        """The block that a parameter is in; None for one that is whole everywhere."""
        return self._of.get(parameter)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _undisturbed(model: nn.Module, *_: Any) -> None:
    """Keeps DeepSpeed, whose engine watches the model it trains, from gathering by itself whatever a pass looks at."""
    for module in model.modules():
        if hasattr(module._parameters, "_in_forward"):
            module._parameters._in_forward = False


@contextmanager
def alone(hooks: Hooks | None) -> Iterator[None]:
    """In it, a process may call the model whose weights `hooks` gather, and other split models, as often and in the order it likes. Every
    process enters and leaves it, and does nothing else inside that needs the others. Where there is room, the model is whole for that time.
    """
    if hooks is None or not hooks.blocks:
        yield
        return
    with hooks.whole() if fits(hooks.blocks) else nullcontext():
        yield
        while (turn := _agree(NOTHING)) != NOTHING:
            _blocks[turn].gather(keep=False)


def fits(blocks: Sequence[Block]) -> bool:
    """Whether every process has room for all of them."""
    parameters = [p for block in blocks for p in block.parameters]
    wanted = ROOM * sum(p.ds_numel * p.element_size() for p in parameters)
    return bool(_least(int(wanted <= free_memory(parameters[0].device)), parameters[0].device))


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on its device; of the machine's memory, an equal share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _agree(number: int) -> int:
    """The lowest number that any process asks for."""
    return _least(number, torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu"))


def _least(number: int, device: torch.device) -> int:
    value = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return int(value)


def is_split(parameter: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(parameter, "ds_numel") and parameter.numel() != parameter.ds_numel


def whole_shape(parameter: Tensor) -> torch.Size:
    """Its shape when it is whole."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def reading(settings: dict[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """In it, transformers' `from_pretrained` splits a model over all processes module by module while it is made (deepspeed.zero.Init) and
    while it is read: the first process reads one module's weights from the file at a time and sends them to the others. `settings`:
    DeepSpeed's JSON of stage 3; None reads a model as a whole."""
    if settings is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig({**settings, "bf16": {"enabled": dtype == torch.bfloat16}})  # known to transformers while it lives
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def make_whole(module: nn.Module) -> None:
    """Gives every process all of a module's own weights, as ordinary parameters."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def pieces(model: nn.Module, hooks: Hooks, trained: bool = False) -> Iterator[dict[str, Tensor]]:
    """The state dict of `model` in CPU memory, or what is `trained` of it, block after block, for one process in `alone`. Of several names
    of one tensor the first counts."""
    state, first = model.state_dict(keep_vars=True), {}
    for name, tensor in state.items():
        if not trained or tensor.requires_grad:
            first.setdefault(tensor, name)
    for block, tensors in groupby(first, key=hooks.block):
        if block is not None:
            block.hold()
        try:
            piece = {first[tensor]: tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors}
        finally:
            if block is not None:
                block.release()
        yield piece
        del piece  # before the next one is gathered
