"""Which rows an objective can read, told as early as it can be: from the columns, from a file's first row, and from every row."""

from __future__ import annotations

from dataclasses import asdict

from prefopt.config.mixtures import described
from prefopt.config.schema import DataConfig, TrainConfig
from prefopt.data.records import Example
from prefopt.data.sources import check_files, first_example
from prefopt.data.transforms import check_transforms
from prefopt.errors import UserError

VIEW_OF_KIND = {  # groups are sampled, so any row's prompt will do
    "pair": ("pairs", "unary", "demonstrations", "ranking", "groups"),
    "ranking": ("pairs", "unary", "demonstrations", "ranking", "groups"),
    "unary": ("unary", "demonstrations", "groups"),
    "demonstration": ("demonstrations", "groups"),
    "prompt": ("groups",),
}
# Columns that make a row of each kind, as prefopt.data.records tells rows apart.
COLUMNS_OF_KIND = {
    "pair": ({"chosen", "rejected"},),
    "ranking": ({"prompt", "completions", "scores"}, {"prompt", "completions", "ranks"}),
    "unary": ({"prompt", "completion", "label"},),
    "demonstration": ({"prompt", "completion"}, {"messages"}),
    "prompt": ({"prompt"},),
}
WANTED = {
    "pairs": "pairs (chosen and rejected)", "unary": "labelled completions", "demonstrations": "completions",
    "ranking": "rankings (completions with scores or ranks) or pairs",
}
INSTEAD = {"unary": "algo=kto", "demonstration": "algo=sft", "prompt": "algo=online_dpo"}


def check_data(cfg: TrainConfig) -> None:
    """Refuses, before anything is loaded, files that are not there and data that the objective cannot read."""
    check_files(cfg.data, cfg.trust)
    check_transforms(cfg.data)
    if cfg.source.kind != "offline" or cfg.data.transforms:
        return  # replies are sampled, or rows are made over: `check_use` sees what comes of it
    info = described(cfg.algo, cfg.trust.packages)
    if cfg.data.source in ("files", "hub") and not cfg.data.rows:
        check_columns(cfg.data, info.view)
    if cfg.data.source == "files" and (example := first_example(cfg.data, cfg.trust)):
        check_use(example, cfg.data, info.view, info.columns)


def check_columns(cfg: DataConfig, view: str) -> None:
    """Refuses data whose columns, as `data.columns` has them, make no row that an objective with this `view` could read."""
    named = {column: name for column, name in asdict(cfg.columns).items() if name is not None}
    kinds = [kind for kind, ways in COLUMNS_OF_KIND.items() if any(way <= named.keys() for way in ways)]
    if not any(view in VIEW_OF_KIND[kind] for kind in kinds):
        instead = f", or take an algorithm for {kinds[0]} data, such as {INSTEAD[kinds[0]]}" if kinds else ""
        raise UserError(f"data={cfg.name}: the objective needs {WANTED[view]}, and data.columns has none of these (it has "
                        f"{', '.join(named)}). Choose other data, or set the columns, as in data.columns.chosen=NAME{instead}.")


def check_use(example: Example, cfg: DataConfig, view: str, columns: tuple[str, ...]) -> None:
    """Refuses data that the objective would misread or silently ignore."""
    if view not in VIEW_OF_KIND[example.kind]:
        raise UserError(f"{example.origin}: this is a {example.kind} row, and the objective needs {WANTED[view]}. Choose other data, or an "
                        f"algorithm for {example.kind} data, such as {INSTEAD[example.kind]} (prefopt list algo).")
    if "logp" not in columns and any(c.logp is not None for c in example.completions):
        raise UserError(f"{example.origin}: the data has log-probs of the policy that wrote the replies, which this objective does not "
                        "use. Set data.columns.chosen_logp=null data.columns.rejected_logp=null to leave them out, or choose algo=is_daa.")
    if example.margin and "margin" not in columns:
        raise UserError(f"{example.origin}: the data has a margin, which this objective does not use. "
                        "Set data.columns.margin=null to leave it out, or choose algo=dpo or algo=simpo.")
