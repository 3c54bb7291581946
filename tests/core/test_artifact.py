from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rarefy import artifact
from rarefy.artifact import codebook, symbols
from rarefy.artifact.bits import DTYPES, from_bits, to_bits
from rarefy.artifact.memory import Memory
from rarefy.errors import ArtifactError, RecipeError, StageError
from rarefy.modules import Base
from rarefy_schemas import ARTIFACT_VERSION, ModelReference
from torch import nn


class Own(nn.Module):
    """A user's own class: nothing registers it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + self.shift


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def holding(*tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for i, tensor in enumerate(tensors):
        model.register_buffer(f"t{i}", tensor)
    return model


def write(model: nn.Module, path: Path, base: Base | None = None) -> Path:
    artifact.write(model, base or Base(lambda: copy.deepcopy(model)), path)
    return path


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((to_bits(one) == to_bits(other)).all())


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(same_bits(mine[key], theirs[key]) for key in mine)


def pruned_and_shared(shape: tuple[int, ...], density: float, values: int) -> torch.Tensor:
    """A normal tensor of which `density` survives, its survivors rounded to 32 levels or so."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[weight.abs() < weight.abs().flatten().quantile(1 - density)] = 0
    centroids = torch.linspace(-4, 4, values) + 1e-3
    nearest = centroids[torch.bucketize(weight, (centroids[1:] + centroids[:-1]) / 2)]
    return torch.where(weight == 0, 0.0, nearest)


# A model as a file


def test_a_loaded_model_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    model = small().train()
    model(torch.randn(8, 4))
    loaded = rarefy.load(write(model, tmp_path / "m.rarefy"))
    assert same_state(model, loaded)
    assert not loaded.training
    # on memory that starts elsewhere than torch's own, some kernels round otherwise
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.state_dict().values())
    x = torch.randn(3, 4)
    assert torch.equal(model.eval()(x), loaded(x))
    loaded(x).sum().backward()
    assert loaded[0].weight.grad is not None


def test_a_compressed_convolutional_network_keeps_its_accuracy_and_shrinks(
    tmp_path: Path, trained_digits: nn.Module, digits_task: Any
) -> None:
    reference = ModelReference(source="zoo:digits_cnn")
    model = trained_digits
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            step = layer.weight.data.abs().max() / 7
            layer.weight.data = (layer.weight.data / step).round() * step
    from rarefy.references import build_model

    path = write(model, tmp_path / "m.rarefy", Base(lambda: build_model(reference), reference))
    loaded = rarefy.load(path)
    assert digits_task.score(loaded, "test") == digits_task.score(model, "test")
    assert path.stat().st_size < sum(p.nbytes for p in model.parameters()) / 5


def test_the_same_model_gives_the_same_bytes_and_the_predicted_size(tmp_path: Path) -> None:
    model = small()
    one, two = write(model, tmp_path / "a"), write(copy.deepcopy(model), tmp_path / "b")
    assert one.read_bytes() == two.read_bytes()
    assert artifact.encoded_size(model, Base(small)) == one.stat().st_size


def test_models_of_ones_own_code_need_their_base(tmp_path: Path) -> None:
    model = Own()
    path = write(model, tmp_path / "m.rarefy", Base(Own))
    with pytest.raises(ArtifactError, match="base"):
        rarefy.load(path)
    bases: list[Any] = [Own, Own(), Base(Own)]
    for base in bases:
        loaded = rarefy.load(path, base=base)
        assert same_state(model, loaded)
        assert torch.equal(loaded.shift, model.shift)
    assert not any(tensor.is_meta for tensor in bases[1].parameters())


def test_loading_runs_no_code_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('ran')")
    for source in ("./evil.py:build", "evil:build", "os:system"):
        path = write(Own(), tmp_path / "m.rarefy", Base(Own, ModelReference(source=source)))
        with pytest.raises(ArtifactError, match=r"runs no code.*base="):
            rarefy.load(path)
        assert same_state(rarefy.load(path, base=Own), rarefy.load(path, base=Own()))


def test_the_wrong_base_is_refused(tmp_path: Path) -> None:
    path = write(Own(), tmp_path / "m.rarefy", Base(Own))
    with pytest.raises(ArtifactError, match=r"inner\.weight.*\(6, 4\).*\(7, 4\)"):
        rarefy.load(path, base=lambda: Own(7))
    with pytest.raises(ArtifactError, match="base"):
        rarefy.load(path, base=nn.Identity)
    bigger = Own()
    bigger.more = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"file lacks: more\.weight"):
        rarefy.load(path, base=bigger)


def test_a_reference_that_no_longer_exists_is_said(tmp_path: Path) -> None:
    reference = ModelReference(source="zoo:no-such-net")
    path = write(Own(), tmp_path / "m.rarefy", Base(Own, reference))
    with pytest.raises(RecipeError, match="no-such-net"):
        rarefy.load(path)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    path = write(model, tmp_path / "m.rarefy")
    assert [row.tensor for row in artifact.inspect(path)] == ["0.weight"]
    loaded = rarefy.load(path)
    assert loaded[1].weight is loaded[0].weight
    assert same_state(model, loaded)


def test_recurrent_and_attention_layers_run_after_loading(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.lstm(x)[0]
            return self.attention(x, x, x, need_weights=False)[0]

    model = Reader().eval()
    loaded = rarefy.load(write(model, tmp_path / "m.rarefy", Base(Reader)), base=Reader)
    x = torch.randn(2, 5, 4)
    assert torch.equal(model(x), loaded(x))


def test_frozen_parameters_of_the_base_stay_frozen(tmp_path: Path) -> None:
    model = Own()
    model.inner.weight.requires_grad_(False)
    loaded = rarefy.load(write(model, tmp_path / "m.rarefy"), base=model)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_half_precision_models_keep_their_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = small().to(dtype)
        assert same_state(model, rarefy.load(write(model, tmp_path / "m.rarefy")))


def test_an_inspected_file_tells_how_each_tensor_is_stored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data = pruned_and_shared((64, 64), 0.1, 8)
    path = write(model, tmp_path / "m.rarefy")
    weight, bias = artifact.inspect(path)
    assert (weight.tensor, weight.shape, weight.dtype, weight.coding) == ("0.weight", (64, 64), "float32", "codebook")
    assert weight.bits_per_element == 8 * weight.bytes / 4096 < 1
    assert bias.coding in ("raw", "planes")
    assert 220 < bias.bytes <= 256
    assert artifact.read_manifest(path).creator == f"rarefy {rarefy.__version__}"


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    for tensor, word in [
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
    ]:
        with pytest.raises(ArtifactError, match=word):
            write(holding(tensor), tmp_path / "m.rarefy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match="full"):
        write(small(), tmp_path / "m.rarefy")
    assert list(tmp_path.iterdir()) == []


# Tensors


GOLDEN = "03010007002c010834190efa777b877b7b"
SAMPLES = {
    "empty": lambda dtype: torch.zeros(0, 3, dtype=dtype),
    "scalar": lambda dtype: torch.ones((), dtype=dtype),
    "constant": lambda dtype: torch.ones(4, 5, dtype=dtype),
    "two values": lambda dtype: torch.tensor([0, 1] * 200).to(dtype),
    "many values": lambda dtype: torch.arange(300).reshape(3, 4, 25).to(dtype),
    "transposed": lambda dtype: torch.arange(12).reshape(3, 4).to(dtype).t(),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_tensors_of_every_dtype_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = holding(*(make(dtype) for make in SAMPLES.values()))
    loaded = rarefy.load(write(model, tmp_path / "m.rarefy"), base=model)
    assert same_state(model, loaded)


def test_special_values_come_back_bit_by_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0, 1 << 31, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0x7F800000, 1] * 20)
    floats = bits.to(torch.int64).sub(bits.ge(1 << 31) * (1 << 32)).to(torch.int32).view(torch.float32)
    path = write(holding(floats), tmp_path / "m.rarefy")
    assert artifact.inspect(path)[0].coding == "codebook"
    assert same_bits(rarefy.load(path, base=holding(floats)).t0, floats)


@pytest.mark.parametrize("values", [1, 2, 3, 255, 256, 257, 65535, 65536, 65537])
def test_the_number_of_distinct_values_decides_the_coding(values: int) -> None:
    bits = np.tile(np.arange(values, dtype="<u4") * 40503, 6)
    part = codebook.encode(bits)
    assert (part is not None) == (values <= codebook.MOST_VALUES)
    if part is not None:
        assert len(part) < bits.nbytes
        assert (codebook.decode(part, 4, bits.size) == bits).all()


def test_large_tensors_are_coded_across_chunks() -> None:
    bits = to_bits(pruned_and_shared((1500, 1500), 0.3, 32))
    part = codebook.encode(bits)
    assert part is not None
    assert (codebook.decode(part, 4, bits.size) == bits).all()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_decoding_undoes_encoding(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([1, 2, 4, 8]))
    alphabet = data.draw(st.lists(st.integers(0, 256**width - 1), min_size=1, max_size=40, unique=True))
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(alphabet), max_size=len(alphabet)))
    size = data.draw(st.integers(1, 3000))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = generator.choice(len(alphabet), size, p=np.array(weights) / sum(weights))
    bits = np.array(alphabet, f"<u{width}")[codes]
    part = codebook.encode(bits)
    if part is not None:
        assert len(part) < bits.nbytes
        decoded = codebook.decode(part, width, size)
        assert decoded.dtype == bits.dtype
        assert (decoded == bits).all()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.sampled_from([1, 2, 4, 8]), st.integers(0, 5000))
def test_any_bytes_decode_to_the_right_number_of_elements_or_are_refused(part: bytes, width: int, size: int) -> None:
    try:
        decoded = codebook.decode(part, width, size)
    except ArtifactError:
        return
    assert decoded.shape == (size,)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 63), st.data())
def test_a_damaged_part_is_decoded_to_values_of_its_own_codebook_or_refused(position: int, data: st.DataObject) -> None:
    bits = np.array([3, 3, 3, 5, 5, 9] * 40, "<u4")
    part = bytearray(codebook.encode(bits) or b"")
    part[position % len(part)] ^= data.draw(st.integers(1, 255))
    try:
        decoded = codebook.decode(part, 4, bits.size)
    except ArtifactError:
        return
    assert decoded.shape == bits.shape


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.binary(max_size=5))
def test_numbers_of_any_size_come_back(number: int, rest: bytes) -> None:
    coded = codebook.varint(number)
    assert codebook.read_varint(coded + rest, 0) == (number, len(coded))


def test_the_coding_is_fixed_for_good() -> None:
    """Files outlive versions: these bytes must never change."""
    bits = np.array([7, 7, 7, 7, 7, 1, 7, 7, 300, 7, 7, 7, 1, 7, 7, 7] * 4, "<u2")
    assert codebook.encode(bits) == bytes.fromhex(GOLDEN)
    assert (codebook.decode(bytes.fromhex(GOLDEN), 2, 64) == bits).all()


def test_the_size_is_the_entropy_and_the_histogram() -> None:
    weight = pruned_and_shared((300, 784), 0.1, 32)
    counts = weight.unique(return_counts=True)[1].double()
    entropy = float(-(counts * (counts / counts.sum()).log2()).sum() / 8)
    part = codebook.encode(to_bits(weight))
    assert part is not None
    assert entropy <= len(part) < 1.02 * entropy + 8 * len(counts) + 4


# Files that are not sound


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = small()
    model[0].weight.data = pruned_and_shared((5, 4), 0.4, 4)
    return write(model, tmp_path / "sound.rarefy")


def damaged(sound: Path, data: bytes) -> Path:
    path = sound.with_name("damaged.rarefy")
    path.write_bytes(data)
    return path


def test_a_flipped_bit_anywhere_is_found(sound: Path) -> None:
    data = sound.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError):
            rarefy.load(damaged(sound, bytes(flipped)))


def test_the_damaged_tensor_is_named(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    data[-1] ^= 128
    last = artifact.inspect(sound)[-1].tensor
    with pytest.raises(ArtifactError, match=rf"{last!r} is damaged.*copy or download"):
        rarefy.load(damaged(sound, bytes(data)))


def test_a_truncated_file_is_found_at_every_length(sound: Path) -> None:
    data = sound.read_bytes()
    for length in range(len(data)):
        with pytest.raises(ArtifactError):
            rarefy.load(damaged(sound, data[:length]))
        if length > 400:
            with pytest.raises(ArtifactError, match="truncated"):
                artifact.read_manifest(damaged(sound, data[:length]))


def test_trailing_bytes_are_found(sound: Path) -> None:
    with pytest.raises(ArtifactError, match="3 bytes follow its end"):
        rarefy.load(damaged(sound, sound.read_bytes() + b"\0\0\0"))


def test_an_unknown_version_is_named(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    data[8] = 9
    with pytest.raises(ArtifactError, match=rf"version 9 .* version {ARTIFACT_VERSION}; `pip install -U rarefy`"):
        rarefy.load(damaged(sound, bytes(data)))


def write_zip(path: Path) -> None:
    torch.save(small().state_dict(), path)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (write_zip, "torch.save"),
        (write_pickle, "a pickle"),
        (write_safetensors, "safetensors"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"hello, world"), "another format"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: os.mkfifo(path), "special file"),
        (lambda path: None, "No such file"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, make: Callable[[Path], None], word: str) -> None:
    path = tmp_path / "m.rarefy"
    make(path)
    for read in (rarefy.load, artifact.read_manifest, artifact.inspect):
        with pytest.raises(ArtifactError, match=word):
            read(path)


def forged(sound: Path, change: Callable[[dict[str, Any]], None], parts: bytes | None = None) -> Path:
    """Write a file with a changed manifest whose hashes are right."""
    data = sound.read_bytes()
    length = struct.unpack_from("<Q", data, 12)[0]
    manifest = json.loads(zlib.decompress(data[52 : 52 + length]))
    change(manifest)
    return sealed(sound, json.dumps(manifest).encode(), data[52 + length :] if parts is None else parts)


def sealed(sound: Path, manifest: bytes, parts: bytes) -> Path:
    text = zlib.compress(manifest, 9)
    head = struct.pack("<8sIQ32s", b"\x93RAREFY\n", ARTIFACT_VERSION, len(text), hashlib.sha256(text).digest())
    return damaged(sound, head + text + parts)


def test_forging_without_a_change_gives_a_sound_file(sound: Path) -> None:
    assert same_state(rarefy.load(forged(sound, lambda manifest: None)), rarefy.load(sound))


def set_tensor(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"][0].update(values)


@pytest.mark.parametrize(
    "change",
    [
        set_tensor(length=2**48),
        set_tensor(length=-1),
        set_tensor(length=2**80),
        set_tensor(shape=[2**48, 2**48]),
        set_tensor(shape=[-1, 4]),
        set_tensor(shape=[5, 4, 2]),
        set_tensor(shape=[4, 5]),
        set_tensor(shape=[1] * 200),
        set_tensor(shape="many"),
        set_tensor(shape=[0, 2**48, 2**48]),
        set_tensor(dtype="float128"),
        set_tensor(dtype="bool"),
        set_tensor(coding="pickle"),
        set_tensor(coding="raw"),
        set_tensor(coding="steps"),
        set_tensor(coding="steps", dtype="int32"),
        set_tensor(sha256="0" * 64),
        set_tensor(sha256="no hash"),
        set_tensor(name="1.weight"),
        set_tensor(name="nowhere.weight"),
        set_tensor(name="/etc/passwd"),
        set_tensor(name="../../x"),
        set_tensor(name="0.forward"),
        set_tensor(name=""),
        set_tensor(extra=1),
        lambda manifest: manifest.update(version=ARTIFACT_VERSION + 1),
        lambda manifest: manifest.update(tensors=[]),
        lambda manifest: manifest.update(tensors=manifest["tensors"][:-1]),
        lambda manifest: manifest.update(tensors=manifest["tensors"][::-1]),
        lambda manifest: manifest.update(tensors=None),
        lambda manifest: manifest.update(spec={}),
        lambda manifest: manifest.update(surprise=1),
        lambda manifest: manifest["spec"].update(root={"kind": "os.system", "arguments": {"command": "ls"}}),
        lambda manifest: manifest["spec"].update(ties={"0.weight": "0.weight0"}),
        lambda manifest: manifest["spec"].update(attributes={"": {"forward": 0}}),
        lambda manifest: manifest["spec"]["root"]["children"].pop("0"),
    ],
)
def test_hostile_manifests_are_refused(sound: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(ArtifactError):
        rarefy.load(forged(sound, change))


def test_a_file_that_claims_a_petabyte_is_refused_before_anything_is_allocated(sound: Path) -> None:
    part = symbols.section(np.zeros(100, "<u4"))

    def claim(manifest: dict[str, Any]) -> None:
        digest = hashlib.sha256(part).hexdigest()
        entry = {"name": "0.weight", "dtype": "float32", "coding": "codebook", "sha256": digest, "length": len(part)}
        manifest["tensors"] = [{**entry, "shape": [2**24, 2**24]}]

    path = forged(sound, claim, part)
    for read in (artifact.read_manifest, rarefy.load):
        with pytest.raises(ArtifactError, match=r"claim 1125899906842624 bytes"):
            read(path)


def test_a_bomb_in_the_manifest_is_refused(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rarefy.artifact import container

    monkeypatch.setattr(container, "_LARGEST_MANIFEST", 1 << 20)
    with pytest.raises(ArtifactError, match="too large"):
        rarefy.load(sealed(sound, b" " * (1 << 21), b""))


@pytest.mark.parametrize("manifest", [b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"a":' * 5000, b"[" * 100000])
def test_a_manifest_that_is_none_is_refused(sound: Path, manifest: bytes) -> None:
    with pytest.raises(ArtifactError, match="manifest is not sound"):
        rarefy.load(sealed(sound, manifest, b""))


def test_deeply_nested_modules_are_refused_or_built(sound: Path) -> None:
    def nest(manifest: dict[str, Any]) -> None:
        for _ in range(150):
            manifest["spec"]["root"] = {"kind": "torch.nn.Sequential", "children": {"0": manifest["spec"]["root"]}}

    with pytest.raises(ArtifactError):
        rarefy.load(forged(sound, nest))


def test_truth_values_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(ArtifactError, match="neither 0 nor 1"):
        from_bits(np.array([0, 1, 2], "u1"), torch.bool, (3,))


class TestMemory:
    """Tensors that were encoded before are not encoded again."""

    def test_a_second_file_is_the_same_and_takes_no_encoding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = torch.randint(256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
        model = holding(pruned_and_shared((40, 50), 0.31, 16), noise)
        first = write(model, tmp_path / "first").read_bytes()
        monkeypatch.setattr(artifact, "_tried", None)
        assert write(copy.deepcopy(model), tmp_path / "second").read_bytes() == first
        monkeypatch.undo()
        model.t1[0] += 1  # plain elements are not remembered
        again = rarefy.load(write(model, tmp_path / "third"), base=model)
        assert torch.equal(again.t1, model.t1)

    def test_what_was_not_asked_for_the_longest_is_forgotten(self) -> None:
        memory = Memory(most=1000)
        for key in "abcd":  # of which three fit
            memory.put(key, ("raw", b""))
        assert memory.get("a") is None
        assert memory.get("b") == ("raw", b"")
        memory.put("e", ("codebook", b"12"))
        assert [memory.get(key) is None for key in "bcde"] == [False, True, False, False]
        memory.put("f", ("codebook", bytes(1000)))
        assert [memory.get(key) for key in "bdef"] == [None] * 4
        memory.put("g", ("codebook", b"1"))
        assert memory.get("g") == ("codebook", b"1")
