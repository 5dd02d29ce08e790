"""Reading checkpoints: what is accepted, and that every damage is one line that names file and tensor."""

import hashlib
import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from octavo.checkpoint import ModelSpec
from octavo.errors import StartupError
from octavo.worker.weights import expected_shapes, load_weights
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

SPEC = ModelSpec(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2)
UNTIED = msgspec.structs.replace(SPEC, tie_word_embeddings=False)
CPU = torch.device("cpu")
PICKLE = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x03wte\x94K\x01s."


def tensors(spec: ModelSpec = SPEC, prefix: str = "transformer.", dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = expected_shapes(spec)
    if spec.tie_word_embeddings:
        del names["lm_head.weight"]
    return {
        (name if name == "lm_head.weight" else prefix + name): torch.randn(shape).to(dtype)
        for name, shape in names.items()
    }


def load(path: Path, spec: ModelSpec = SPEC, dtype=torch.float32):
    return load_weights(path, spec, device=CPU, dtype=dtype, progress_bar=False)


def take_all(path: Path, spec: ModelSpec = SPEC, dtype=torch.float32) -> dict[str, torch.Tensor]:
    weights = load(path, spec, dtype)
    names = [name for name in expected_shapes(spec) if name in weights.tensors]
    return {name: weights.tensors.pop(name) for name in names}


def error_of(path: Path, spec: ModelSpec = SPEC) -> str:
    with pytest.raises(StartupError) as caught:
        take_all(path, spec)
    assert caught.value.exit_code == StartupError.CHECKPOINT
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) not in line  # a path of the server
    return line


def save_sharded(path: Path, weights: dict[str, torch.Tensor], num_files: int = 3) -> None:
    names = list(weights)
    files = {name: f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def edit_index(path: Path, change) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_single_file_gives_every_tensor_in_the_wanted_type(tmp_path, prefix, stored):
    save_file(tensors(prefix=prefix, dtype=stored), tmp_path / "model.safetensors")
    found = take_all(tmp_path, dtype=torch.bfloat16)
    expected = tensors(prefix="", dtype=stored)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


def test_what_transformers_saves_is_read_tied_or_not(tmp_path):
    for tied in (True, False):
        config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=tied)
        model = GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / str(tied))
        found = take_all(tmp_path / str(tied), SPEC if tied else UNTIED)
        expected = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
        assert ("lm_head.weight" in found) is not tied
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_shards_give_the_same_as_one_file_and_the_hash_of_all_of_them(tmp_path):
    save_sharded(tmp_path, tensors())
    weights = load(tmp_path)
    contents = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("*.safetensors")))
    assert weights.sha256 == hashlib.sha256(contents).hexdigest()
    assert weights.num_parameters == sum(tensor.numel() for tensor in tensors().values())
    found, expected = take_all(tmp_path), tensors(prefix="")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_hash_of_a_single_file_is_the_file_s(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert load(tmp_path).sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_mask_buffers_of_old_checkpoints_are_ignored(tmp_path):
    buffers = {
        "h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8),
        "transformer.h.1.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(tensors(prefix="") | buffers, tmp_path / "model.safetensors")
    assert set(take_all(tmp_path)) == set(tensors(prefix=""))


def test_in_a_tied_model_an_equal_head_is_dropped_a_different_one_kept_and_a_lone_one_used(tmp_path):
    weights = tensors(prefix="")
    for folder, extra, expected_head in (("equal", weights["wte.weight"], None), ("other", torch.ones(31, 8), 1.0)):
        (tmp_path / folder).mkdir()
        save_file(weights | {"lm_head.weight": extra.clone()}, tmp_path / folder / "model.safetensors")
        head = take_all(tmp_path / folder).get("lm_head.weight")
        assert (head is None) if expected_head is None else bool((head == expected_head).all())
    lone = dict(weights)
    lone["lm_head.weight"] = lone.pop("wte.weight")
    save_file(lone, tmp_path / "model.safetensors")
    found = take_all(tmp_path)
    assert torch.equal(found["wte.weight"], weights["wte.weight"])
    assert "lm_head.weight" not in found


def test_the_bar_is_silent_unless_stderr_is_a_terminal(tmp_path, capsys):
    save_file(tensors(), tmp_path / "model.safetensors")
    weights = load_weights(tmp_path, SPEC, device=CPU, dtype=torch.float32)
    weights.tensors.pop("wte.weight")
    weights.tensors.close()
    assert capsys.readouterr().err == ""
    weights = load_weights(tmp_path, SPEC, device=CPU, dtype=torch.float32, progress_bar=True)
    weights.tensors.pop("wte.weight")
    weights.tensors.close()
    assert "weights" in capsys.readouterr().err


def test_a_missing_folder_s_weights_are_named(tmp_path):
    assert error_of(tmp_path) == "model.safetensors: missing, and so is model.safetensors.index.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickle_weights_alone_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(PICKLE)
    assert error_of(tmp_path).startswith(f"{name}: pickle weights refused")


@pytest.mark.parametrize("beginning", [PICKLE, b"\x80\x02\x8a\nl\xfc", b"PK\x03\x04\x00\x00\x08\x08"])
def test_a_pickle_named_safetensors_is_refused_unread(tmp_path, beginning):
    (tmp_path / "model.safetensors").write_bytes(beginning + bytes(1000))
    assert error_of(tmp_path).startswith("model.safetensors: pickle weights refused")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\x00" * 8,
        (1 << 63).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (4).to_bytes(8, "little") + b"null",
    ],
    ids=["empty", "seven bytes", "zero header", "huge header", "long header", "a list", "not UTF-8", "null"],
)
def test_a_broken_header_is_one_line_about_the_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert error_of(tmp_path).startswith("model.safetensors: not a valid safetensors file (")


def rewrite_header(file: Path, change) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["transformer.wte.weight"].update(shape=[1 << 40, 1 << 40]),
        lambda header: header["transformer.wte.weight"].update(data_offsets=[0, 4]),
        lambda header: header["transformer.wte.weight"].update(dtype="Q7"),
        lambda header: header["transformer.wte.weight"].pop("shape"),
    ],
    ids=["shape bomb", "overlap", "unknown type", "no shape"],
)
def test_a_header_that_lies_is_one_line_about_the_file(tmp_path, change):
    save_file(tensors(), tmp_path / "model.safetensors")
    rewrite_header(tmp_path / "model.safetensors", change)
    assert error_of(tmp_path).startswith("model.safetensors: not a valid safetensors file (")


def test_a_truncated_file_names_the_first_tensor_that_is_cut(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:-1])
    last = max(json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}").items(), key=lambda i: i[1]["data_offsets"])
    assert error_of(tmp_path) == f"model.safetensors: {last[0]}: the file ends before it does"


def test_a_file_with_a_tail_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes() + b"\0")
    assert error_of(tmp_path).startswith("model.safetensors: not a valid safetensors file (")


def test_a_file_cut_after_it_was_opened_is_an_error_too(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    weights = load(tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    last = max(json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}").items(), key=lambda i: i[1]["data_offsets"])[0]
    with pytest.raises(StartupError, match="the file ends within it"):
        weights.tensors.pop(last.removeprefix("transformer."))


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    weights = tensors(prefix="")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    assert error_of(tmp_path) == f"model.safetensors: {name}: missing"


def test_an_untied_model_needs_its_head(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    assert error_of(tmp_path, UNTIED) == "model.safetensors: lm_head.weight: missing"


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1.weight", "score.weight", "h.0.crossattention.c_attn.weight"])
def test_an_extra_tensor_is_named(tmp_path, name):
    save_file(tensors() | {name: torch.ones(8)}, tmp_path / "model.safetensors")
    assert error_of(tmp_path).startswith(f"model.safetensors: {name}: does not belong")


def test_a_tensor_stored_twice_is_named(tmp_path):
    save_file(tensors() | {"ln_f.bias": torch.ones(8)}, tmp_path / "model.safetensors")
    assert "ln_f.bias: is also in model.safetensors" in error_of(tmp_path)


def test_a_wrong_shape_is_named_with_what_config_says(tmp_path):
    save_file(tensors() | {"transformer.h.0.attn.c_attn.weight": torch.ones(24, 8)}, tmp_path / "model.safetensors")
    expected = "transformer.h.0.attn.c_attn.weight: has shape [24, 8], config.json says [8, 24]"
    assert error_of(tmp_path) == f"model.safetensors: {expected}"


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_a_type_that_is_no_weight_s_is_named(tmp_path, dtype):
    save_file(tensors() | {"transformer.ln_f.weight": torch.ones(8).to(dtype)}, tmp_path / "model.safetensors")
    assert error_of(tmp_path).startswith("model.safetensors: transformer.ln_f.weight: has type ")


def test_a_config_of_another_size_is_a_wrong_shape(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    larger = msgspec.structs.replace(SPEC, vocab_size=32)
    assert error_of(tmp_path, larger).endswith("has shape [31, 8], config.json says [32, 8]")


@pytest.mark.parametrize(
    "change",
    [
        lambda names: names.update({"ghost.weight": names["transformer.wte.weight"]}),
        lambda names: names.pop("transformer.wte.weight"),
        lambda names: names.update({"transformer.wte.weight": names["transformer.wpe.weight"]}),
        lambda names: names.update({"transformer.wte.weight": "../outside.safetensors"}),
        lambda names: names.update({"transformer.wte.weight": "absent.safetensors"}),
        lambda names: names.update({"transformer.wte.weight": 3}),
        lambda names: names.clear(),
    ],
    ids=["ghost", "left out", "other file", "outside", "absent file", "number", "empty"],
)
def test_an_index_that_disagrees_with_its_files_is_one_line(tmp_path, change):
    save_sharded(tmp_path, tensors())
    edit_index(tmp_path, change)
    assert error_of(tmp_path).split(": ")[0].startswith("model")


def test_an_index_that_is_not_json_is_one_line(tmp_path):
    save_sharded(tmp_path, tensors())
    (tmp_path / "model.safetensors.index.json").write_bytes(b"{")
    assert error_of(tmp_path) == "model.safetensors.index.json: not readable as JSON (JSONDecodeError)"


def test_a_missing_shard_is_named(tmp_path):
    save_sharded(tmp_path, tensors())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert error_of(tmp_path) == "model.safetensors.index.json: model-00002-of-00003.safetensors: is missing"


def test_the_bundled_checkpoint_loads(tmp_path):
    from octavo.checkpoint import read_spec, resolve

    path = resolve("demo")
    spec = read_spec(path)
    shutil.copy(path / "model.safetensors", tmp_path)
    assert len(take_all(tmp_path, spec)) == 4 + 12 * spec.n_layer
