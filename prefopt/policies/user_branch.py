"""A diffusion network that is told for whom it draws: a second attention beside each cross-attention (PPD, arXiv 2501.06655).

    Z = softmax(Q K_text^T / sqrt d) V_text + softmax(Q K_u^T / sqrt d) V_u,    K_u = u W_k,  V_u = u W_v

u [T, width] is the user's embedding. W_k and W_v, without biases, are all that is trained; W_v begins at zero, so that nothing changes yet.
A network that is told no user, or u = 0, is the base model to the last bit: it is the reference, at no memory, and a draw whose user is
dropped has no gradient. One token (T = 1) leaves W_k nothing to choose: the softmax over it is 1, and V_u is added everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prefopt.data.records import BadRow, Message
from prefopt.data.users import embedding, read_users
from prefopt.errors import UserError
from prefopt.policies.noise import address

if TYPE_CHECKING:
    from prefopt.policies.denoisers import Denoiser

NAME = "user_branch.safetensors"


class UserAttention(nn.Module):
    """Takes the place of a cross-attention's processor. Where no user is told it is the one that it replaces.

    Users come as arguments of the network's forward, so that gradient checkpointing sees them again; under these two names, because
    diffusers hands `cross_attention_kwargs` to self-attentions as well, and these names it lets pass without a warning.
    """

    def __init__(self, attention: nn.Module, width: int):
        super().__init__()
        self.plain = attention.processor
        self.to_k = nn.Linear(width, attention.to_k.out_features, bias=False)
        self.to_v = nn.Linear(width, attention.to_v.out_features, bias=False)
        nn.init.zeros_(self.to_v.weight)

    def __call__(self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None, ip_hidden_states: Tensor | None = None,
                 ip_adapter_masks: Tensor | None = None) -> Tensor:
        """`ip_hidden_states` [B, T, width] are the users, `ip_adapter_masks` [B, 1, 1, T] is true where these have tokens."""
        if ip_hidden_states is None:
            return self.plain(attention, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            keys = encoder_hidden_states.shape[1]
            attention_mask = attention.prepare_attention_mask(attention_mask, keys, len(hidden_states))
            attention_mask = attention_mask.view(len(hidden_states), attention.heads, -1, keys)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        query = heads(attention.to_q(hidden_states))
        text = heads(attention.to_k(encoder_hidden_states)), heads(attention.to_v(encoder_hidden_states))
        user = heads(self.to_k(ip_hidden_states)), heads(self.to_v(ip_hidden_states))
        z = scaled_dot_product_attention(query, *text, attention_mask) + scaled_dot_product_attention(query, *user, ip_adapter_masks)
        out = attention.to_out[0](z.transpose(1, 2).flatten(2))
        return attention.to_out[1](out) / attention.rescale_output_factor


def add_user_branch(denoiser: Denoiser, width: int, seed: int) -> None:
    """Freezes the network and puts the branch, fp32, beside its cross-attentions; W_k is drawn from `seed`."""
    network, layers = denoiser.network.requires_grad_(False), []
    if denoiser.takes_users:
        layers = [m for m in network.modules() if getattr(m, "is_cross_attention", False)]
    if not layers:
        raise UserError(f"model.user_width={width}: {denoiser.folder.path} ({denoiser.family}) has no cross-attention that takes a second "
                        "one beside it; adapter=user is for SD 1.x and 2.x, SDXL and PixArt")
    for layer in layers:
        if layer.group_norm or layer.spatial_norm or layer.norm_cross or layer.norm_q or layer.residual_connection:
            raise UserError(f"model.user_width={width}: the cross-attentions of {denoiser.folder.path} do more than those of SD and PixArt "
                            "(norms, or a residual of their own), which adapter=user does not know; use adapter=lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            layer.processor = UserAttention(layer, width).to(next(network.parameters()).device)
    denoiser.user_width = width


def save_user_branch(denoiser: Denoiser, folder: Path) -> None:
    """W_k and W_v of each layer, in a file of their own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in _parameters(denoiser).items()}, folder / NAME, metadata={"format": "pt"})


def restore_user_branch(denoiser: Denoiser, folder: Path) -> None:
    """Puts in what was saved. UserError where it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, own = folder / NAME, _parameters(denoiser)
    if not file.is_file():
        raise UserError(f"{folder} holds no {NAME}, which adapter=user trains; give a run of it, or name the weights in model.path")
    try:
        saved = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error})") from error
    if saved.keys() != own.keys():
        raise UserError(f"{file} belongs to another network than {denoiser.folder.path}: it has other layers")
    for name, parameter in own.items():
        if saved[name].shape != parameter.shape:
            raise UserError(f"{file}: {name} is {list(saved[name].shape)}, and model.user_width={denoiser.user_width} makes it "
                            f"{list(parameter.shape)}; set model.user_width={saved[name].shape[1]}, if it is the same network")
        parameter.data.copy_(saved[name])


def _parameters(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    return {name: p for name, p in denoiser.network.named_parameters() if p.requires_grad}


class Users:
    """The users that a policy knows, by address, and addresses that stand for a caption and a user together. Addresses follow from the
    numbers of an embedding and not from a name."""

    def __init__(self, width: int):
        self.width, self.path = width, None
        self._named: dict[str, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._parts: dict[int, tuple[int, int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Users:
        """A frozen copy of a policy knows the same ones."""
        return self

    def read(self, path: str | None) -> None:
        """Takes the names in the file `data.users`, if there is one."""
        self.path, self._named = path, read_users(path) if path else {}

    def of(self, prompt: Sequence[Message]) -> int:
        """The address of the user that a prompt names. Raises `BadRow`."""
        said = next((m.user for m in prompt if m.user is not None), None)
        if said is None:
            raise BadRow("it has no user, and the model is told one (adapter=user); name the column in data.columns.user, or set user=... "
                         "of prefopt sample")
        tokens = embedding(said, self.width, self._named, self.path)
        where = address("user", tuple(tokens.shape), tokens.numpy().tobytes())
        self._tokens[where] = tokens
        return where

    def told(self, caption: int, user: int | None) -> int:
        """The address of a caption and a user; without a user that of the caption."""
        if user is None:
            return caption
        where = address("told", caption, user)
        self._parts[where] = (caption, user)
        return where

    def parts(self, told: int) -> tuple[int, int | None]:
        """(caption, user) at an address."""
        return self._parts.get(told, (told, None))

    def batch(self, users: Sequence[int | None]) -> dict[str, Tensor]:
        """`user` [B, T, width], nobody as one token of zeros; `user_mask` [B, 1, 1, T] where their tokens are not equally many."""
        found = [torch.zeros(1, self.width) if user is None else self._tokens[user] for user in users]
        lengths = torch.tensor([len(tokens) for tokens in found])
        made = {"user": nn.utils.rnn.pad_sequence(found, batch_first=True)}
        if lengths.min() < lengths.max():
            made["user_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None])[:, None, None]
        return made
