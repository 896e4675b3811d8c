"""What jobs/promote.py does: two models on the same test split, and then one small write."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leafnet.core import lock, storage, terminal
from leafnet.core.errors import EXIT_WORSE, UserError
from leafnet.core.lock import Lock
from leafnet.core.terminal import say
from leafnet.data import shards
from leafnet.data.groups import groups_of_split
from leafnet.data.shards import ShardIndex
from leafnet.distributed import resources, session
from leafnet.evaluation import predict
from leafnet.evaluation.settings import PromoteSettings
from leafnet.evaluation.verdict import Rule, Verdict, compare, document
from leafnet.models import bundle, registry
from leafnet.models.bundle import Bundle
from leafnet.models.registry import Champion

_SPLIT = "test"


def run(settings: PromoteSettings) -> None:
    """Make the candidate champion of the registry if it is not worse, or go back to the last.

    Raises:
        UserError: something in the settings, models or data is wrong; another job holds the
            registry (exit code 3); the candidate is worse, or may be (exit code 5).
    """
    root = storage.absolute(settings.registry)
    if settings.rollback:
        with _held(settings, root) as held:
            _roll_back(root, held, dry_run=settings.dry_run)
        return
    assert settings.candidate is not None, "the settings demand it"
    assert settings.shards is not None, "the settings demand it"
    candidate = bundle.load(settings.candidate)
    index = shards.read_index(settings.shards)
    shards.check_sizes(index)
    rule = _rule(settings, index)
    _check_classes(candidate, index, "candidate")
    with _held(settings, root) as held:
        found = registry.champion(root)
        say(f"candidate {candidate.url}   id {candidate.model_id}")
        if found is not None and found.model_id == candidate.model_id:
            say(f"{candidate.model_id} is champion of {root} already; nothing to do")
            return
        champion = None
        if found is None:
            say(f"champion  none: the first model of {root} has to reach the floors alone")
        else:
            champion = _load(root, found)
            _check_classes(champion, index, "champion")
            say(f"champion  {champion.url}   id {champion.model_id}, since {found.since}")
        terminal.keeps("the champion is the one before, and nothing of the comparison is kept")
        verdict, facts = _compare(settings, root, candidate, champion, index, rule)
        _say_verdict(verdict)
        if settings.dry_run:
            say(f"dry run   {verdict.outcome}; nothing was written")
        _conclude(settings, root, held, candidate, champion, verdict, facts)


@contextlib.contextmanager
def _held(settings: PromoteSettings, root: str) -> Iterator[Lock | None]:
    """The registry, held by this job and in order; None in a dry run, which writes nothing."""
    if settings.dry_run:
        yield None
        return
    with lock.hold(root, timeout_s=settings.lock_timeout) as held:
        registry.settle(root)
        yield held


def _rule(settings: PromoteSettings, index: ShardIndex) -> Rule:
    if not index.examples(_SPLIT):
        raise UserError(
            "empty-split",
            f"{index.root} has no test split; models are compared on photographs that none of "
            "them was trained or chosen on: prepare it with --split 80/10/10",
        )
    floors = {}
    for text in settings.recall:
        name, _, share = text.rpartition("=")
        if not index.counts[_SPLIT].get(name):
            raise UserError(
                "unknown-class",
                f"--recall {text}: the test split of {index.root} has no class {name}, only "
                f"{', '.join(index.class_names)}",
            )
        floors[name] = float(share)
    return Rule(
        margin=settings.margin,
        min_recall=settings.min_recall,
        recall=floors,
        max_ece_rise=settings.max_ece_rise,
        resamples=settings.resamples,
        seed=settings.seed,
    )


def _check_classes(model: Bundle, index: ShardIndex, what: str) -> None:
    if model.class_names != index.class_names:
        raise UserError(
            "other-classes",
            f"the {what} {model.url} has the classes {', '.join(model.class_names)}; the data set "
            f"{index.root} has {', '.join(index.class_names)}: models of other classes need a "
            "registry of their own",
        )


def _load(root: str, champion: Champion) -> Bundle:
    """The champion, read as the alias names it."""
    model = bundle.load(storage.join(root, registry.ALIAS))
    if model.model_id != champion.model_id:
        raise UserError("registry-changed", f"{root} changed meanwhile; run the same command again")
    return model


def _compare(
    settings: PromoteSettings,
    root: str,
    candidate: Bundle,
    champion: Bundle | None,
    index: ShardIndex,
    rule: Rule,
) -> tuple[Verdict, dict[str, Any]]:
    """The verdict, and what the history tells of it."""
    split = shards.split_fingerprint(index, _SPLIT)
    before = [
        d.comparison["split"]["fingerprint"] for d in registry.decisions(root) if d.comparison
    ]
    say(f"test      {index.examples(_SPLIT):,} photographs of {index.root}, {split[:16]}")
    if before and before[-1] != split:
        say(
            f"          another test split than of the last comparison ({before[-1][:16]}); both "
            "models are evaluated on this one"
        )
    models = [candidate] + ([champion] if champion else [])
    log = Path(tempfile.mkdtemp(prefix="leafnet-")) / "promote.log"
    with terminal.chatter_to(log), session.session(settings.ray) as found:
        nodes = session.with_room(found, settings.gpu, "auto", settings.ray)
        machines = resources.machines(nodes, settings.gpu)
        precision, why = predict.choose_precision(
            settings.precision,
            candidate.convolutions,
            image_size=candidate.image_size,
            machines=machines,
        )
        say(f"device    {resources.device(machines.gpus)}, {precision} ({why})")
        with terminal.progress("evaluate", len(models) * index.examples(_SPLIT)) as advance:
            results, labels = predict.logits_of(
                models,
                index,
                _SPLIT,
                precision=precision,
                batch_size=resources.batch_size(settings.batch_size, gpus=machines.gpus),
                machines=machines,
                advance=advance,
            )
    say(f"log       {log}")
    verdict = compare(
        results[0],
        results[1] if champion else None,
        labels,
        class_names=index.class_names,
        rule=rule,
        groups=groups_of_split(index, _SPLIT),
    )
    facts = document(verdict) | {
        "split": {
            "shards": index.root,
            "split": _SPLIT,
            "examples": index.examples(_SPLIT),
            "fingerprint": split,
        },
        "precision": precision,
        "settings": settings.model_dump(mode="json"),
        "versions": bundle.versions(),
    }
    return verdict, facts


def _say_verdict(verdict: Verdict) -> None:
    say()
    terminal.table(
        "",
        ["test split", "candidate", "champion", "wanted", ""],
        [
            [
                check.name,
                f"{check.candidate:.3f}",
                "" if check.champion is None else f"{check.champion:.3f}",
                check.wanted,
                "" if check.passed else "not met",
            ]
            for check in verdict.checks
        ],
    )
    say()


def _conclude(
    settings: PromoteSettings,
    root: str,
    held: Lock | None,
    candidate: Bundle,
    champion: Bundle | None,
    verdict: Verdict,
    facts: dict[str, Any],
) -> None:
    """Write what was decided, unless in a dry run, and tell it."""
    action = _action(verdict, settings.tie)
    if held is not None:
        held.check()
        named = None
        if action == registry.PROMOTED:
            digest = registry.add(root, candidate.url, candidate.description)
            named = {"model_id": candidate.model_id, "digest": digest}
            # The model is in its place: whoever reads the alias from now on finds it.
            held.check()
        decision = registry.decide(
            root, action, candidate=candidate.model_id, champion=named, comparison=facts
        )
        say(f"history   {storage.join(root, 'history')}, decision {decision.number}: {action}")
    terminal.result(action=action, candidate=candidate.model_id, comparison=facts["checks"])
    if action == registry.REFUSED:
        told = "; ".join(check.told for check in verdict.failed)
        kept = f"; {champion.model_id} stays champion" if champion else ""
        raise UserError(
            verdict.outcome, f"{candidate.model_id} is refused: {told}{kept}", exit_code=EXIT_WORSE
        )
    if held is None:
        return
    if action == registry.PROMOTED:
        say(f"promoted  {candidate.model_id}: {storage.join(root, registry.ALIAS)}")
    else:
        assert champion is not None, "there is no tie without a champion"
        say(
            f"tie       {candidate.model_id} is not worse, and no better; {champion.model_id} "
            "stays champion (--tie promote takes the candidate)"
        )


def _action(verdict: Verdict, tie: str) -> registry.Action:
    """What a verdict leads to, with the setting for ties: `keep` or `promote`."""
    if verdict.outcome in ("worse", "unclear"):
        return registry.REFUSED
    better = verdict.outcome == "better" or tie == "promote"
    return registry.PROMOTED if better else registry.KEPT


def _roll_back(root: str, held: Lock | None, *, dry_run: bool) -> None:
    found = registry.champion(root)
    before = registry.previous(root)
    if found is None or before is None:
        raise UserError(
            "no-previous",
            f"{root} has no champion"
            if found is None
            else f"{found.model_id} is the first champion of {root}; there is none to go back to",
        )
    # Whole and readable, before anybody is sent to it.
    model = bundle.load(registry.model_url(root, before["model_id"]))
    if held is not None:
        held.check()
        registry.decide(
            root, registry.ROLLED_BACK, candidate=found.model_id, champion=before, comparison={}
        )
    told = "dry run   would go back" if dry_run else "rollback "
    say(f"{told} from {found.model_id} to {model.model_id}: {storage.join(root, registry.ALIAS)}")
