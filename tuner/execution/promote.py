"""Promotes a trial of a sweep with what the sweep's own records say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from tuner.errors import AliasMoved, NotFoundError, PromotionRefused
from tuner.promotion.promote import Promotion, promote
from tuner.results.ranking import best_trial
from tuner.results.record import TrialRecord
from tuner.results.store import Store


def promote_trial(
    store: Store,
    record: TrialRecord,
    alias: str | None = None,
    force: bool = False,
    push_to_hub: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Promotion:
    """Merge, measure and promote the best report of a trial, and record that. Raises as `promotion.promote` does.

    Where the checkpoint is broken, the refusal names the command that promotes the best of the other trials.
    """
    if record.report is None:
        raise NotFoundError(f"trial {record.number} of sweep {store.spec.name!r} has no finite result to promote")
    status = store.status()
    try:
        promotion = promote(
            store.spec,
            record,  # type: ignore[arg-type]
            record.report,
            status.baseline,
            base=status.data["base"],
            eval_fingerprint=status.data["fingerprints"]["eval"],
            data_fingerprint=status.data["fingerprints"]["data"],
            prompting=status.data.get("prompting"),
            sweep_folder=store.folder,
            alias=alias,
            force=force,
            push_to_hub=push_to_hub,
            progress=progress,
            may_move=store.refuse_superseded,
        )
    except AliasMoved as moved:
        progress(str(moved))
        return promote_trial(store, record, alias, force, push_to_hub, progress)
    except PromotionRefused as refusal:
        other = _best_other(store, record) if refusal.broken else None
        if other is None:
            raise
        command = f"tuner promote {store.spec.name} {other}" + (f" --alias {alias}" if alias else "")
        said = f"no other trial was promoted instead; the next best is trial {other}: {command}"
        raise PromotionRefused([*refusal.reasons, said], broken=True) from refusal
    store.set_promoted({**asdict(promotion), "path": str(promotion.path)})
    return promotion


def _best_other(store: Store, record: TrialRecord) -> int | None:
    """The number of the best trial but this one whose adapter is kept."""
    others = [one for one in store.trials() if one.number != record.number and one.adapter_path]
    found = best_trial(others, store.spec.objective, store.status().tokens_per_trial)
    return found[0].number if found else None
