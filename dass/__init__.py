"""DASS, a Distilled Audio State-Space model (arXiv 2407.04082): the model, its training and its evaluation.

    from dass import DASS
    model = DASS.from_pretrained("run/")

Names are imported when they are first used, so that `import dass` costs nothing. The scan kernels: `dass_ops`.
"""

from importlib import import_module

_MODULE_OF = {
    "DASS": "model",
    "DASSConfig": "model",
    "CheckpointError": "checkpoint",
    "LogMel": "audio",
    "LogMelConfig": "audio",
    "AudioError": "audio",
    "load_audio": "audio",
    "read_manifest": "manifest",
    "Tagger": "tagger",
    "Trainer": "trainer",
    "TrainConfig": "config",
    "DistillConfig": "distill",
    "NiahConfig": "niah",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dass' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"dass.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
