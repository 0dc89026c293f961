"""Runs positions of a text through the network with attention to a selection, and measures it.

Each position is a decode step after an exact reading of what stands before it; its residual goes
through all layers with the approximated attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from estimate import Estimate
from joint import JointKeys
from network import Network, Reading
from sealed import Sealed
from view import INF, View

from ebbtide.prefetch.budget import best_records
from ebbtide.prefetch.evidence import Evidence, misplaced_mass, missed_mass
from ebbtide.prefetch.freekv import FreeKV
from ebbtide.prefetch.mean_change import MeanChange

BATCH = 32  # positions that are computed together

Select = Callable[[Evidence], torch.Tensor]


@dataclass
class Outcome:
    """logits (num_positions, vocab); measures (num_positions, num_layers) by name."""

    logits: torch.Tensor
    measures: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """select None: everything is attended, and nothing measured. foresees: what chooses for
    rehearsed queries; None: predictions are not measured. sees: what the selector is shown beside
    the estimates, "true" puts the exact masses in their place. drops: what is not selected does
    not count, not even by its mean value.
    """

    select: Select | None = None
    how: Estimate = field(default_factory=Estimate)
    pages_per_record: int = 2
    foresees: Select | None = None
    sees: str = ""
    drops: bool = False
    prior: torch.Tensor | None = None  # (num_layers, kv_heads, group): factors of heads' effects


def run(
    network: Network,
    reading: Reading,
    pages: list[Sealed],
    positions: torch.Tensor,
    setting: Setting,
) -> Outcome:
    """Positions (num_positions,) are any of the text's; those that follow one another are taken
    for consecutive steps.
    """
    logits, measures, means = [], [], MeanChange()
    sees_joint = setting.sees in ("joint", "joint, true query")
    joint = [JointKeys(keys) for keys in reading.keys] if sees_joint else None
    for part in positions.split(BATCH):
        # Layer 0 is rehearsed from the embedding. two: from two layers before. mean: what is
        # usually added to a residual is added in advance.
        x = two = early = late = network.embed(reading.ids[part])
        per_layer = []
        for layer in range(network.num_layers):
            at = (network, reading, pages[layer], layer)
            view = View(*at, x, part, setting.pages_per_record)
            if setting.prior is not None:
                view.effect = view.effect * setting.prior[layer].unsqueeze(1)
            shows_early = setting.sees in ("rehearsed", "joint")
            residuals = {"late": late, "early": early, "two": two}
            if setting.foresees:
                for name, residual in list(residuals.items()):
                    residuals[f"{name}, mean"] = _with_means(means, (layer, name), residual, x)
            points = {
                name: View(*at, residual, part, setting.pages_per_record)
                for name, residual in residuals.items()
                if setting.foresees or (shows_early and name == "early")
            }
            early_view = points.get("early")
            asked = early_view if setting.sees == "joint" else view
            shown = joint[layer].scores(asked) if joint else None
            chosen, measured = choose(view, early_view, part, setting, shown)
            out, error = attend(view, chosen, setting)
            if setting.foresees:
                measured |= _predictions(view, points, chosen, part, setting)
            two, early, late = early, x, network.after_attention(layer, x, out.transpose(0, 1))
            x = network.after_mlp(layer, late)
            per_layer.append(measured | error)
        logits.append(network.logits(x))
        measures.append({n: torch.stack([m[n] for m in per_layer], 1) for n in per_layer[0]})
    return Outcome(torch.cat(logits), {n: torch.cat([m[n] for m in measures]) for n in measures[0]})


def _with_means(means: MeanChange, key, residual: torch.Tensor, true: torch.Tensor):
    """Row by row, with the mean of what was added in the rows before."""
    rows = []
    for row, wanted in zip(residual, true, strict=True):
        rows.append(means.add_to(key, row))
        means.note(key, wanted - row)
    return torch.stack(rows)


def choose(view: View, early: View | None, positions, setting: Setting, joint=None):
    """(num_rows, num_records) bool, and what the selector thinks of it, (num_rows,) by name.
    joint: (num_rows, num_pages), see JointKeys.
    """
    if setting.select is None:
        return view.is_sealed.unflatten(1, (-1, view.pages_per_record)).any(-1), {}
    log_mass, unevenness = view.estimates(setting.how)
    shown = log_mass
    if setting.sees == "true":
        shown = view.scores().logsumexp(-1)
    more = {}
    if setting.sees == "bounds":
        bounds = view.bounds()
    if setting.sees == "rehearsed":
        rehearsed, _ = early.estimates(setting.how)
    chosen = torch.zeros(view.num_rows, view.num_pages // view.pages_per_record, dtype=torch.bool)
    measured = {n: torch.zeros(view.num_rows) for n in ("missed_estimate", "misplaced_estimate")}
    previous = None
    for row in range(view.num_rows):
        if setting.sees == "bounds":
            more = {"upper_bound": lambda row=row: bounds[:, row]}
            fresh = view.evidence(row, log_mass, unevenness, **more)
            if row and positions[row] == positions[row - 1] + 1:
                now, then = view.queries[:, row], view.queries[:, row - 1]
                cosine = torch.cosine_similarity(now, then, -1).mean(-1)
                more |= {"previous": previous, "continuity": cosine}
            if isinstance(getattr(setting.select, "__self__", None), FreeKV):
                previous = setting.select(fresh)
        if setting.sees == "rehearsed":
            more = {"rehearsed_log_mass": rehearsed[:, row]}
        if joint is not None:
            more = {"joint_score": lambda row=row: joint[row, : view.num_pages]}
        chosen[row, setting.select(view.evidence(row, shown, unevenness, **more))] = True
        judged, selected = view.evidence(row, log_mass, unevenness), chosen[row].nonzero().flatten()
        measured["missed_estimate"][row] = missed_mass(judged, selected).max()
        measured["misplaced_estimate"][row] = misplaced_mass(judged, selected).max()
    measured["read"] = chosen.sum(-1) / view.num_records
    return chosen, measured


def attend(view: View, chosen: torch.Tensor, setting: Setting):
    """Attention's output (kv_heads, num_rows, group, d); and its errors, of the worst head in mass
    and of the mean one in output, (num_rows,) by name.
    """
    sealed, size = view.sealed, view.sealed.near.page_tokens
    scores = view.scores()
    if setting.select is None:
        parts = _weights(scores.flatten(3), view.raw_scores)
        return _mix(view, parts, sealed.values), {}
    in_full = (chosen.repeat_interleave(view.pages_per_record, 1) & view.is_sealed)[None, :, None]
    log_mass, unevenness = view.estimates(setting.how)
    full = scores.masked_fill(~in_full[..., None], -INF).flatten(3)
    pseudo = log_mass.masked_fill(in_full | setting.drops, -INF)
    far, near, raw = _weights(full, pseudo, view.raw_scores)
    out = _mix(view, (far, raw), sealed.values)
    out += (near.flatten(1, 2) @ sealed.value_means[:, : view.num_pages]).view(out.shape)

    true, true_raw = _weights(scores.flatten(3), view.raw_scores)
    exact = _mix(view, (true, true_raw), sealed.values)
    used = far + (near / size).repeat_interleave(size, -1)
    apart = ((used - true).abs().sum(-1) + (raw - true_raw).abs().sum(-1)) / 2
    true = true.unflatten(-1, (-1, size))
    mass = true.sum(-1)
    own = (true / mass.clamp_min(1e-30).unsqueeze(-1) - 1 / size).abs().sum(-1) / 2
    whole = mass.sum(-1).clamp_min(1e-9)
    errors = {
        "missed": mass.masked_fill(in_full, 0).sum(-1),
        "apart": apart,
        "error": (out - exact).norm(dim=-1) / exact.norm(dim=-1),
        "uneven": (own * mass).sum(-1) / whole,
        "uneven_estimate": (unevenness * mass).sum(-1) / whole,
    }
    worst = ("missed", "apart")
    return out, {
        name: (e.amax((0, 2)) if name in worst else e.mean((0, 2))) for name, e in errors.items()
    }


def _weights(*scores: torch.Tensor) -> list[torch.Tensor]:
    """One softmax over the last axes of all."""
    joined = torch.cat(scores, -1).softmax(-1)
    return list(joined.split([s.shape[-1] for s in scores], -1))


def _mix(view: View, parts, values: torch.Tensor) -> torch.Tensor:
    far, raw = parts
    out = far.flatten(1, 2) @ values[:, : far.shape[-1]]
    return out.view(view.queries.shape) + raw @ view.raw_values


def _predictions(view: View, points: dict[str, View], chosen, positions, setting: Setting):
    """Numbers of records: `chosen`, and `new`, which are selected now and were not a step ago; and
    for each predictor `named`, the new ones that it names, `asked`, what it names and the step
    before did not select, and `vain`, what of that is not selected. It names what setting.foresees
    takes for the rehearsed query. nan for the first step. `cosine`: of rehearsed and true queries.
    """
    measured = {}
    before = torch.zeros_like(chosen)
    follows = torch.zeros(view.num_rows, dtype=torch.bool)
    follows[1:] = positions[1:] == positions[:-1] + 1
    before[1:] = chosen[:-1]
    before[~follows] = False
    for name, point in points.items():
        cosine = torch.cosine_similarity(point.queries, view.queries, -1)
        measured[f"cosine_{name}"] = cosine.mean((0, 2))
        log_mass, unevenness = point.estimates(setting.how)
        named = torch.zeros_like(chosen)
        for row in range(view.num_rows):
            named[row, setting.foresees(point.evidence(row, log_mass, unevenness))] = True
        new, fresh = chosen & ~before, named & ~before
        counted = {"named": new & named, "asked": fresh, "vain": fresh & ~chosen}
        measured |= {f"{what}_{name}": _count(which, follows) for what, which in counted.items()}
    measured["chosen"], measured["new"] = _count(chosen, follows), _count(chosen & ~before, follows)
    return measured


def _count(records: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, records.sum(-1).float(), torch.nan)


def most_massive(count_share: float) -> Select:
    """The best records by summed estimated mass, a share of all: for comparing sketches."""

    def select(evidence: Evidence) -> torch.Tensor:
        mass = evidence.by_record(evidence.shares.shares).flatten(0, 1).sum(0)
        there = int(evidence.present().sum())
        return best_records(evidence, mass, max(1, round(count_share * there)))

    return select
