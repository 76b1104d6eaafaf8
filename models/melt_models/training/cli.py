"""``melt-train``: makes a MELT model out of a LoopLM.

    melt-train ouro-1.4b --teacher ByteDance/Ouro-1.4B --data tokens --out build/run
    melt-train melt-tiny-exit --student models/melt-tiny --data tokens --out build/gate

Phase 1 blends the LoopLM's caches, one for each loop, into MELT's single one; phase 2 distils the LoopLM, its attention
outputs included. A recipe with a table [joint] trains the model together with its exit gate after that, one with a
table [exit] the exit gate, the model frozen; with these tables alone it does so for a finished model, MELT or LoopLM,
and needs no teacher. Stopped at any point, the same command goes on
from the last checkpoint. The model is OUT/model; the next step is: melt-export OUT/model --out BUNDLE
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from melt_models.errors import CheckpointError, missing_package
from melt_models.training.errors import TrainingError


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="melt-train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="one that ships, such as ouro-1.4b, or a TOML file with every number of a run")
    parser.add_argument("--teacher", help="LoopLM checkpoint: a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, help="data set on disk (see melt_models.training.prepare)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: log, checkpoints, model")
    parser.add_argument("--student", help="model to start from (default: the teacher, new gates)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default: %(default)s)")
    parser.add_argument(
        "--plot", action="store_true", help="draw OUT/log.png at the end; after a finished run, only that"
    )
    args = parser.parse_args(argv)
    try:
        model = _train(args)
        print(f"model: {model}")
        if args.plot:
            from melt_models.training.plot import plot_log

            print(f"plot: {plot_log(args.out)}")
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(args: argparse.Namespace) -> Path:
    """Trains; what takes seconds to import is imported here."""
    if args.plot and find_spec("matplotlib") is None:  # before the training, not after it
        raise TrainingError("--plot needs matplotlib: pip install 'melt-onnx[plot]'")
    try:
        for module in ("torch", "melt_models.training.trainer"):  # torch first: transformers warns where it is not
            import_module(module)
    except ModuleNotFoundError as error:
        raise TrainingError(missing_package(error, "melt-train", "train")) from error
    from transformers.utils import logging

    from melt_models.hub import checkpoint_folder
    from melt_models.training.recipe import read_recipe
    from melt_models.training.recipe_files import recipe_path
    from melt_models.training.trainer import train

    logging.disable_progress_bar()
    recipe = read_recipe(recipe_path(args.recipe))
    teacher = None if args.teacher is None else checkpoint_folder(args.teacher)
    student = None if args.student is None else checkpoint_folder(args.student)
    return train(recipe, teacher, args.data, args.out, student, args.device)
