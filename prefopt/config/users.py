"""What can be said of users that a model is told (`adapter=user`) before anything is loaded. Imports no torch."""

from __future__ import annotations

from typing import Any

from prefopt.errors import UserError


def check_users(model: Any, data: Any) -> None:
    """Whether somebody reads the embeddings of users, and the adapter that does is alone and knows their width. Raises `UserError`."""
    width = model.user_width
    if width == 0:
        raise UserError("model.user_width has no value, and adapter=user needs one: how many numbers each token of a user's embedding has "
                        "(of one-hot users: how many users there are); give it: model.user_width=...")
    if data.users and width is None:
        raise UserError(f"data.users={data.users}: model={model.name} is told no users; add adapter=user, or leave it out")
    if width is None:
        return
    if model.kind != "diffusion":
        raise UserError(f"model.user_width={width} is for diffusion models, and model={model.name} is none; leave it out")
    if model.lora.enabled:
        raise UserError("adapter=user freezes all weights but its own, and model.lora.enabled=true trains others; choose one of the two")
