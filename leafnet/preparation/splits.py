"""Which example goes to which split."""

import numpy as np

from leafnet.data.groups import Ints, components, named_groups
from leafnet.data.shards import SPLITS
from leafnet.preparation.duplicates import Pairs, duplicate_links
from leafnet.preparation.examples import NONE, TEST, TRAIN, VALID, Bools, Examples, Policy

# Splits


def assign_splits(
    examples: Examples, kept: Bools, pairs: Pairs, policy: Policy, has_splits: bool
) -> tuple[Ints, list[str]]:
    """[N] places in SPLITS, _NONE where a photograph is not kept; and notes."""
    named, notes = named_groups(examples.keys, policy.group)
    links = [duplicate_links(examples.pixels)]
    if named is not None:
        links.append(duplicate_links(named))
    if policy.drop_near:
        first = np.unique(pairs.inverse, return_index=True)[1]
        links += [duplicate_links(pairs.inverse), (first[pairs.a], first[pairs.b])]
    a, b = (np.concatenate(ends) for ends in zip(*links, strict=True))
    group = components(examples.label.size, a, b)

    split = np.where(kept, examples.split if has_splits else TRAIN, NONE)
    shares = list(policy.shares)
    if has_splits:
        if named is not None:
            notes += _crossing_note(named, examples.split)
        there = set(np.unique(examples.split).tolist())
        shares = [share if i == TRAIN or i not in there else 0 for i, share in enumerate(shares)]
        shares = shares if policy.shares[TRAIN] else [0, 0, 0]
    # Shares without train are for evaluation, where the splits of the source stay what they are.
    carved = split == TRAIN if any(shares) else np.zeros(split.size, np.bool_)
    split[carved] = stratify(
        examples.label[carved], group[carved], (shares[0], shares[1], shares[2]), seed=policy.seed
    )
    for i in (VALID, TEST):
        if has_splits and i not in there and TRAIN in there and shares[TRAIN]:
            count = int(np.sum(split == i))
            notes.append(
                f"the source has no {SPLITS[i]} split: {count:,} photographs of train become it"
            )
    for i in (VALID, TEST):
        found = np.bincount(examples.label[split == i], minlength=len(examples.class_names))
        without = [name for name, n in zip(examples.class_names, found, strict=True) if not n]
        if without and found.any():
            notes.append(f"warning: {SPLITS[i]} has no example of {', '.join(without)}")
    return split, notes


def _crossing_note(group: Ints, split: Ints) -> list[str]:
    pairs = np.unique(np.stack([group, split]), axis=1)
    crossing = int(np.sum(np.bincount(pairs[0]) > 1))
    if not crossing:
        return []
    return [f"warning: {crossing:,} groups of --group are in more than one split of the source"]


def stratify(label: Ints, group: Ints, shares: tuple[int, int, int], *, seed: int) -> Ints:
    """[N] places in SPLITS, with each class divided by `shares` and no group in two splits.

    Every class comes as close to its shares as its groups allow, exactly where each photograph is
    a group of its own. A class of three groups or more has an example in every split with a share.

    Args:
        label: [N], class of each photograph.
        group: [N], equal where photographs stay together.
        shares: of train, valid and test; their sum is the whole.
        seed: of the choice.
    """
    if not label.size:
        return np.empty(0, np.int64)
    _, of = np.unique(group, return_inverse=True)
    classes = int(label.max()) + 1
    cells, counts = np.unique(of * classes + label, return_counts=True)
    content: list[list[tuple[int, int]]] = [[] for _ in range(int(of.max()) + 1)]
    members: list[list[int]] = [[] for _ in range(classes)]  # groups of each class
    size_of = dict(zip(cells.tolist(), counts.tolist(), strict=True))
    for cell, count in size_of.items():
        content[cell // classes].append((cell % classes, count))
        members[cell % classes].append(cell // classes)
    totals = np.bincount(label, minlength=classes).tolist()
    missing = [_targets(n, len(members[c]), shares) for c, n in enumerate(totals)]
    place = [NONE] * len(content)

    def put(number: int, split: int) -> None:
        place[number] = split
        for c, count in content[number]:
            missing[c][split] -= count

    shuffled = np.random.default_rng([seed, len(SPLITS)]).permutation(len(content)).tolist()
    rank = {number: i for i, number in enumerate(shuffled)}
    # One group for valid and test first, where a class has few and large ones: later there might
    # be no room for any. Rare classes choose first.
    for c in sorted(range(classes), key=lambda c: (len(members[c]), c)):
        for split in (TEST, VALID):
            wanted = missing[c][split]
            if len(members[c]) < len(SPLITS) or wanted <= 0:
                continue
            if any(place[number] == split for number in members[c]):
                continue
            free = [number for number in members[c] if place[number] == NONE]
            if len(free) > 1:
                size = {number: size_of[number * classes + c] for number in free}
                put(min(free, key=lambda n: (max(size[n], wanted), rank[n])), split)
    open_splits = [i for i, share in enumerate(shares) if share]
    total = [sum(count for _, count in inside) for inside in content]
    for number in sorted(shuffled, key=lambda number: -total[number]):
        if place[number] != NONE:
            continue
        inside = content[number]
        put(
            number,
            max(
                open_splits,
                key=lambda split: (sum(n * missing[c][split] for c, n in inside), -split),
            ),
        )
    return np.array(place, np.int64)[of]


def _targets(count: int, groups: int, shares: tuple[int, int, int]) -> list[int]:
    """How many of a class's `count` photographs each split should have, by largest remainder.

    >>> _targets(1000, 1000, (80, 10, 10)), _targets(3, 3, (80, 10, 10))
    ([800, 100, 100], [1, 1, 1])
    >>> _targets(2, 2, (80, 10, 10))
    [2, 0, 0]
    """
    exact = [count * share / sum(shares) for share in shares]
    targets = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (targets[i] - exact[i], i))
    for i in by_remainder[: count - sum(targets)]:
        targets[i] += 1
    if groups >= len(shares):
        for i, share in enumerate(shares):
            if share and not targets[i]:
                targets[targets.index(max(targets))] -= 1
                targets[i] = 1
    elif count and not targets[TRAIN]:
        targets[targets.index(max(targets))] -= 1
        targets[TRAIN] = 1
    return targets
