"""A scorer that knows at which step of the sampler a picture is foreseen (SPO's step-aware preference model, arXiv 2406.04314).

It is trained here and reads latents, so nothing is decoded to be judged: the picture that one call of the network foresees from a noisy
latent, the caption, and how far the sampler is. The paper's is a CLIP of pixels with the time in its norms, trained on such comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.data.batch import Row, step_rows
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.guidance import Guidance
from prefopt.policies.noise import normals, share

STEPS, BATCH, RATE, WIDTH = 500, 32, 2e-3, 64  # of its training: about a minute for tiny-diffusion on a CPU


class StepAware(nn.Module):
    """Latents [N, C, h, w], a caption's mean embedding [N, d] and the share of the process that is left [N] -> scores [N], in logits: of
    two pictures the first is preferred with probability sigmoid(difference)."""

    def __init__(self, channels: int, gist: int):
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(gist + 2, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, 6 * WIDTH))
        self.inlet = nn.Conv2d(channels + 2, WIDTH, 3, padding=1)  # and where a place is, or "on the left" could not be judged
        self.norms = nn.ModuleList(nn.GroupNorm(8, WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.outlet = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor, gist: Tensor, left: Tensor) -> Tensor:
        told = self.condition(torch.cat([gist, left[:, None], left[:, None].square()], 1)).view(-1, 3, 2, WIDTH, 1, 1)
        axes = [torch.linspace(-1, 1, n, device=x.device) for n in x.shape[2:]]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, -1, -1)
        y = self.inlet(torch.cat([x, places], 1))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            y = y + layer(F.silu(norm(y) * (1 + told[:, i, 0]) + told[:, i, 1]))
        return self.outlet(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1))[:, 0]


class StepAwareScorer:
    """A `StepAware` network beside the policy whose captions and foresight it is about."""

    def __init__(self, policy: DiffusionPolicy, seed: int):
        self.policy = policy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = policy.encodings.shape
            self.network = StepAware(shape[0], len(policy.gist(policy.encodings.caption_of("")))).to(policy.device)

    def _judge(self, x: Tensor, captions: list[int], left: Tensor) -> Tensor:
        gist = torch.stack([self.policy.gist(self.policy._parts(c)[0]) for c in captions]).to(x)
        return self.network(x, gist, left.to(x))

    @torch.no_grad()
    def __call__(self, x: Tensor, captions: list[int], left: Tensor, examples: Sequence[Any] = ()) -> Tensor:
        return self._judge(x, captions, left)

    @torch.no_grad()
    def foreseen(self, pairs: Sequence[tuple[int, int, int, float]], left: list[float], guidance: Guidance, *key: object) -> Tensor:
        """[2 P, C, h, w] both pictures of each pair as the policy foresees them from where so much of the process is `left`, under one
        noise for both; the chosen ones first."""
        policy = self.policy
        sides = [policy.encodings.latent(pair[side])[0] for side in (0, 1) for pair in pairs]
        clean = torch.stack(sides).float().to(policy.device)
        noise = torch.stack([normals(tuple(clean.shape[1:]), *key, i) for i in range(len(pairs))]).repeat(2, 1, 1, 1).to(clean)
        t = policy.process.times(torch.tensor(left, dtype=torch.float64)).repeat(2).to(policy.device)
        x = policy.process.noised(clean, noise, t)
        said = policy.predict(x, t, [pair[2] for _ in (0, 1) for pair in pairs], policy.sizes(len(x)), guidance)
        return policy.process.x0_of(said, x, t)

    def train(self, rows: Sequence[Row], guidance: Guidance, seed: int) -> None:
        """On the pairs of `rows`: at a uniform time, cross-entropy of which of two foreseen pictures is preferred; each pair weighs one
        over the number of pairs of its prompt."""
        pairs = pairs_of(rows)
        count = Counter(pair[2] for pair in pairs)
        network, policy = self.network, self.policy
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
        was_training = policy.training
        policy.eval()
        try:
            for step in range(STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 - step / STEPS)
                own = [pairs[i] for i in step_rows(len(pairs), BATCH, step, f"scorer {seed}")]
                left = [share("scorer", seed, step, i) for i in range(len(own))]
                scores = self._judge(self.foreseen(own, left, guidance, "scorer", seed, step), [p[2] for _ in (0, 1) for p in own],
                                     torch.tensor(left).repeat(2)).view(2, -1)
                weight = torch.tensor([1 / count[p[2]] for p in own]).to(scores)
                label = torch.tensor([p[3] for p in own]).to(scores)
                loss = (F.binary_cross_entropy_with_logits(scores[0] - scores[1], label, reduction="none") * weight).sum() / weight.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            policy.train(was_training)

    def accuracy(self, rows: Sequence[Row], guidance: Guidance) -> dict[str, float]:
        """Share of the pairs of `rows` whose preferred picture scores higher, where 10, 50 and 90 % of the process are left."""
        pairs = [pair for pair in pairs_of(rows) if pair[3] != 0.5]
        if not pairs:
            return {}
        out = {}
        for left in (0.1, 0.5, 0.9):
            right = 0.0
            for i in range(0, len(pairs), BATCH):
                own = pairs[i : i + BATCH]
                x = self.foreseen(own, [left] * len(own), guidance, "judged", i)
                scores = self(x, [p[2] for _ in (0, 1) for p in own], torch.full((len(x),), left)).view(2, -1)
                right += sum(bool(s > 0) == (p[3] > 0.5) for s, p in zip(scores[0] - scores[1], own, strict=True))
            out[f"{left:.0%}"] = right / len(pairs)
        return out

    def save(self, path: Path) -> None:
        """Under its name once it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        save_file(self.network.state_dict(), part)
        part.replace(path)

    def load(self, path: Path) -> None:
        self.network.load_state_dict(load_file(path))


def pairs_of(rows: Sequence[Row]) -> list[tuple[int, int, int, float]]:
    """(chosen picture, rejected picture, caption, probability that the chosen one is better) of each pair, pictures and captions by
    address."""
    return [(row.tokens.branches[i].ids[0], row.tokens.branches[j].ids[0], row.tokens.branches[i].ids[1],
             row.label if row.kind == "pair" else 1.0) for row in rows for i, j in row.pairs()]
