"""How clips are divided into training and held-out ones: by fold, name, list, or a seeded fraction.

Every function gives `(training, held out)` and raises `ManifestError` where one of them would be empty.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dass.manifest import Manifest
from dass.manifest_forms import ManifestError, compile_regex


def _split(manifest: Manifest, held_out: np.ndarray, what: str) -> tuple[Manifest, Manifest]:
    for part, mask in (("training", ~held_out), ("held-out", held_out)):
        if not mask.any():
            raise ManifestError(f"{manifest.source}: {what} leaves no {part} clips out of {len(manifest)}")
    return (
        manifest.subset(np.flatnonzero(~held_out), f"{manifest.source} (training)"),
        manifest.subset(np.flatnonzero(held_out), f"{manifest.source} (held out)"),
    )


def split_by_fold(manifest: Manifest, fold: str | int) -> tuple[Manifest, Manifest]:
    """Holds out the clips of one fold (ESC-50: 1 to 5) or of one named split."""
    folds = sorted({clip.fold for clip in manifest} - {""})
    if str(fold) not in folds:
        raise ManifestError(f"{manifest.source}: has no fold {fold!r}; it has {', '.join(folds) or 'none'}")
    return _split(manifest, np.array([clip.fold == str(fold) for clip in manifest]), f"fold {fold}")


def split_by_regex(manifest: Manifest, pattern: str) -> tuple[Manifest, Manifest]:
    """Holds out the clips in whose name the regular expression finds something."""
    compiled = compile_regex(pattern, "holdout")
    return _split(manifest, np.array([bool(compiled.search(clip.key)) for clip in manifest]), f"{pattern!r}")


def split_by_list(manifest: Manifest, path: str | Path) -> tuple[Manifest, Manifest]:
    """Holds out the clips whose names stand in a text file, one a line (Speech Commands' `testing_list.txt`)."""
    names = {line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()} - {""}
    unknown = names - {clip.key for clip in manifest}
    if unknown:
        raise ManifestError(f"{path}: {len(unknown)} of its names are no clips, the first: {min(unknown)!r}")
    return _split(manifest, np.array([clip.key in names for clip in manifest]), str(path))


def split_by_fraction(manifest: Manifest, fraction: float, seed: int = 0) -> tuple[Manifest, Manifest]:
    """Holds out about `fraction` of each class, whole groups at a time, chosen by a hash of the names.

    A file that is added later changes the side of few others; the order of the manifest does not matter.
    """
    if not 0 < fraction < 1:
        raise ManifestError(f"holdout_fraction must lie between 0 and 1, got {fraction}")

    def rank(group: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogateescape"), digest_size=8).digest()

    groups = [clip.group or clip.key for clip in manifest]
    members: dict[int, dict[str, int]] = {}  # class -> group -> clips
    for index, group in enumerate(groups):
        for label in manifest.labels(index)[:1]:
            counts = members.setdefault(label, {})
            counts[group] = counts.get(group, 0) + 1
    held: set[str] = set()
    for label in sorted(members):
        counts = members[label]
        wanted = max(round(fraction * sum(counts.values())), 1)
        taken = sum(count for group, count in counts.items() if group in held)
        for group in sorted(counts, key=rank):
            left = [other for other in counts if other not in held]
            if taken >= wanted or len(left) <= 1:
                break
            if group not in held:
                held.add(group)
                taken += counts[group]
    return _split(manifest, np.array([group in held for group in groups]), f"a fraction of {fraction}")
