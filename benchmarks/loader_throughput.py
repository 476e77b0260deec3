"""Clips per second that one core decodes, resamples and turns into features: `python benchmarks/loader_throughput.py`.

Without arguments: the built-in corpus, and ten-second recordings made from it in three formats. `--data FOLDER_OR_LIST`
measures your own. The stages add up; "training batch" mixes half of its examples with a second clip, as the recipe does.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import soundfile
import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import Candidate, Clock, round_robin

from dass.audio import LogMelConfig, load_audio, load_native, resample
from dass.augment import AugmentConfig
from dass.data import AudioDataset, read_manifest
from dass.manifest import Clip, LabelClass, Manifest
from dass.synthetic import SyntheticConfig, SyntheticCorpus

CLIPS = 24  # of a call


@dataclass(frozen=True)
class LoaderBenchmark:
    """Measures the input pipeline on one core, stage by stage."""

    data: Path | None = None
    """Clips in any form that `dass.train --data.train` reads; none: the built-in corpus and files made from it."""
    label_regex: str | None = None
    """For a folder of files whose names hold the label, see `dass.train --help`."""
    clip_seconds: float = 10.24
    """Length of an example from files [s]."""
    seconds: float = 8.0
    """Time to measure each source [s]."""
    json: Path | None = None
    """File for the result."""


def make_recordings(folder: Path) -> dict[str, Manifest]:
    """Ten-second recordings of the built-in corpus: at the model's rate, and as they come from the web."""
    corpus = SyntheticCorpus(SyntheticConfig(seconds=10.0))
    formats = {"wav, 16 kHz mono": ("wav", 16000, 1), "flac, 44.1 kHz stereo": ("flac", 44100, 2)}
    formats["mp3, 44.1 kHz stereo"] = ("mp3", 44100, 2)
    found = {}
    for name, (suffix, rate, channels) in formats.items():
        clips = []
        for index in range(CLIPS):
            path = folder / f"{index}-{rate}.{suffix}"
            waveform = resample(corpus.load(index), corpus.sample_rate, rate).clamp(-1, 1)
            soundfile.write(path, np.stack([waveform] * channels, 1), rate)
            clips.append(Clip(path, (0,), path.name))
        found[name] = Manifest(clips, [LabelClass(0, "sound", "sound")])
    return found


def stages_of(source, front_end: LogMelConfig, cache: Path) -> dict:
    """What is measured: name -> function of the clips' numbers."""
    plain = AudioDataset(source, front_end)
    training = AudioDataset(source, front_end, augment=AugmentConfig())
    cached = AudioDataset(source, front_end, augment=AugmentConfig(), cache=cache)

    def batch(dataset: AudioDataset, train: bool):
        def make(indices: np.ndarray):
            return dataset.make_batch(np.arange(len(indices)), indices, seed=0, epoch=0, training=train)

        return make

    if isinstance(source, SyntheticCorpus):
        stages = {"generate": lambda indices: [source.load(i) for i in indices.tolist()]}
    else:
        stages = {
            "decode": lambda indices: [load_native(source[i].path, duration=10.24) for i in indices.tolist()],
            "+ resample": lambda indices: [load_audio(source[i].path, duration=10.24) for i in indices.tolist()],
        }
    stages["+ log-mel = evaluation batch"] = batch(plain, False)
    stages["training batch"] = batch(training, True)
    if not isinstance(source, SyntheticCorpus):
        batch(cached, False)(np.arange(len(source)))  # fills the cache
        stages["evaluation batch from the cache"] = batch(cached, False)
        stages["training batch from the cache"] = batch(cached, True)
    return stages


def measure(source, front_end: LogMelConfig, seconds: float, cache: Path) -> list[dict]:
    clock = Clock("cpu", cold=False)
    indices = np.arange(min(CLIPS, len(source)))
    stages = stages_of(source, front_end, cache)
    for stage in stages.values():
        stage(indices)
    candidates = [
        Candidate(name, lambda stage=stage: clock.once(lambda: stage(indices))) for name, stage in stages.items()
    ]
    round_robin(candidates, seconds)
    rows = []
    for candidate in candidates:
        found = candidate.statistics()
        rows.append(
            {
                "stage": candidate.name,
                "milliseconds_per_clip": 1e3 * found.median / len(indices),
                "clips_per_second": len(indices) / found.median,
                "p10": len(indices) / found.p90,
                "p90": len(indices) / found.p10,
                "samples": found.count,
            }
        )
    return rows


def main() -> None:
    config = tyro.cli(LoaderBenchmark, description=__doc__)
    torch.set_num_threads(1)
    frames = round(100 * config.clip_seconds)
    console, result = Console(), {"machine": machine.describe("cpu"), "sources": []}
    with tempfile.TemporaryDirectory() as folder:
        if config.data is None:
            sources = {"built-in corpus, 2 s": (SyntheticCorpus(), LogMelConfig(frames=200))}
            recordings = make_recordings(Path(folder))
            sources |= {f"10 s, {name}": (found, LogMelConfig(frames=frames)) for name, found in recordings.items()}
        else:
            manifest = read_manifest(config.data, label_regex=config.label_regex)
            sources = {str(config.data): (manifest, LogMelConfig(frames=frames))}
        for number, (name, (source, front_end)) in enumerate(sources.items()):
            rows = measure(source, front_end, config.seconds, Path(folder) / f"cache-{number}")
            result["sources"].append({"source": name, "frames": front_end.frames, "stages": rows})
            table = Table("stage", "ms a clip", "clips/s", "10 % to 90 %", title=f"{name}: one core")
            for row in rows:
                spread = f"{row['p10']:.0f} to {row['p90']:.0f}"
                table.add_row(
                    row["stage"],
                    f"{row['milliseconds_per_clip']:.2f}",
                    f"{row['clips_per_second']:.0f}",
                    spread,
                )
            console.print(table)
    if config.json:
        from dass.checkpoint import atomic_write

        atomic_write(config.json, json.dumps(result, indent=2) + "\n")
        console.print(f"written: {config.json}")


if __name__ == "__main__":
    main()
