"""The `lmkern` command.

Exit codes: 0 success, 1 an error while running, 2 a wrong option or configuration, 130 stopped by
Ctrl-C or SIGTERM. Errors are one line on stderr. Heavy packages are imported by the commands that
need them, so that `lmkern --help` and `lmkern info` work without the `train` extra.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .options import UsageError, make_config, make_parser, parse

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from .train import Trainer

HELP = """\
usage: lmkern COMMAND [OPTION ...]

Language models on hand-written kernels.

commands:
  demo      train a GPT and an LSTM for a minute each, compare speed, sample text
  train     train a GPT or an LSTM on a text file
  eval      loss and perplexity of a trained model
  generate  sample text from a trained model
  info      what this installation can do: kernels, instruction set, versions
  selftest  check that GPUs do what lmkern's CUDA kernels are built on

examples:
  lmkern demo
  lmkern train --config configs/shakespeare-char.yaml --data.path input.txt --out_dir out
  lmkern train --model lstm --data.path input.txt --train.max_steps 500
  lmkern eval --checkpoint out
  lmkern generate --checkpoint out --prompt "ROMEO:" --temperature 0.8

`lmkern COMMAND --help` explains every option.
"""

# Import names of the packages in the `train` extra.
_TRAIN_EXTRA = {
    "accelerate",
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "yaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name not in _COMMANDS:
            raise UsageError(f"no command {name!r}; commands: {', '.join(_COMMANDS)}")
        return _COMMANDS[name](rest)
    except UsageError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader (`| head`) has gone: keep Python from failing again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_EXTRA:
            raise
        return _fail(f"`lmkern {name}` needs {package}: pip install lmkern[train]", 1)
    except (OSError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        return _fail(error, 1)
    except Exception as error:  # a damaged file in a way nobody thought of, out of memory, or a bug
        if os.environ.get("LMKERN_TRACEBACK"):
            raise
        hint = "set LMKERN_TRACEBACK=1 to see where"
        return _fail(f"unexpected {type(error).__name__}: {error} ({hint})", 1)


def _fail(error: BaseException | str, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"lmkern: error: {text}", file=sys.stderr)
    return code


def _demo(arguments: list[str]) -> int:
    parser = make_parser(
        "demo",
        "Trains a small GPT and a small LSTM on the built-in text, shows how fast lmkern's\n"
        "kernels are beside torch's in the same model, samples text and draws the loss curves.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="training time per model")
    parser.add_argument("--out_dir", type=str, default="lmkern-demo", help="receives loss.png")
    options = parse(parser, arguments)
    if options is None:
        return 0
    if not 0.0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be positive, got {options.seconds}")
    from .demo import run_demo

    return run_demo(options.seconds, Path(options.out_dir))


def _train(arguments: list[str]) -> int:
    from .data.corpus import DataConfig
    from .models import GPTConfig, RecurrentLMConfig
    from .train.config import TrainConfig

    parser = make_parser(
        "train",
        "Trains a language model on a text file.\n\n"
        "examples:\n"
        "  lmkern train --data.path input.txt --out_dir out\n"
        "  lmkern train --print_config > run.yaml                     (all options, to edit)\n"
        "  lmkern train --config run.yaml --train.max_steps 100 --gpt.n_layer 6\n"
        "  lmkern train --config out/run.json --train.resume true     (go on after a stop)",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options")
    parser.add_argument(
        "--model",
        type=Literal["gpt", "lstm"],
        default="gpt",
        help="family of the model; lstm: a recurrent one, of the cells that --lstm.cell names",
    )
    parser.add_argument(
        "--backend",
        type=Literal["lmkern", "torch"],
        default="lmkern",
        help="whose layers the model is built on",
    )
    parser.add_argument("--out_dir", type=str, default="out", help="receives checkpoints and logs")
    # vocab_size follows from the text.
    parser.add_class_arguments(GPTConfig, "gpt", skip={"vocab_size"})
    parser.add_class_arguments(RecurrentLMConfig, "lstm", skip={"vocab_size"})
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(TrainConfig, "train")
    options = parse(parser, arguments)
    if options is None:
        return 0
    is_gpt = options.model == "gpt"
    model_config = make_config(
        GPTConfig if is_gpt else RecurrentLMConfig, options.gpt if is_gpt else options.lstm
    )
    data_config = make_config(DataConfig, options.data)
    train_config = make_config(TrainConfig, options.train)

    import dataclasses

    import torch

    from .data import load_data
    from .models import GPT, RecurrentLM, load_pretrained
    from .train import Trainer
    from .train.checkpoint import resolve_model_directory

    data = load_data(data_config)
    assert data.tokenizer is not None
    model_config = dataclasses.replace(model_config, vocab_size=data.tokenizer.vocab_size)
    torch.manual_seed(train_config.seed)
    model = (GPT if is_gpt else RecurrentLM)(model_config, backend=options.backend)
    del options["config"]
    trainer = Trainer(model, data, train_config, options.out_dir, run_config=options.as_dict())
    if trainer.is_main:
        print(
            f"{options.model}: {model.num_parameters:,} parameters, {options.backend} layers on "
            f"{trainer.accelerator.device}; {data.source}: {len(data.train):,} training and "
            f"{len(data.val):,} validation tokens of {data.tokenizer.vocab_size} kinds",
            flush=True,
        )
    result = trainer.fit()
    if result.interrupted is not None:
        return 130
    if trainer.is_main and result.best_val_loss is not None:
        print(
            f"best validation loss {result.best_val_loss:.4f} at step {result.best_step}; "
            f"checkpoints in {trainer.root}"
        )
        if data.test is not None:
            best = load_pretrained(resolve_model_directory(trainer.out_dir), options.backend)
            _print_parts(best.to(trainer.accelerator.device), trainer)
    return 0


def _print_parts(model: Any, trainer: Trainer) -> None:
    from .train.evaluate import evaluate_parts

    data = trainer.data
    by_words = data.tokenizer is not None and data.tokenizer.kind == "word"
    results = evaluate_parts(
        model,
        data,
        sequence_length=trainer.updater.sequence_length,
        batch_size=trainer.config.batch_size,
    )
    for part, result in results.items():
        unit = "word perplexity" if by_words else "perplexity"
        print(f"{part} {unit} {result.perplexity:.2f} (loss {result.loss:.4f})")


def _add_checkpoint_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="out_dir of a run (its best checkpoint is taken), or one checkpoint's directory",
    )
    parser.add_argument(
        "--backend",
        type=Literal["lmkern", "torch"],
        default="lmkern",
        help="whose layers the model is built on",
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu"], default="auto", help="auto: a GPU if there is one"
    )


def _load(options: Namespace) -> tuple[Path, Any, Any, Any]:
    """Directory, model (on its device), tokenizer and device that the options ask for."""
    import torch

    from .data import Tokenizer
    from .models import load_pretrained
    from .train.checkpoint import TOKENIZER_FILE, resolve_model_directory

    directory = resolve_model_directory(Path(options.checkpoint))
    gpu = options.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = load_pretrained(directory, backend=options.backend).to(device)
    return directory, model, Tokenizer.load(directory / TOKENIZER_FILE), device


def _eval(arguments: list[str]) -> int:
    parser = make_parser(
        "eval",
        "Prints loss (nats per token) and perplexity of a trained model on a text.\n\n"
        "examples:\n"
        "  lmkern eval --checkpoint out\n"
        "  lmkern eval --checkpoint out --data.path other.txt --data.part all",
    )
    _add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data.path",
        type=str,
        default="",
        help="UTF-8 text file, or directory of them; empty: the training run's text",
    )
    parser.add_argument(
        "--data.part",
        type=Literal["val", "train", "test", "all"],
        default="val",
        help="which part of the text, split as in the training run",
    )
    parser.add_argument("--batch_size", type=int, default=12, help="sequences side by side")
    options = parse(parser, arguments)
    if options is None:
        return 0
    if options.batch_size < 1:
        raise UsageError(f"--batch_size must be >= 1, got {options.batch_size}")

    from .data.corpus import DataConfig, read_parts
    from .files import read_json
    from .train.checkpoint import META_FILE
    from .train.evaluate import evaluate

    directory, model, tokenizer, _ = _load(options)
    meta_path = directory / META_FILE
    meta = read_json(meta_path) if meta_path.exists() else {}
    recorded = meta.get("run", {}).get("data")
    path = options.data.path or (recorded or {}).get("path")
    if path is None:
        raise ValueError(f"{directory} does not record its text: give --data.path")
    fraction = (recorded or {}).get("val_fraction", DataConfig().val_fraction)
    parts = read_parts(DataConfig(path=path, val_fraction=fraction))
    parts["all"] = "".join(parts.values())
    source = path or "the built-in text"
    part = options.data.part
    if part not in parts:
        raise ValueError(f"{source}: has no test part (a directory with test.txt has one)")
    try:
        result = evaluate(
            model,
            tokenizer.encode(parts[part]),
            sequence_length=meta.get("train", {}).get("sequence_length")
            or model.context_size
            or 64,
            batch_size=options.batch_size,
            carries_state=model.carries_state,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    print(f"checkpoint  {directory}")
    print(f"text        {source} ({part}, {result.tokens:,} tokens)")
    print(f"loss        {result.loss:.4f}")
    print(f"perplexity  {result.perplexity:.4f}")
    return 0


def _generate(arguments: list[str]) -> int:
    parser = make_parser(
        "generate",
        "Samples text from a trained model and prints it as it comes.\n\n"
        "example:\n"
        '  lmkern generate --checkpoint out --prompt "ROMEO:" --top_k 20 --seed 1',
    )
    _add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", type=str, default="\n", help="text to go on from; a line break")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="tokens to sample")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1: safer; 0: most likely token"
    )
    parser.add_argument(
        "--top_k", type=int | None, default=None, help="sample among the k most likely"
    )
    parser.add_argument(
        "--top_p",
        type=float | None,
        default=None,
        help="sample among the fewest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int | None, default=None, help="makes it reproducible")
    options = parse(parser, arguments)
    if options is None:
        return 0

    import torch

    from .generate import stream

    _, model, tokenizer, device = _load(options)
    if not options.prompt:
        raise ValueError("--prompt must have at least one character")
    try:
        prompt = tokenizer.encode(options.prompt)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from None
    tokens = stream(
        model,
        torch.tensor(prompt.tolist(), device=device)[None],
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    # A word level model's words carry the space behind them.
    gap = " " if tokenizer.kind == "word" and not options.prompt[-1].isspace() else ""
    print(options.prompt, end=gap, flush=True)
    for piece in tokenizer.stream_decode(int(token) for token in tokens):
        print(piece, end="", flush=True)
    print()
    return 0


def _info(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print("usage: lmkern info\n\nPrints kernels, instruction set, devices and versions.")
        return 0
    if arguments:
        raise UsageError(f"info takes no options, got {' '.join(arguments)}")
    import lmkern

    facts: dict[str, Any] = lmkern.info()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _selftest(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(
            "usage: lmkern selftest\n\nChecks every GPU against what lmkern's CUDA kernels are built on."
        )
        return 0
    if arguments:
        raise UsageError(f"selftest takes no options, got {' '.join(arguments)}")
    from ._selftest import run_selftest

    return run_selftest()


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "info": _info,
    "selftest": _selftest,
}

if __name__ == "__main__":
    sys.exit(main())
