"""A diffusion or flow model as a policy: pictures are scored by their denoising error, and drawn from noise.

A draw of a time t and a noise eps is to a picture what a token is to a text. Its log-prob, up to what does not depend on the weights, is

    -1/2 w(t) sum over latent dims of (target - prediction(x_t, t, caption))^2    nats, fp32,

and a picture's score is the mean over its draws: the summand of the evidence bound at one time, without the number of times as a factor
(Diffusion-DPO, arXiv 2311.12908). A difference of scores from a reference's at the same draws estimates log pi - log pi_ref.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.noise import BY_A_MODEL
from prefopt.config.schema import DataConfig, ModelConfig, NoiseConfig, SamplerConfig
from prefopt.data.batch import MicroBatch
from prefopt.data.latents import Encodings, encode, patient, texts_of
from prefopt.data.records import BadRow, Example, Message
from prefopt.data.tokenise import Tokens
from prefopt.errors import RunFailed
from prefopt.objectives.base import About
from prefopt.policies.denoisers import Denoiser
from prefopt.policies.encoders import Encoders
from prefopt.policies.guidance import PLAIN, Guidance, Side
from prefopt.policies.inversion import Leg, floored, grid, walk
from prefopt.policies.noise import HEAD, HELD_OUT, Draws, address, normals, share
from prefopt.policies.owned import consult
from prefopt.policies.sites import Drawing, Seen, Sites, Way
from prefopt.policies.split import Hooks
from prefopt.policies.trajectory import Sampling, Transitions, Walk, policy_times, transitions_of
from prefopt.policies.truncated import renoised, truncated
from prefopt.policies.user_branch import Users


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """In it, a model is not in training: nothing is dropped out."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class DiffusionPolicy(nn.Module):
    """`forward(micro)` -> `token_logp` [N] and `error` [N], the mean over latent dims of the squared error, of N draws in edge order; or of
    N transitions (`policies/trajectory.py`) `step_logp`, which is `token_logp` too."""

    quantity, layout, share, pad = "token_logp", "draws", False, 0

    def __init__(self, cfg: ModelConfig, noise: NoiseConfig, denoiser: Denoiser, encoders: Callable[[], Encoders], device: torch.device,
                 precision: str, seed: int, source: dict[str, Any]):
        super().__init__()
        self.cfg, self.precision, self.source = cfg, precision, source
        self.denoiser, self.process, self.network = denoiser, denoiser.process, denoiser.network.to(device)
        self.encodings: Encodings | None = None
        self.captions: dict[str, int] | None = None  # of the rows, for the manifest: how many, and how many are cut
        self.encoders = encoders  # opened when something has to be encoded or decoded
        self.draws = Draws(noise, seed)
        self.ways: dict[int, Way] = {}  # group -> how its sample was drawn, for plan=states
        self.users = Users(cfg.user_width) if cfg.user_width else None
        self.sampling: Sampling | None = None  # of the walks, which whoever drew them leaves here
        self.walks: dict[int, Walk] = {}
        self.sides: tuple[Side | None, Side | None] = (None, None)  # of guidance, where others draw along (`policies/negative.py`)
        self.hooks: Hooks | None = None  # while the weights are split and DeepSpeed does not gather them
        self.train()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def scoring(self) -> str:
        """How pictures are scored, for the manifest."""
        noise = self.draws.cfg
        return f"{noise.plan} noise, {noise.timesteps} times, {noise.weighting} weights, {noise.draws} of {noise.pool or 'ever new'} draws"

    def identity(self) -> dict[str, Any]:
        """What the scores of a draw depend on beside weights and encoded pictures, for the reference store."""
        noise = {k: v for k, v in asdict(self.draws.cfg).items() if k not in ("draws", "user_dropout")}
        config = {k: v for k, v in dict(self.network.config).items() if not k.startswith("_")}
        return {"process": f"{self.process.kind} shift {self.process.shift:g}", "noise": noise,
                "architecture": json.dumps(config, sort_keys=True, default=str),
                "dtype": str(next(self.network.parameters()).dtype).removeprefix("torch."), "precision": self.precision}

    # ---- rows ------------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example], data: DataConfig, accelerator: Any) -> None:
        """Makes the pictures and captions of `examples` known, from the store or by VAE and text encoders. Raises `UserError`."""
        if self.users is not None:
            self.users.read(data.users)
        if accelerator.is_main_process:
            self.captions = self.encoders().count_long(text for e in examples for text in texts_of(e))
        side = self.cfg.resolution // self.denoiser.factor
        self.encodings = encode(
            examples, data, self.cfg.resolution, self.encoders, shape=(self.denoiser.latent_channels, side, side),
            rank=accelerator.process_index, world=accelerator.num_processes, wait=patient(accelerator.num_processes),
            about=self.source["where"],
        )

    def tokenise(self, example: Example, held_out: bool = False) -> Tokens:
        """The addresses of a row's caption and pictures, with the draws that they are scored at, which are the same for all users. Raises
        `BadRow`."""
        caption, user = self.encodings.caption_of(example.prompt_text), self._user(example.prompt)
        pictures = self.encodings.images_of(example)
        if len(pictures) < len(example.completions):
            raise BadRow("it is a text, and this algorithm is about pictures")
        group = address("group", caption, *sorted(set(pictures)))  # each once: extra sequences show a picture of the row again
        numbers = self.draws.numbers(held_out)
        branches = []
        for completion, picture in zip(example.completions, pictures, strict=True):
            own = self.encodings.caption_of(completion.text) if completion.text.strip() else caption
            branches.append(self.draws.branch(picture, self._told(own, user), group, numbers))
        frame = tuple(self.encodings.latent(pictures[0])[0].shape) if self.encodings.framing.step else ()
        return Tokens([self._told(caption, user)], branches, 0, [0] * len(branches), frame)

    def tokenise_eval(self, example: Example) -> Tokens:
        """The same for a row of the held-out split."""
        return self.tokenise(example, held_out=True)

    def prompt_ids(self, prompt: list[Message], chat: bool) -> list[int]:
        text, user = "\n".join(m.text for m in prompt), self._user(prompt)
        try:
            caption = self.encodings.caption_of(text)
        except BadRow:  # asked for by a person
            self.encoders().count_long([text])
            caption = self.encodings.add_caption(text, self.encoders().captions([text])[0])
        return [self._told(caption, user)]

    def _user(self, prompt: list[Message]) -> int | None:
        """The address of the user that a prompt names. Raises `BadRow` where it names one in vain, or none and the model is told one."""
        if self.users is not None:
            return self.users.of(prompt)
        if any(m.user is not None for m in prompt):
            raise BadRow(f"it has a user, and model={self.cfg.name} is told none; add adapter=user, or set data.columns.user=null to leave "
                         "the column out")
        return None

    def _told(self, caption: int, user: int | None) -> int:
        return caption if self.users is None else self.users.told(caption, user)

    def _parts(self, told: int) -> tuple[int, int | None]:
        return (told, None) if self.users is None else self.users.parts(told)

    # ---- scores ----------------------------------------------------------------------------------

    def forward(self, micro: MicroBatch, asked: Any = None) -> dict[str, Tensor]:
        """Of what may be asked beside: `states` are the predictions, and `divergence` [N] that of both models' Gaussians at a draw, which
        is half the weighted squared distance of their predictions, of whatever kind."""
        self.prepare(micro)
        sites = micro.made
        if isinstance(sites, Transitions):
            return self._steps(micro, sites, asked)
        prediction = self.predict(sites.x_t, sites.t, sites.captions, sites.sizes, sites.guidance)
        share = 0.5 * sites.weight / micro.trained.sum(1)[micro.layout.token_edge]
        said = self.process.x0_of(prediction, sites.x_t, sites.t) if sites.huber else prediction
        off = cost = (said - sites.target).flatten(1).square()
        if sites.huber:
            cost = 2 * off / ((off + sites.huber**2).sqrt() + sites.huber)  # the same without a difference of large numbers
        made = {"token_logp": -share * cost.sum(1), "error": off.mean(1)}
        if asked is not None and asked.states:
            made["states"] = prediction.detach()
        if asked is not None and asked.divergence:
            made["divergence"] = share * (prediction - asked.divergence[1]).flatten(1).square().sum(1)
        return made

    def _steps(self, micro: MicroBatch, sites: Transitions, asked: Any) -> dict[str, Tensor]:
        """The same of transitions; a `divergence` is that of both Gaussians, and the objective's module, if it has one, is shown x_t."""
        sampling, x_t = sites.sampling, sites.x_t
        prediction = self.predict(x_t, policy_times(sampling, sites.step, x_t), sites.captions, sites.sizes, sampling.guidance)
        step_logp = sampling.score(prediction, x_t, sites.x_to, sites.step)
        made = {"token_logp": step_logp, "step_logp": step_logp}
        if asked is not None and asked.states:
            made["states"] = prediction.detach()
        if asked is not None and asked.divergence:
            made["divergence"] = sampling.distance(prediction, asked.divergence[1], x_t, sites.step)
        if asked is not None and asked.module:
            done = (sites.step / (len(sampling.times) - 1)).to(x_t)
            said = torch.stack([self.gist(self._parts(caption)[0]) for caption in sites.captions]).to(x_t)
            made |= consult(self, micro, torch.cat([x_t.flatten(1), said, done[:, None]], 1), None)
        return made

    def gist(self, caption: int) -> Tensor:
        """[d] the mean embeddings of a caption, for modules that are no networks of their own."""
        said = self.encodings.caption(caption)
        return torch.cat([t.reshape(-1, t.shape[-1]).float().mean(0) for name, t in sorted(said.items()) if name != "mask"])

    @property
    def about(self) -> About:
        """What an objective's module is shown of a transition: x_t, the gist of its caption, and how far the sampler is."""
        shape = self.encodings.shape
        return About(math.prod(shape) + len(self.gist(self.encodings.caption_of(""))) + 1, 0)

    def sizes(self, count: int) -> Tensor | None:
        """[count, 6] of pictures that are drawn, for networks that are told."""
        sizes = self.encodings.default_sizes(count)
        return None if sizes is None else sizes.to(self.device)

    def predict(self, x_t: Tensor, t: Tensor, captions: list[int], sizes: Tensor | None, guidance: Guidance = PLAIN) -> Tensor:
        """The network's prediction, fp32. Under `guidance` it is that without caption and user, and from there further on (2207.12598); one
        call makes both, unless only one of them is to have a graph. Other models may predict either."""
        if not guidance.on:
            with guidance.conditional(self) as model:
                return model.answer(x_t, t, captions, sizes)
        nothing = [self.encodings.caption_of("")] * len(captions)
        alike = guidance.blank_gradient or not torch.is_grad_enabled()
        if alike and guidance.positive is guidance.negative is None:
            twice = [None if part is None else torch.cat([part, part]) for part in (x_t, t, sizes)]
            return guidance(*self.answer(*twice[:2], captions + nothing, twice[2]).chunk(2))
        with nullcontext() if guidance.blank_gradient else torch.no_grad(), guidance.blank(self) as model:
            blank = model.answer(x_t, t, nothing, sizes)
        with guidance.conditional(self) as model:
            return guidance(model.answer(x_t, t, captions, sizes), blank)

    def answer(self, x_t: Tensor, t: Tensor, captions: list[int], sizes: Tensor | None) -> Tensor:
        """The same of this network alone and without guidance."""
        parts = [self._parts(c) for c in captions]
        said = [self.encodings.caption(caption) for caption, _ in parts]
        condition = {name: torch.stack([s[name] for s in said]) for name in said[0]}
        if self.users is not None:
            condition |= self.users.batch([user for _, user in parts])
        condition = {name: value.to(x_t.device) for name, value in condition.items()}
        with self.autocast():
            return self.denoiser.predict(x_t, t, condition, sizes).float()

    def prepare(self, micro: MicroBatch, reference: Any = None) -> None:
        """Finds where the micro-batch is scored, before anybody scores it: policy and `reference` (see `policies/reference.py`) are asked
        at the very same sites, which the weights of one of them may decide."""
        if micro.made is None:
            micro.made = self.sites(micro, reference)

    @torch.no_grad()
    def sites(self, micro: MicroBatch, reference: Any = None) -> Sites | Transitions:
        """Held-out pictures are judged at random noise under every plan, so that all runs are judged alike."""
        if self.sampling is not None and (found := transitions_of(micro, self.walks, self.sampling, self.sizes(1))) is not None:
            return found
        cfg, seen = self.draws.cfg, self._seen(micro)
        if cfg.plan == "states" and any(number < HELD_OUT for _, number, _ in seen.keys):
            return self._state_sites(seen, micro.input_ids.device)
        if cfg.plan not in BY_A_MODEL or any(number >= HELD_OUT for _, number, _ in seen.keys):
            return self._random_sites(seen, micro.input_ids.device)
        seen.clean = seen.clean.to(micro.input_ids.device)
        seen.sizes = None if seen.sizes is None else seen.sizes.to(micro.input_ids.device)
        if cfg.plan == "inverted" and cfg.inverter == "policy":
            made = self._inverted_sites(seen, self)
        elif reference is None:
            raise RunFailed(f"noise.plan={cfg.plan} moves pictures by the reference, and nobody said which that is")
        else:
            with reference.model() as model:
                by_plan = {"path": self._path_sites, "inverted": self._inverted_sites, "truncated": self._truncated_sites}
                made = by_plan[cfg.plan](seen, model)
        return made

    def _seen(self, micro: MicroBatch) -> Seen:
        edge = micro.layout.token_edge.tolist()
        ids, trained = micro.input_ids.tolist(), micro.trained.cpu()
        start = micro.prompt.tolist()
        numbers = micro.input_ids.cpu()[trained].tolist()
        x0, times, weights, captions, sizes, keys = [], [], [], [], [], []
        for e, number in zip(edge, numbers, strict=True):
            picture, caption, group = ids[e][start[e] : start[e] + HEAD]
            if self.encodings.mirrored and self.draws.mirrored(group, number):
                picture = self.encodings.mirrored[picture]
            mean, std = self.encodings.latent(picture)
            still = std is None or (self.draws.cfg.plan == "path" and number < HELD_OUT)  # all draws of a picture lie on one path
            x0.append(mean if still else mean + std * normals(tuple(mean.shape), "posterior", group, number, picture))
            keys.append((group, number, picture))
            share, weight = self.draws.time(group, number)
            times.append(share)
            weights.append(weight)
            said, user = self._parts(caption)
            said = self.encodings.caption_of("") if self.draws.dropped(group, number) else said
            captions.append(self._told(said, None if self.draws.user_dropped(group, number) else user))
            sizes.append(self.encodings.sizes(picture))
        return Seen(torch.stack(x0).float(), torch.tensor(times, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64), captions,
                    None if sizes[0] is None else torch.stack(sizes), keys)

    def _weight(self, seen: Seen, t: Tensor) -> Tensor:
        return (seen.weight * self.process.weight(t, self.draws.cfg.weighting, self.draws.cfg.gamma)).float()

    def _random_sites(self, seen: Seen, device: torch.device) -> Sites:
        """Made on the CPU from numbers alone, then moved: the same pictures are noised alike on every machine."""
        clean, t = seen.clean, self.process.times(seen.share)
        noise = torch.stack([self.draws.noise(tuple(clean.shape[1:]), *key) for key in seen.keys])
        made = (self.process.noised(clean, noise, t), self.process.target(clean, noise, t), t, self._weight(seen, t))
        return Sites(*(part.to(device) for part in made), seen.captions, None if seen.sizes is None else seen.sizes.to(device))

    def _state_sites(self, seen: Seen, device: torch.device) -> Sites:
        """A sample at a state that it was drawn through, where the target is what its writer predicted there; what else is in its group at
        random noise of the same time (Diffusion-DRO, arXiv 2510.18353)."""
        x_t, target, times = [], [], []
        for clean, where, key in zip(seen.clean, seen.share.tolist(), seen.keys, strict=True):
            group, _, picture = key
            way = self.ways[group]
            place = min(int(where * len(way.times)), len(way.times) - 1)
            t = way.times[place : place + 1]
            if picture == way.picture:
                made = way.states[place], way.said[place]
            else:
                noise = self.draws.noise(tuple(clean.shape), *key)[None]
                made = self.process.noised(clean[None], noise, t)[0], self.process.target(clean[None], noise, t)[0]
            x_t.append(made[0]), target.append(made[1]), times.append(t)
        t = torch.cat(times)
        made = (torch.stack(x_t), torch.stack(target), t, self._weight(seen, t))
        return Sites(*(part.to(device) for part in made), seen.captions, None if seen.sizes is None else seen.sizes.to(device))

    def _walk(self, seen: Seen, model: DiffusionPolicy, reach: Tensor, of: list[int], apart: bool) -> Iterator[Leg]:
        """Inverts the pictures that the draws `of` look at. With `apart` each draw has random noise (`noise.eta`) of its own."""
        cfg, device = self.draws.cfg, seen.clean.device

        def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            draws = [of[k] for k in rows.tolist()]
            sizes = None if seen.sizes is None else seen.sizes[draws]
            return model.predict(x, t, [seen.captions[k] for k in draws], sizes, Guidance(cfg.inversion_guidance))

        def noise(i: int, rows: Tensor) -> Tensor:
            keys = [seen.keys[of[k]] for k in rows.tolist()]
            return torch.stack([normals(tuple(seen.clean.shape[1:]), "eta", self.draws.seed, group, number if apart else 0, picture, i)
                                for group, number, picture in keys]).to(device)

        with resting(model):
            yield from walk(self.process, predict, seen.clean[of], reach, cfg.inversion_steps, cfg.eta, cfg.renoise, noise)

    def _inverted_sites(self, seen: Seen, model: DiffusionPolicy) -> Sites:
        """Each picture is brought to its draw's time, the last one of the grid that is not later; the noise is what leads there from the
        picture (arXiv 2503.18454, 2506.02698)."""
        at, device = grid(self.process, self.draws.cfg.inversion_steps), seen.clean.device
        reach = floored(self.process.times(seen.share), at)
        x_t = torch.empty_like(seen.clean)
        for leg in self._walk(seen, model, reach, list(range(len(reach))), apart=True):
            there = reach[leg.rows] == leg.i
            x_t[leg.rows[there].to(device)] = leg.after[there.to(device)]
        t = at[reach].to(device)
        eps = self.process.noise_between(seen.clean, x_t, t)
        return Sites(x_t, self.process.target(seen.clean, eps, t), t, self._weight(seen, at[reach]).to(device), seen.captions, seen.sizes)

    def _path_sites(self, seen: Seen, model: DiffusionPolicy) -> Sites:
        """Each draw is a state on the way of the reference's inversion, at which it is compared with what the reference itself said there
        (arXiv 2507.11554). A picture's draws under one caption share the way."""
        cfg, device = self.draws.cfg, seen.clean.device
        state = (seen.share * cfg.inversion_steps).long().clamp(0, cfg.inversion_steps - 1) + 1
        ways: dict[tuple[int, int], list[int]] = {}
        for k, (caption, (_, _, picture)) in enumerate(zip(seen.captions, seen.keys, strict=True)):
            ways.setdefault((picture, caption), []).append(k)
        draws = list(ways.values())
        reach = torch.tensor([max(int(state[k]) for k in own) for own in draws])
        x, said = torch.empty_like(seen.clean), torch.empty_like(seen.clean)
        for leg in self._walk(seen, model, reach, [own[0] for own in draws], apart=False):
            for place, way in enumerate(leg.rows.tolist()):
                for k in draws[way]:
                    if int(state[k]) == leg.i:
                        x[k], said[k] = leg.before[place], leg.said[place]
        t = grid(self.process, cfg.inversion_steps)[state]
        return Sites(x, said, t.to(device), self._weight(seen, t).to(device), seen.captions, seen.sizes,
                     Guidance(cfg.inversion_guidance))

    def _truncated_sites(self, seen: Seen, model: DiffusionPolicy) -> Sites:
        """Some steps of the sampler, noised again from there: the target is what `model` foresaw last (Self-NPO, arXiv 2505.11777)."""
        cfg, device, shape, seed = self.draws.cfg, seen.clean.device, tuple(seen.clean.shape[1:]), self.draws.seed
        times = self.process.schedule(cfg.truncation_grid)
        x, start = torch.stack([self.draws.noise(shape, *key) for key in seen.keys]).to(device), torch.zeros(len(seen.share)).long()
        if cfg.truncation_start == "picture":
            start = ((1 - seen.share) * cfg.truncation_grid).long().clamp(0, cfg.truncation_grid - 1)
            x = self.process.noised(seen.clean, x, times[start].to(device))
        scale, blank = cfg.truncation_guidance, [self.encodings.caption_of("")]

        def foresee(x: Tensor, t: Tensor, rows: list[int]) -> Tensor:
            said = blank * len(rows) if scale == 0 else [seen.captions[i] for i in rows]  # at 0 nothing is left of the caption
            return model.predict(x, t, said, None if seen.sizes is None else seen.sizes[rows], Guidance(scale) if scale else PLAIN)

        with resting(model):
            x, target, s = truncated(self.process, foresee, x, times, start, cfg.truncation)
        later = torch.tensor([share("later", seed, *key) for key in seen.keys], dtype=torch.float64)
        again = torch.stack([normals(shape, "again", seed, *key) for key in seen.keys]).to(device)
        x_r, r = renoised(self.process, x, s, later, again)
        captions = seen.captions if cfg.truncation_caption else blank * len(r)
        return Sites(x_r, target, r.to(device), self._weight(seen, r).to(device), captions, seen.sizes, huber=cfg.huber)

    def autocast(self) -> torch.autocast:
        """bf16 products, inside the policy, so that references and sampling compute exactly as training does."""
        # Each weight is used once in a pass: keeping them in bf16 would gain nothing, and hold all of them (under ZeRO 3 as well).
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)

    @contextmanager
    def without_adapter(self):
        """The base model, for a reference that costs nothing."""
        with self.denoiser.without_adapter():
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """What a plain pipeline of diffusers loads: the network, or its LoRA weights."""
        with self.hooks.whole() if self.hooks else nullcontext():
            self.denoiser.save(folder)

    # ---- samples ---------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int, places: Sequence[int] | None = None) -> list[Drawing]:
        """A picture for each caption. Where it starts follows from (seed, caption, how often the caption came before for its user), the
        draws that it is scored at from (seed, caption, its place), where `places` are 0, 1, ... if not given."""
        places = range(len(prompts)) if places is None else places
        keys, seen = [], {}
        for (caption,) in prompts:
            seen[caption] = seen.get(caption, -1) + 1
            keys.append(("sample", seed, self._parts(caption)[0], seen[caption]))
        latents = self.draw(prompts, keys, sampler, sides=self.sides)
        images, numbers, out = self.encoders().decode(latents), self.draws.numbers(held_out=True), []
        for place, (caption,), latent, image in zip(places, prompts, latents, images, strict=True):
            picture = address("sample", seed, caption, place, latent.numpy().tobytes())
            self.encodings.add_latent(picture, latent)
            group = address("group", caption, "sample", seed, place)  # not the picture, whose last bits depend on its batch
            out.append(Drawing(image, self.draws.branch(picture, caption, group, numbers)))
        return out

    @torch.no_grad()
    def draw(self, prompts: list[list[int]], keys: Sequence[tuple], sampler: SamplerConfig, ways: list[Way] | None = None,
             sides: tuple[Side | None, Side | None] = (None, None)) -> Tensor:
        """Latents [B, C, h, w] of a picture for each caption, on the CPU. The noise that each starts from follows from its key. How they
        were drawn is added to `ways`, if these are asked for; the times of each are then moved about within their steps. `sides`: who
        predicts with and without caption, where that is not this policy."""
        starts = torch.stack([normals(self.encodings.shape, *key) for key in keys])
        out = []
        with resting(self):
            for i in range(0, len(prompts), sampler.batch_size):
                part = slice(i, i + sampler.batch_size)
                out.append(self._denoise(starts[part], prompts[part], sampler, keys[part], ways, sides).cpu())
        return torch.cat(out)

    def _denoise(self, x: Tensor, prompts: list[list[int]], sampler: SamplerConfig, keys: Sequence[tuple] = (),
                 ways: list[Way] | None = None, sides: tuple[Side | None, Side | None] = (None, None)) -> Tensor:
        """Latents from noise: DDIM, or Euler's steps along a flow."""
        captions = [caption for (caption,) in prompts]
        guidance = Guidance(self.cfg.guidance if sampler.guidance is None else sampler.guidance, True, *sides)
        times = self.process.schedule(sampler.steps).expand(len(x), -1).to(self.device)
        if ways is not None:
            times = self.process.jittered(times, torch.tensor([share("jitter", *key) for key in keys], device=self.device))
        x, kept = x.to(self.device), []
        sizes = self.sizes(len(captions))
        for t, to in zip(times.T[:-1], times.T[1:], strict=True):
            said = self.predict(x, t, captions, sizes, guidance)
            if ways is not None:
                kept.append((t, x, said))
            x = self.process.step(said, x, t, to)
        if ways is not None:
            parts = [torch.stack(part, 1).cpu() for part in zip(*kept, strict=True)]
            ways += [Way(0, *way) for way in zip(*parts, strict=True)]
        return x
